"""Where an FX node comes from: the user's source line, the module path, and the forward op of a backward op."""

from __future__ import annotations

import linecache
import operator
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..ir.graph import Location

_FRAME = re.compile(r'^\s*File "(?P<file>[^\n]*)", line (?P<line>\d+), in [^\n]*\n(?P<source>[^\n]*)', re.MULTILINE)
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_PACKAGE, _PACKAGE_NAME = Path(__file__).parent.parent, str(__package__).rpartition(".")[0]
_INDEXED = re.compile(r"\[(?:'([^']*)'|\"([^\"]*)\"|(\d+))\]")

#: Autograd's own copy of a result that it saves, AOTAutograd's writing back of mutated inputs, parts of results.
_NOT_DIFFERENTIATED = (torch.ops.aten.detach.default, torch.ops.aten.copy_.default, operator.getitem)
#: What AOTAutograd writes into the trace of a sum of gradients, which has no autograd node of its own.
_ADDITION = "Gradient addition node"


def node_location(meta: Mapping[str, Any]) -> Location:
    """The user's innermost line and the innermost module; of a backward op, those of its forward op."""
    trace = meta.get("stack_trace")
    file, line, source = user_frame(trace) if isinstance(trace, str) and trace else ("", 0, "")
    if not file:
        file, line, source = _forward_of(_innermost_module(meta)[1])
    return Location(file, line, source, _module(meta))


def _module(meta: Mapping[str, Any]) -> str:
    return clean_module_path(str(_innermost_module(meta)[0]))


def _innermost_module(meta: Mapping[str, Any]) -> tuple[str, Any]:
    """Path and class of the innermost module on an op's module stack."""
    stack = meta.get("nn_module_stack") or meta.get("fwd_nn_module_stack")
    if not isinstance(stack, Mapping) or not stack:
        return "", None
    entry = list(stack.values())[-1]
    return entry if isinstance(entry, tuple) else (entry, None)


@lru_cache(maxsize=4096)
def _forward_of(module_class: Any) -> tuple[str, int, str]:
    """Where the class defines ``forward``: what is known of an op of torch's own modules that no line of the user's
    calls (a model that is an ``nn.Sequential``)."""
    code = getattr(getattr(module_class, "forward", None), "__code__", None)
    if code is None:
        return "", 0, ""
    return code.co_filename, code.co_firstlineno, linecache.getline(code.co_filename, code.co_firstlineno).strip()


def location_like(location: Location, meta: Mapping[str, Any]) -> Location:
    """A backward op's location, with the line of its forward op where it has none itself. The module stays: at the
    border of two layers the forward op may lie in the other one."""
    if location.file:
        return location
    other = node_location(meta)
    return replace(location, file=other.file, line=other.line, source=other.source)


@lru_cache(maxsize=65536)
def user_frame(trace: str) -> tuple[str, int, str]:
    """File, line number and text of the last frame of the user's files; where there is none, of torch's."""
    frames = [(found["file"], int(found["line"]), found["source"].strip()) for found in _FRAME.finditer(trace)]
    outside = [frame for frame in frames if is_users(frame[0])]
    frames = outside or [frame for frame in frames if not _is_ours(frame[0])]
    return frames[-1] if frames else ("", 0, "")


def is_users(file: str) -> bool:
    """Whether a source file is neither torch's nor effcc's."""
    return not os.path.abspath(file).startswith(_TORCH) and not _is_ours(file)


@lru_cache(maxsize=4096)
def _is_ours(file: str) -> bool:
    """The package's root may hold other things than the package (examples, a virtual environment)."""
    path = Path(os.path.abspath(file))
    if path.suffix != ".py" or not path.is_relative_to(_PACKAGE):
        return False
    return ".".join((_PACKAGE_NAME, *path.relative_to(_PACKAGE).with_suffix("").parts)) in sys.modules


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
    return "fwd_nn_module_stack" in meta or bool(meta.get("autograd_backward")) or is_backward_tag(meta)


def is_backward_tag(meta: Mapping[str, Any]) -> bool:
    """Whether the partitioner took the node for one of the backward. (All nodes of the backward graph that it made are
    marked ``autograd_backward``, those of the forward that it repeats there too.)"""
    return meta.get("partitioner_tag") in ("is_backward", "must_be_in_backward")


class ForwardOps:
    """The forward op of each op of a backward (or joint) graph.

    Autograd numbers what it differentiates. An op that is traced carries the number of the autograd node made last: its
    own, or, if autograd does not see it, an earlier op's. Of the forward ops with a backward op's number, the one meant
    is the last with the same stack trace and module (a composite op is several nodes), else the first.
    """

    def __init__(self, gm: torch.fx.GraphModule) -> None:
        self.gm = gm
        self.nodes = {node.name: node for node in gm.graph.nodes}
        self.by_place: dict[tuple[int, str, str], str] = {}
        self.by_number: dict[int, str] = {}
        for node in gm.graph.nodes:
            number = node.meta.get("seq_nr")
            if node.op != "call_function" or not isinstance(number, int) or is_backward(node.meta):
                continue
            key = (number, *_place(node.meta))
            if key in self.by_place and node.target in _NOT_DIFFERENTIATED:
                continue
            self.by_place[key] = node.name
            self.by_number.setdefault(number, node.name)

    def names_for(self, gm: torch.fx.GraphModule) -> dict[str, str]:
        """For the ops of a backward graph: the forward op that each differentiates, or computes again, where known."""
        ops = [node for node in gm.graph.nodes if node.op == "call_function"]
        names = {node.name: self._own(node) for node in ops}
        # A sum of gradients is the gradient of a value that several ops read. Its reader differentiates the op that
        # made the value. What is left is named after what it reads: a saved value stands for the op that made it.
        for node in reversed(ops):
            if not names[node.name] and _adds_gradients(node):
                names[node.name] = _first(names, node.users)
        for node in ops:
            if not names[node.name]:
                saved = (operand.name for operand in node.all_input_nodes if self._is_saved(operand))
                names[node.name] = _first(names, node.all_input_nodes) or next(saved, "")
        return names

    def _own(self, node: torch.fx.Node) -> str:
        if self.repeats(node):
            return node.name
        number = node.meta.get("seq_nr")
        if not isinstance(number, int) or _adds_gradients(node):
            return ""
        return self.by_place.get((number, *_place(node.meta))) or self.by_number.get(number, "")

    def _is_saved(self, node: torch.fx.Node) -> bool:
        return node.op == "placeholder" and node.name in self.nodes and self.nodes[node.name].op == "call_function"

    def repeats(self, node: torch.fx.Node) -> bool:
        """Whether a backward graph's op is a copy of a forward op, computed again instead of saved."""
        own = self.nodes.get(node.name)
        return own is not None and own is not node and own.target == node.target and not is_backward_tag(node.meta)

    def body_of(self, name: str) -> ForwardOps | None:
        """The ops of the subgraph that the forward op ``name`` calls; None if it calls none."""
        node = self.nodes.get(name)
        while node is not None and node.target is operator.getitem:
            node = node.args[0] if isinstance(node.args[0], torch.fx.Node) else None
        called = node.args[0] if node is not None and node.args else None
        if not isinstance(called, torch.fx.Node) or called.op != "get_attr":
            return None
        body = getattr(self.gm, str(called.target), None)
        return ForwardOps(body) if isinstance(body, torch.fx.GraphModule) else None


def _place(meta: Mapping[str, Any]) -> tuple[str, str]:
    """Stack trace and innermost module, equal for a forward op and what differentiates it."""
    return str(meta.get("stack_trace")), _module(meta)


def _first(names: Mapping[str, str], nodes: Iterable[torch.fx.Node]) -> str:
    return next((names[node.name] for node in nodes if names.get(node.name)), "")


def _adds_gradients(node: torch.fx.Node) -> bool:
    return _ADDITION in str(node.meta.get("stack_trace"))
