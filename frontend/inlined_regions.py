"""Calls of shared subgraphs written out again, in the graph that Dynamo hands over.

Under a memory budget each layer may save something else, so what comes after Dynamo must see every layer's own ops.
Dynamo need not trace each of them for that: it traces one (``repeated_modules``), and its ops are copied here to where
the siblings are called. The copies are what Dynamo would have made: their source lines begin with the lines of their
own call, their modules are the sibling's, and their values share storage with each other's only (``own_values``).

    rewrite: hidden = invoke_subgraph(@layer, layers[0].w, hidden)           hidden = linear(hidden, layers[0].w)
             hidden = invoke_subgraph(@layer, layers[1].w, hidden)    ->     hidden = linear(hidden, layers[1].w)
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .own_values import OwnValues

_FRAME = re.compile(r'^(?=  File ")', re.MULTILINE)


@dataclass(frozen=True)
class Traced:
    """The call at which a body was traced: the module's path, and how many entries the module stack had at its ops:
    those of the modules around it, the module, and the module once more, called by the function that was traced."""

    path: str
    depth: int


def inline_regions(gm: torch.fx.GraphModule, bodies: Mapping[str, Traced], calls_from: str) -> int:
    """Write out, in place, the calls of ``bodies`` (names of submodules of ``gm``); others stay.

    calls_from: the file of the function that calls a shared module, whose frame no source line has when the module is
    not shared. Returns the number of calls.
    """
    graph = gm.graph
    calls = [node for node in graph.nodes if _is_call_of(node, bodies)]
    for call in calls:
        _inline(gm, call, bodies[call.args[1]], calls_from)
    for node in graph.find_nodes(op="get_attr"):
        if node.target in bodies and not node.users:
            graph.erase_node(node)
    left = {node.target for node in graph.find_nodes(op="get_attr")}
    for name in bodies:
        if calls and name not in left and name in gm._modules:
            delattr(gm, name)
    if calls:
        graph.lint()
        gm.recompile()
    return len(calls)


def _is_call_of(node: torch.fx.Node, bodies: Mapping[str, Traced]) -> bool:
    return node.target is torch.ops.higher_order.invoke_subgraph and node.args[1] in bodies


def _inline(gm: torch.fx.GraphModule, call: torch.fx.Node, traced: Traced, calls_from: str) -> None:
    attribute, _, *operands = call.args
    assert isinstance(attribute, torch.fx.Node)
    body = getattr(gm, str(attribute.target))
    places = body.graph.find_nodes(op="placeholder")
    values: dict[torch.fx.Node, Any] = dict(zip(places, operands, strict=True))
    move = _mover(call, traced, calls_from)
    results: Any = ()
    own = OwnValues()
    for place, operand in zip(places, operands, strict=True):
        own.stands_for(_value(place), _value(operand))
    (returned,) = body.graph.find_nodes(op="output")
    for user in call.users:
        own.stands_for(_value(returned.args[0][user.args[1]]), _value(user))
    with gm.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op == "output":
                results = torch.fx.map_arg(node.args[0], values.__getitem__)
            elif node.op != "placeholder":
                copy = values[node] = gm.graph.node_copy(node, values.__getitem__)
                copy.meta = move(node, copy.name)
                if "example_value" in copy.meta:
                    copy.meta["example_value"] = own.of(copy.meta["example_value"])
    for user in list(call.users):
        assert user.target is operator.getitem, "Dynamo takes a region's results apart"
        user.replace_all_uses_with(results[user.args[1]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(call)


def _value(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, torch.fx.Node) else None


def _mover(call: torch.fx.Node, traced: Traced, calls_from: str) -> Callable[[torch.fx.Node, str], dict[str, Any]]:
    """(node of a body, name of its copy) -> what is known of the copy, made by ``call``."""
    outer = call.meta.get("nn_module_stack") or {}
    own = list(outer.items())
    key, path = (str(own[-1][0]), str(own[-1][1][0])) if own else ("", "")
    stacks: dict[int, Any] = {}  # nodes of one module share one stack there, and here
    lines = call.meta.get("stack_trace") or ""

    def stack(given: Any) -> Any:
        inner = []
        for name, (where, module_class) in list(given.items())[traced.depth :]:
            # The keys are the ids of the first sibling's modules; no two siblings' modules may have one key.
            moved = _below(str(where), traced.path, path)
            inner.append((name if moved == where else f"{name}/{key}", (moved, module_class)))
        return type(given)([*own, *inner])

    def move(node: torch.fx.Node, name: str) -> dict[str, Any]:
        meta = {key: value for key, value in node.meta.items() if key != "creation_timestamp"}  # of subgraphs only
        if "nn_module_stack" in meta:
            given = meta["nn_module_stack"]
            meta["nn_module_stack"] = stacks[id(given)] if id(given) in stacks else stack(given)
            stacks[id(given)] = meta["nn_module_stack"]
        if meta.get("source_fn_stack"):
            meta["source_fn_stack"] = [(name, meta["source_fn_stack"][-1][1])]  # without the call around it
        if meta.get("stack_trace"):
            meta["stack_trace"] = _without_call(meta["stack_trace"], lines, calls_from)
        return meta

    return move


def _below(path: str, first: str, sibling: str) -> str:
    """``layers[0].mlp`` as ``layers[3].mlp``; a path that is not below the first sibling stays."""
    inside = path.startswith(first) and path[len(first) : len(first) + 1] in ("", ".", "[")
    return sibling + path[len(first) :] if inside else path


def _without_call(trace: str, lines: str, calls_from: str) -> str:
    """The stack trace with ``lines`` in place of all down to the frame that calls the module."""
    frames = _FRAME.split(trace)
    for index in range(len(frames) - 1, -1, -1):
        if frames[index].startswith(f'  File "{calls_from}", '):
            return lines + "".join(frames[index + 1 :])
    return trace
