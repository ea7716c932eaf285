"""From a choice of saved values to forward and backward modules of a joint FX graph."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.fx as fx

from . import torch_internals
from .passes.activation.candidates import Candidate
from .passes.activation.problem import JointProblem
from .passes.activation.token_shares import Shares, rows_away
from .token_rows import RowGraph


@dataclass(frozen=True)
class Part:
    """Of a value as rows of ``sizes`` the first ``count`` are swapped; the ``rest`` is what the node ``tail`` makes."""

    count: int
    rest: int
    sizes: tuple[int, ...]
    tail: str


def split_saving(
    gm: fx.GraphModule,
    problem: JointProblem,
    saved: Collection[int],
    num_fwd_outputs: int,
    static_inputs: list[int],
    swapped: Collection[int] = (),
    prefetch: Mapping[int, str] | None = None,
    shares: Shares = frozenset(),
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Split ``gm`` so that the values ``saved`` of its problem are kept. Views of them are made again in the backward.

    What the backward then needs is found here, on the FX graph itself; an input that it needs is kept as well. Of
    ``swapped`` values the forward hands on where they are on the host; their copies back begin before the nodes that
    ``prefetch`` names. Of those in ``shares`` only the first rows are, and the backward computes the others again.
    """
    gm = torch_internals.copy_graph(gm) if shares else gm
    away = {node_of(gm, problem, value) for value in swapped}
    keep = {node_of(gm, problem, value) for value in saved} | away
    rows = {node_of(gm, problem, v): rows_away(problem.tokens, quarters) for v, quarters in shares}
    tails = _tie_tails(gm, rows, keep, num_fwd_outputs)
    split = torch_internals.split_joint(gm, needed(gm, keep, num_fwd_outputs), num_fwd_outputs, static_inputs)
    _untie(split[1])
    if away:
        ahead = {node_of(gm, problem, value).name: name for value, name in (prefetch or {}).items()}
        parts = {node.name: tails[node] for node in rows}
        swap(*split, {node.name: ahead.get(node.name, "") for node in away}, num_fwd_outputs, parts)
    return split


def _with_tails(gradient: torch.Tensor, *tails: torch.Tensor) -> torch.Tensor:
    """Stands in a joint graph for one of its results, so that the backward computes ``tails`` too. It is never run."""
    raise AssertionError("a mark for the splitting of graphs")


def _tie_tails(
    gm: fx.GraphModule, rows: Mapping[fx.Node, int], keep: Collection[fx.Node], num_fwd_outputs: int
) -> dict[fx.Node, Part]:
    """Add nodes that compute the rows from ``rows`` on of its nodes, for the backward."""
    if not rows:
        return {}
    graph = RowGraph(gm)
    inputs = gm.graph.find_nodes(op="placeholder")
    at_hand = set(keep).union(inputs)
    tails = {node: graph.tail(node, count, at_hand) for node, count in rows.items()}
    (output,) = gm.graph.find_nodes(op="output")
    results = list(output.args[0])
    index = next(i for i in range(num_fwd_outputs, len(results)) if isinstance(results[i], fx.Node))
    with gm.graph.inserting_before(output):
        tie = gm.graph.call_function(_with_tails, (results[index], *tails.values()))
    tie.meta = dict(results[index].meta)
    results[index] = tie
    output.args = (tuple(results),)
    found = {}
    for node, tail in tails.items():
        rest, *sizes = tail.meta["val"].shape
        found[node] = Part(rows[node], rest, tuple(sizes), tail.name)
    return found


def _untie(backward: fx.GraphModule) -> None:
    for node in backward.graph.find_nodes(op="call_function", target=_with_tails):
        node.replace_all_uses_with(node.args[0])
        backward.graph.erase_node(node)


def prefetches(problem: JointProblem, chosen: Candidate) -> dict[int, str]:
    """Swapped value -> the op of the backward before which its copy from the host begins, as the simulator has it."""
    run = chosen.simulation
    found: dict[int, str] = {}
    for value, position in run.issued:
        while run.entries[position].fetched or not problem.ops[run.entries[position].op].in_graph:
            position += 1
        found[value] = problem.ops[run.entries[position].op].name
    return found


def swap(
    forward: fx.GraphModule,
    backward: fx.GraphModule,
    names: Mapping[str, str],
    num_fwd_outputs: int,
    parts: Mapping[str, Part] = MappingProxyType({}),
) -> None:
    """Put the ops that take saved values to the host and bring them back into a split graph, in place. ``names`` says
    before which node of the backward each value's copy begins (empty: before its first use).

    rewrite::

        forward   %a = f(...); return (..., %a)      ->  %h = effcc.swap_out(%a); return (..., %h)
        backward  %a = input(); ...; %c = ...;       ->  %a = input(); ...; %x = effcc.swap_in(%a, ...); %c = ...;
                  %b = g(%a)                             %w = effcc.swap_wait(%x); %b = g(%x)

    Only where copies have a stream of their own, on a GPU, is there something to wait for. Of values in ``parts`` some
    rows are swapped, and a node of the backward computes the others::

        forward   %a = f(...)                        ->  %v = view(%a, [rows, ...]); %s = slice(%v, 0, 0, count);
                                                         %h = effcc.swap_out(%s)
        backward  %t = ...; %b = g(%a)               ->  %x = effcc.swap_in(%a, ...); %t = ...; %c = cat([%x, %t]);
                                                         %w = view(%c, [...]); %b = g(%w)
    """
    from .runtime.host_tier import runs_beside  # (with it come the ops)

    (output,) = forward.graph.find_nodes(op="output")
    results = list(output.args[0])
    handles: dict[str, fx.Node] = {}
    for index in range(num_fwd_outputs, len(results)):
        node = results[index]
        if not isinstance(node, fx.Node) or node.name not in names:
            continue
        if node.name not in handles:
            part = parts.get(node.name)
            leaving = node if part is None else _first_rows(node, part)
            handles[node.name] = _after(leaving, node, torch.ops.effcc.swap_out.default, leaving)
        results[index] = handles[node.name]
    output.args = (tuple(results),)
    for node in backward.graph.find_nodes(op="placeholder"):
        if node.name in parts:
            _join(node, parts[node.name])
    order = list(backward.graph.nodes)
    place = {node: position for position, node in enumerate(order)}
    by_name = {node.name: node for node in order if node.op == "call_function"}
    for node in backward.graph.find_nodes(op="placeholder"):
        if node.name not in handles:
            continue
        value = node.meta["val"]
        first = next(other for other in order if other in node.users)
        with backward.graph.inserting_before(min(first, by_name.get(names[node.name], first), key=place.__getitem__)):
            fetched = backward.graph.call_function(
                torch.ops.effcc.swap_in.default,
                (node, list(value.size()), list(value.stride()), value.dtype, value.device),
            )
        node.replace_all_uses_with(fetched, delete_user_cb=lambda user, own=fetched: user is not own)
        fetched.meta = _origin(node) | {"val": value}
        if runs_beside(value.device):
            with backward.graph.inserting_before(first):
                waiting = backward.graph.call_function(torch.ops.effcc.swap_wait.default, (fetched,))
            waiting.meta = _origin(node) | {"val": None}
        node.meta = dict(node.meta) | {"val": handles[node.name].meta["val"]}
        node.meta.pop("tensor_meta", None)
    for module in (forward, backward):
        module.graph.lint()
        module.recompile()


def _after(place: fx.Node, part_of: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A node behind ``place`` that belongs to what ``part_of`` computes."""
    with place.graph.inserting_after(place):
        made = place.graph.call_function(target, args)
    known = [value.meta["val"] if isinstance(value, fx.Node) else value for value in args]
    made.meta = _origin(part_of) | {"val": torch_internals.fake_result(lambda _: target(*known), part_of.meta["val"])}
    return made


def _first_rows(node: fx.Node, part: Part) -> fx.Node:
    """The rows of a value that leave the device, behind it."""
    rows = _after(node, node, torch.ops.aten.view.default, node, [part.count + part.rest, *part.sizes])
    return _after(rows, node, torch.ops.aten.slice.Tensor, rows, 0, 0, part.count)


def _join(node: fx.Node, part: Part) -> None:
    """Let an input of a backward be the first rows of what it was; its users read those and the others in one."""
    graph = node.graph
    place = {each: position for position, each in enumerate(graph.nodes)}
    (tail,) = (each for each in place if each.name == part.tail)
    first = min(node.users, key=place.__getitem__)
    before: set[fx.Node] = set()
    waiting = [tail]
    while waiting:
        each = waiting.pop()
        if each not in before and each.op != "placeholder":
            before.add(each)
            waiting.extend(each.all_input_nodes)
    for each in sorted(before, key=place.__getitem__):
        if place[each] > place[first]:
            first.prepend(each)
    value = node.meta["val"]
    rows = [part.count + part.rest, *part.sizes]
    head = torch_internals.fake_result(lambda _: value.view(rows)[: part.count], value)
    with graph.inserting_before(first):
        joined = graph.call_function(torch.ops.aten.cat.default, ([node, tail],))
    joined.meta = _origin(node) | {"val": torch_internals.fake_result(lambda _: value.view(rows), value)}
    result = _after(joined, node, torch.ops.aten.view.default, joined, list(value.shape))
    node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not joined)
    node.meta = dict(node.meta) | {"val": head}


def _origin(node: fx.Node) -> dict[str, Any]:
    """Where in the model a node comes from, for one that is made for it."""
    return {
        key: node.meta[key] for key in ("stack_trace", "nn_module_stack", "fwd_nn_module_stack") if key in node.meta
    }


def node_of(gm: fx.GraphModule, problem: JointProblem, value: int) -> fx.Node:
    """The FX node whose result is a value: the op itself, or the ``getitem`` of one of its results."""
    entry = problem.values[value]
    node: fx.Node = _by_name(gm)[entry.node]
    if not isinstance(node.meta.get("val"), tuple | list):
        return node
    for user in node.users:
        if user.target is operator.getitem and user.args[1] == entry.part:
            return user
    return node


def _by_name(gm: fx.GraphModule) -> dict[str, fx.Node]:
    return {node.name: node for node in gm.graph.nodes}


def needed(gm: fx.GraphModule, keep: Collection[fx.Node], num_fwd_outputs: int) -> list[fx.Node]:
    """Of ``keep`` and the inputs, what the backward reads, in the graph's order."""
    late = set(torch_internals.backward_only_nodes(gm))
    backward: set[fx.Node] = set()
    for node in gm.graph.nodes:
        tangent = node.op == "placeholder" and not torch_internals.is_primal(node)
        if tangent or node.name in late or any(operand in backward for operand in node.all_input_nodes):
            backward.add(node)
    (output,) = gm.graph.find_nodes(op="output")
    backward.discard(output)
    waiting = [operand for node in backward for operand in node.all_input_nodes if operand not in backward]
    results = output.args[0][num_fwd_outputs:]
    waiting += [node for node in results if isinstance(node, fx.Node)]
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node in seen or node in backward or node.op == "get_attr":
            continue
        seen.add(node)
        if node in keep or node.op == "placeholder":
            found.add(node)
        else:
            waiting.extend(node.all_input_nodes)
    return [node for node in gm.graph.nodes if node in found]


def values_saved(forward: fx.GraphModule, problem: JointProblem, num_fwd_outputs: int) -> frozenset[int]:
    """Values of the problem among what a forward module saves; views stand for what they are views of."""
    (output,) = forward.graph.find_nodes(op="output")
    names = {node.name for node in output.args[0][num_fwd_outputs:] if isinstance(node, fx.Node)}
    return frozenset(v for name in names for v in problem.of.get(name, ()) if problem.values[v].op >= 0)
