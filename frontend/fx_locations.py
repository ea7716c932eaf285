"""Where an FX node comes from: the user's source line, the module path, and the forward op of a backward op."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from ..ir.graph import Location

_FRAME = re.compile(r'^\s*File "(?P<file>[^\n]*)", line (?P<line>\d+), in [^\n]*\n(?P<source>[^\n]*)', re.MULTILINE)
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_INDEXED = re.compile(r"\[(?:'([^']*)'|\"([^\"]*)\"|(\d+))\]")

#: Autograd's own copy of a result that it saves, and AOTAutograd's writing back of mutated inputs.
_NOT_DIFFERENTIATED = (torch.ops.aten.detach.default, torch.ops.aten.copy_.default)


def node_location(meta: Mapping[str, Any]) -> Location:
    """The innermost line outside of torch and the innermost module; of a backward op, those of its forward op."""
    trace = meta.get("stack_trace")
    file, line, source = user_frame(trace) if isinstance(trace, str) and trace else ("", 0, "")
    stack = meta.get("nn_module_stack") or meta.get("fwd_nn_module_stack")
    module = ""
    if isinstance(stack, Mapping) and stack:
        path = list(stack.values())[-1]
        module = clean_module_path(str(path[0] if isinstance(path, tuple) else path))
    return Location(file, line, source, module)


@lru_cache(maxsize=65536)
def user_frame(trace: str) -> tuple[str, int, str]:
    """File, line number and text of the last frame outside of torch's own files (of the last frame, if all are inside)."""
    frames = [(found["file"], int(found["line"]), found["source"].strip()) for found in _FRAME.finditer(trace)]
    if not frames:
        return "", 0, ""
    outside = [frame for frame in frames if not os.path.abspath(frame[0]).startswith(_TORCH)]
    return (outside or frames)[-1]


@lru_cache(maxsize=65536)
def clean_module_path(path: str) -> str:
    """``L['self']._modules['layers']._modules['3'].mlp`` and ``L['self'].layers[3].mlp`` both are ``layers.3.mlp``."""
    path = path.split("@", 1)[0]
    path = re.sub(r"\.(?:slice\([^)]*\)|_modules)", "", path)
    path = re.sub(r"^(?:L|G)\[(?:'[^']*'|\"[^\"]*\")\]", "", path)
    path = _INDEXED.sub(lambda found: "." + next(group for group in found.groups() if group is not None), path)
    path = path.replace("_orig_mod.", "").strip(".")
    return "" if path in ("self", "fn", "model_self", "_orig_mod") else path.removeprefix("self.")


def is_backward(meta: Mapping[str, Any]) -> bool:
    """Whether a joint graph's node belongs to the backward."""
    return (
        "fwd_nn_module_stack" in meta
        or bool(meta.get("autograd_backward"))
        or meta.get("partitioner_tag") in ("is_backward", "must_be_in_backward")
    )


def forward_nodes(gm: torch.fx.GraphModule, phase: str) -> dict[int, str]:
    """Autograd's sequence number -> the last forward node that carries it: the op that the autograd node differentiates.

    Ops that autograd does not see carry the number of the next one that it sees; the last is the one that counts.
    """
    if phase == "backward":
        return {}
    table: dict[int, str] = {}
    for node in gm.graph.nodes:
        number = node.meta.get("seq_nr")
        if node.target in _NOT_DIFFERENTIATED and number in table:
            continue
        if node.op == "call_function" and isinstance(number, int) and not is_backward(node.meta):
            table[number] = node.name
    return table
