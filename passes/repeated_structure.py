"""Repeated layers become one subgraph and calls of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

from ..ir.graph import Alias, Graph, Node, Ref, Repeat, Symbol, substitute
from ..ir.structural_hash import Run, find_repeats, graph_hash
from ..ir.types import TupleType, Type
from .module_paths import common_module

T = TypeVar("T")


@dataclass(frozen=True)
class RepeatedStructure:
    """Outline consecutive equal stretches of the graph, found by hashing, and count what is called more than once.

    args:
        min_nodes: shortest stretch that is outlined.
    rewrite:
        ``%a = f(%x, %w0); %b = g(%a); %c = f(%b, %w1); %d = g(%c)`` ->
        ``repeat @repeat_0 x 2``,
        ``graph @repeat_0 { %x = input(); %w0 = input(); %a = f(%x, %w0); %b = g(%a); return (%b) }``,
        ``%call = call(@repeat_0, %x, %w0); %b = getitem(%call, 0); %call_1 = call(@repeat_0, %b, %w1); ...``

    Order is kept. A stretch is left alone where a value in it shares storage with one that some op writes to. Source
    lines, ``forward`` and ``origin`` of the subgraph are those of the first stretch; the call's module path says where
    each copy stands. ``inline-calls`` is the inverse. Torch's nested_compile_region asks the user to mark what is found
    here.
    """

    name: ClassVar[str] = "repeated-structure"
    min_nodes: int = 8

    def apply(self, graph: Graph) -> Graph:
        written = written_storage(graph)
        for run in reversed(find_repeats(graph, self.min_nodes, lambda node: node.name in written)):
            graph = outline(graph, run)
        facts = {**called_repeatedly(graph), **{repeat.name: repeat for repeat in graph.repeats}}
        return replace(graph, repeats=tuple(sorted(facts.values(), key=lambda repeat: repeat.name)))


def called_repeatedly(graph: Graph) -> dict[str, Repeat]:
    """Facts about the subgraphs that are called more than once, such as layers that were captured once."""
    targets = [node.args[0] for node in graph.nodes if node.op == "call" and node.args]
    counts = Counter(target.text.removeprefix("@") for target in targets if isinstance(target, Symbol))
    return {
        name: Repeat(name, count, graph_hash(graph.subgraphs[name]))
        for name, count in counts.items()
        if count > 1 and name in graph.subgraphs
    }


def written_storage(graph: Graph) -> set[str]:
    """Values that share storage with a value that some op writes to, and the ops that write."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while name in parent:
            name = parent[name]
        return name

    for alias in graph.aliases:
        left, right = root(alias.name), root(alias.base)
        if left != right:
            parent[left] = right
    written = {root(alias.base) for alias in graph.aliases if alias.writes}
    return {node.name for node in graph.nodes if root(node.name) in written} if written else set()


def outline(graph: Graph, run: Run) -> Graph:
    """The graph with a run's stretches replaced by calls; unchanged if their data flow cannot share one subgraph."""
    stretches = [
        graph.nodes[run.start + index * run.length : run.start + (index + 1) * run.length] for index in range(run.count)
    ]
    slots = [_external_operands(stretch) for stretch in stretches]
    types = {node.name: node.type for node in graph.nodes}
    if not _facts_fit(graph, stretches) or not _types_agree(slots, types):
        return graph
    groups = _shared_slots(slots)
    results = _results(graph, stretches)
    name = _fresh("repeat_0", set(graph.subgraphs))
    body = _body(graph, name, stretches[0], slots[0], groups, results, types)
    taken = {node.name for node in graph.nodes}
    calls: list[Node] = []
    lost: set[str] = set()
    for stretch, operands in zip(stretches, slots, strict=True):
        arguments = [Ref(operands[group[0]]) for group in groups]
        calls += _call(name, stretch, arguments, results, taken)
        kept = {stretch[index].name for index in results}
        lost |= {node.name for node in stretch if node.name not in kept}
    repeat = Repeat(name, run.count, graph_hash(body))
    inside = {node.name for stretch in stretches for node in stretch}
    aliases = [alias for alias in graph.aliases if alias.name not in inside and alias.base not in lost]
    aliases += _result_aliases(graph, stretches, results)
    order = {node.name: index for index, node in enumerate(graph.nodes)}
    return replace(
        graph,
        nodes=(*graph.nodes[: run.start], *calls, *graph.nodes[run.end :]),
        subgraphs={**graph.subgraphs, name: body},
        repeats=(*graph.repeats, repeat),
        aliases=tuple(sorted(aliases, key=lambda alias: (order[alias.name], order[alias.base]))),
    )


# Inputs and outputs of a stretch -------------------------------------------------------------------------------------


def _external_operands(stretch: Sequence[Node]) -> list[str]:
    """Values from outside that a stretch reads, one for each place where it reads one."""
    inside = {node.name for node in stretch}
    return [name for node in stretch for name in node.operands() if name not in inside]


def _types_agree(slots: Sequence[Sequence[str]], types: dict[str, Type | None]) -> bool:
    """Whether each place reads values of one type in all stretches."""
    return all(len({types[name] for name in column}) == 1 for column in zip(*slots, strict=True))


def _shared_slots(slots: Sequence[Sequence[str]]) -> list[list[int]]:
    """Places grouped into inputs: two places are one input if they read the same value in every stretch."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for place, column in enumerate(zip(*slots, strict=True)):
        groups.setdefault(column, []).append(place)
    return list(groups.values())


def _results(graph: Graph, stretches: Sequence[Sequence[Node]]) -> list[int]:
    """Nodes of the stretch that are read outside of it, in any of the copies."""
    home = {node.name: which for which, stretch in enumerate(stretches) for node in stretch}
    read: set[str] = set(graph.output_names())
    for node in graph.nodes:
        own = home.get(node.name)
        read.update(name for name in node.operands() if home.get(name, own) != own or own is None)
    return [index for index in range(len(stretches[0])) if any(stretch[index].name in read for stretch in stretches)]


def _facts_fit(graph: Graph, stretches: Sequence[Sequence[Node]]) -> bool:
    """Whether every alias fact of a stretch is about an operand, and the facts are alike in all stretches."""
    place = {node.name: (which, index) for which, stretch in enumerate(stretches) for index, node in enumerate(stretch)}
    operands = {node.name: list(node.operands()) for stretch in stretches for node in stretch}
    facts: list[set[tuple[int, int, bool]]] = [set() for _ in stretches]
    for alias in graph.aliases:
        if alias.name in place:
            if alias.base not in operands[alias.name] or alias.writes:
                return False
            which, index = place[alias.name]
            facts[which].add((index, operands[alias.name].index(alias.base), alias.writes))
    return all(fact == facts[0] for fact in facts)


# The subgraph and its calls ------------------------------------------------------------------------------------------


def _body(
    graph: Graph,
    name: str,
    stretch: Sequence[Node],
    operands: Sequence[str],
    groups: Sequence[Sequence[int]],
    results: Sequence[int],
    types: dict[str, Type | None],
) -> Graph:
    """The subgraph, made of the first stretch; its inputs keep the names of the values that the first call passes."""
    taken = {node.name for node in stretch}
    inputs: list[Node] = []
    names: dict[int, str] = {}
    for group in groups:
        value = operands[group[0]]
        fresh = _fresh(value, taken)
        taken.add(fresh)
        names.update(dict.fromkeys(group, fresh))
        inputs.append(Node(fresh, "input", type=types[value], role="input"))
    inside = {node.name for node in stretch}
    place = iter(range(len(operands)))
    nodes: list[Node] = []
    bases: dict[tuple[str, str], str] = {}
    for node in stretch:

        def rename(value: str, reader: str = node.name) -> Ref:
            inner = value if value in inside else names[next(place)]
            bases[reader, value] = inner
            return Ref(inner)

        args = tuple(substitute(argument, rename) for argument in node.args)
        kwargs = tuple((key, substitute(value, rename)) for key, value in node.kwargs)
        nodes.append(replace(node, args=args, kwargs=kwargs, region=None))
    facts = [alias for alias in graph.aliases if alias.name in inside]
    return Graph(
        name=name,
        phase=graph.phase,
        nodes=(*inputs, *nodes),
        outputs=tuple(Ref(stretch[index].name) for index in results),
        subgraphs=_named_in(graph.subgraphs, stretch),
        cascades=_named_in(graph.cascades, stretch),
        aliases=tuple(Alias(alias.name, bases[alias.name, alias.base], alias.writes) for alias in facts),
    )


def _named_in(table: Mapping[str, T], stretch: Sequence[Node]) -> dict[str, T]:
    """Of a graph's subgraphs or cascades, those that the nodes name."""
    texts = {
        text for node in stretch for argument in (*node.args, *(v for _, v in node.kwargs)) for text in _at(argument)
    }
    return {name: entry for name, entry in table.items() if f"@{name}" in texts}


def _at(argument: object) -> list[str]:
    if isinstance(argument, Symbol):
        return [argument.text] if argument.text.startswith("@") else []
    return [text for item in argument for text in _at(item)] if isinstance(argument, tuple) else []


def _call(
    name: str, stretch: Sequence[Node], arguments: Sequence[Ref], results: Sequence[int], taken: set[str]
) -> list[Node]:
    """The call that stands for a stretch, and a getitem under the old name for each of its results."""
    made = _fresh(f"{name}_call", taken)
    taken.add(made)
    returned = [stretch[index] for index in results]
    value_type = TupleType(tuple(node.type for node in returned if node.type is not None))
    place = replace(returned[0].location if returned else stretch[0].location, module=common_module(stretch))
    region = stretch[0].region
    call = Node(made, "call", (Symbol(f"@{name}"), *arguments), type=value_type, location=place, region=region)
    parts = [
        Node(node.name, "getitem", (Ref(made), index), type=node.type, location=node.location,
             forward=node.forward, origin=node.origin, region=region)
        for index, node in enumerate(returned)
    ]  # fmt: skip
    return [call, *parts]


def _result_aliases(graph: Graph, stretches: Sequence[Sequence[Node]], results: Sequence[int]) -> list[Alias]:
    """Alias facts of the getitems: a result that is a view, through any number of steps, of something from outside or
    of an earlier result."""
    bases: dict[str, list[str]] = {}
    for alias in graph.aliases:
        bases.setdefault(alias.name, []).append(alias.base)
    facts = []
    for stretch in stretches:
        inside = {node.name for node in stretch}
        returned = {stretch[index].name for index in results}
        for name in (stretch[index].name for index in results):
            pending, seen = list(bases.get(name, ())), set()
            while pending:
                base = pending.pop()
                if base in seen:
                    continue
                seen.add(base)
                if base in inside and base not in returned:
                    pending += bases.get(base, ())
                else:
                    facts.append(Alias(name, base))
    return facts


def _fresh(name: str, taken: set[str]) -> str:
    """``name``, or the first of ``name_1``, ``name_2``... that is not taken (``repeat_0`` counts on: ``repeat_1``)."""
    if name not in taken:
        return name
    stem, _, number = name.rpartition("_")
    stem, count = (stem, int(number)) if name.startswith("repeat_") and number.isdigit() else (name, 0)
    while f"{stem}_{count + 1}" in taken:
        count += 1
    return f"{stem}_{count + 1}"
