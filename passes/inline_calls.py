"""Calls of subgraphs become the subgraphs' nodes: the inverse of ``repeated-structure``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

from ..errors import VerificationError
from ..ir.graph import Alias, Argument, Graph, Node, Ref, Symbol, references, substitute
from .module_paths import common_module, rebase_module


@dataclass(frozen=True)
class InlineCalls:
    """Replace every ``call`` by the nodes of its subgraph, calls inside it too.

    rewrite:
        ``%c = call(@layer, %x); %b = getitem(%c, 0)`` -> ``%b = f(%x)``

    A value that a getitem read keeps the getitem's name; others get the subgraph's name, counted on where it is taken.
    Module paths are moved from the subgraph's common module to the call's. Subgraphs of higher-order ops stay.
    """

    name: ClassVar[str] = "inline-calls"

    def apply(self, graph: Graph) -> Graph:
        if not any(node.op == "call" for node in graph.nodes):
            return graph
        return _Inliner(graph).run()


@dataclass
class _Inliner:
    graph: Graph
    nodes: list[Node] = field(default_factory=list)
    aliases: list[Alias] = field(default_factory=list)
    subgraphs: dict[str, Graph] = field(default_factory=dict)
    #: What to read instead of a value of the graph: parts of calls.
    moved: dict[str, Argument] = field(default_factory=dict)
    #: Call -> what it returns.
    returned: dict[str, tuple[Argument, ...]] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    bodies: dict[str, Graph] = field(default_factory=dict)

    def run(self) -> Graph:
        graph = self.graph
        self.taken = {node.name for node in graph.nodes}
        called = {name for node in graph.nodes if node.op == "call" and (name := _called(node))}
        self.subgraphs = {name: subgraph for name, subgraph in graph.subgraphs.items() if name not in called}
        dropped: set[str] = set()
        names = self.part_names()
        for node in graph.nodes:
            if node.op == "call":
                self.call(node, names.get(node.name, {}))
                dropped.add(node.name)
            elif node.op == "getitem" and isinstance(node.args[0], Ref) and node.args[0].name in self.returned:
                index = node.args[1]
                value = self.returned[node.args[0].name][index if isinstance(index, int) else 0]
                if value != Ref(node.name):
                    self.moved[node.name] = value
                dropped.add(node.name)
            else:
                self.nodes.append(self.renamed(node, self.value))
        kept = [alias for alias in graph.aliases if alias.name not in dropped]
        self.aliases += [
            Alias(alias.name, base.name, alias.writes)
            for alias in kept
            if isinstance(base := self.value(alias.base), Ref) and base.name not in self.returned
        ]
        outputs = tuple(substitute(output, self.value) for output in graph.outputs)
        order = {node.name: index for index, node in enumerate(self.nodes)}
        aliases = sorted(self.aliases, key=lambda alias: (order[alias.name], order[alias.base]))
        return replace(
            graph,
            nodes=tuple(self.nodes),
            outputs=outputs,
            aliases=tuple(aliases),
            subgraphs=self.subgraphs,
            repeats=tuple(repeat for repeat in graph.repeats if repeat.name not in called),
        )

    def part_names(self) -> dict[str, dict[int, str]]:
        """Call -> its part -> the first getitem that reads it."""
        names: dict[str, dict[int, str]] = {}
        for node in self.graph.nodes:
            if node.op == "getitem" and isinstance(node.args[0], Ref) and isinstance(node.args[1], int):
                names.setdefault(node.args[0].name, {}).setdefault(node.args[1], node.name)
        return names

    def value(self, name: str) -> Argument:
        return self.moved.get(name, Ref(name))

    def renamed(self, node: Node, rename: Callable[[str], Argument]) -> Node:
        args = tuple(substitute(argument, rename) for argument in node.args)
        kwargs = tuple((key, substitute(value, rename)) for key, value in node.kwargs)
        return replace(node, args=args, kwargs=kwargs)

    def call(self, node: Node, names: dict[int, str]) -> None:
        """Append the nodes of the called subgraph."""
        body = self.body(node)
        arguments = [substitute(argument, self.value) for argument in node.args[1:]]
        inputs = body.inputs
        inner: dict[str, Argument] = {i.name: argument for i, argument in zip(inputs, arguments, strict=True)}
        wanted = self.wanted_names(body, names)
        home = common_module(body.nodes)
        for made in body.nodes:
            if made.op == "input":
                continue
            name = wanted.get(made.name) or self.fresh(made.name)
            module = rebase_module(made.location.module, home, node.location.module)
            moved = replace(made, name=name, location=replace(made.location, module=module), region=node.region)
            self.nodes.append(self.renamed(moved, inner.__getitem__))
            inner[made.name] = Ref(name)
        for alias in body.aliases:
            value, base = inner[alias.name], inner[alias.base]
            if isinstance(value, Ref) and isinstance(base, Ref):
                self.aliases.append(Alias(value.name, base.name, alias.writes))
        self.returned[node.name] = tuple(substitute(output, inner.__getitem__) for output in body.outputs)

    def body(self, node: Node) -> Graph:
        """The called subgraph with its own calls inlined."""
        name = _called(node)
        if name not in self.graph.subgraphs:
            raise VerificationError(
                f"%{node.name} of graph @{self.graph.name} calls no subgraph", remedy="verify the graph first"
            )
        if name not in self.bodies:
            self.bodies[name] = InlineCalls().apply(self.graph.subgraphs[name])
            for key, subgraph in self.bodies[name].subgraphs.items():
                self.subgraphs.setdefault(key, subgraph)
        return self.bodies[name]

    def wanted_names(self, body: Graph, names: dict[int, str]) -> dict[str, str]:
        """Value of the body -> the name of the getitem that reads it."""
        wanted: dict[str, str] = {}
        inputs = {node.name for node in body.inputs}
        for index, output in enumerate(body.outputs):
            for value in references(output):
                if index in names and value not in inputs:
                    wanted.setdefault(value, names[index])
        return wanted

    def fresh(self, name: str) -> str:
        made, count = name, 0
        while made in self.taken:
            count += 1
            made = f"{name}_{count}"
        self.taken.add(made)
        return made


def _called(node: Node) -> str:
    """Name of the subgraph that a call names, or an empty string."""
    target = node.args[0] if node.args else None
    return target.text[1:] if isinstance(target, Symbol) and target.text.startswith("@") else ""
