"""Where a value of a planned graph lives: the steps that compute it, and the memory that holds it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from ..ir.graph import Graph, Node, Ref
from ..ir.plan import Buffer, Plan, Step
from .lineage import Place, scopes


@dataclass(frozen=True)
class Residence:
    """``how``: computed, view (of ``owner``), inside (the kernels of its readers), given (an input), or unknown.

    ``buffers`` hold the value, or ``owner``'s, of which it is a view or in whose kernel it lives in registers.
    """

    how: str
    owner: str
    steps: tuple[Step, ...] = ()
    buffers: tuple[Buffer, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether both the kernel and the address of a computed value are known."""
        return self.how == "given" or bool(self.steps and self.buffers)


@dataclass(eq=False)
class Scope:
    """One graph or subgraph, with what is asked of it often."""

    graph: Graph

    @functools.cached_property
    def nodes(self) -> dict[str, Node]:
        return self.graph.by_name()

    @functools.cached_property
    def users(self) -> dict[str, list[str]]:
        return {name: [node.name for node in nodes] for name, nodes in self.graph.users().items()}

    @functools.cached_property
    def bases(self) -> dict[str, str]:
        """View -> what it is a view of, by the alias facts."""
        found: dict[str, str] = {}
        for alias in self.graph.aliases:
            if not alias.writes:
                found.setdefault(alias.name, alias.base)
        return found

    def owner(self, node: Node) -> Node:
        """The node whose memory a value lies in: through views and parts of results."""
        seen: set[str] = set()
        while node.name not in seen:
            seen.add(node.name)
            base = self.bases.get(node.name)
            if base is None and node.op == "getitem" and node.args and isinstance(node.args[0], Ref):
                base = node.args[0].name
            if base is None or base not in self.nodes:
                return node
            node = self.nodes[base]
        return node


@dataclass(eq=False)
class PlannedGraph:
    """One graph of a plan with what of the plan belongs to it. ``name`` is the graph's name in the plan."""

    plan: Plan
    name: str
    graph: Graph

    @functools.cached_property
    def scopes(self) -> dict[str, Scope]:
        return {path: Scope(graph) for path, graph in scopes(self.graph).items()}

    @functools.cached_property
    def steps(self) -> list[Step]:
        """Its steps; those of graphs that it encloses (a forward inside another's) are theirs."""
        ranges = sorted(self.plan.graphs, key=lambda entry: entry.last_step - entry.first_step)
        mine = []
        for position, step in enumerate(self.plan.steps):
            owner = next((each.name for each in ranges if each.first_step <= position <= each.last_step), "")
            if owner == self.name and (step.region or step.ops):
                mine.append(step)
        return mine

    @functools.cached_property
    def by_op(self) -> dict[tuple[str, str], list[Step]]:
        """(name of the graph or subgraph, op) -> the steps that compute it, one for each call."""
        found: dict[tuple[str, str], list[Step]] = {}
        for step in self.steps:
            for op in step.ops:
                found.setdefault((self._owner_of(step), op), []).append(step)
        return found

    def _owner_of(self, step: Step) -> str:
        """Name of the graph or subgraph whose region the step runs."""
        return step.region.rpartition(".")[0] or self.graph.name

    @functools.cached_property
    def buffers(self) -> dict[int, Buffer]:
        return {buffer.id: buffer for buffer in self.plan.buffers}

    @functools.cached_property
    def _touched(self) -> list[Buffer]:
        """Buffers that its steps read or write."""
        used = {identity: None for step in self.steps for identity in (*step.writes, *step.reads)}
        return [self.buffers[identity] for identity in used if identity in self.buffers]

    def residence(self, place: Place) -> Residence:
        """Where the value lives. Of a repeated layer's value there is a step and a buffer for each call."""
        scope, name = place
        here = self.scopes.get(scope)
        node = here.nodes.get(name) if here is not None else None
        if here is None or node is None:
            return Residence("unknown", name)
        graph, owner = here.graph, here.owner(node)
        if owner.op == "input":
            return Residence("given", owner.name, (), self._given(owner))
        if owner.op == "call":
            inner = self._through(scope, graph, owner, node)
            return inner if inner is not None else Residence("unknown", owner.name)
        computed = self.by_op.get((graph.name, owner.name), [])
        how = "computed" if owner.name == name or node.op == "getitem" else "view"
        if not computed:
            readers, how = self._readers(here, owner), "inside"
            computed = [step for reader in readers for step in self.by_op.get((graph.name, reader), [])]
        if not computed:  # the code of its region names no ops
            computed = [step for step in self.steps if not step.ops and self._owner_of(step) == graph.name]
        steps = tuple(dict.fromkeys(computed))
        return Residence(how, owner.name, steps, self._held(owner, node, steps))

    def _through(self, scope: str, graph: Graph, call: Node, node: Node) -> Residence | None:
        """Of a call's result: where the subgraph makes it."""
        target = str(getattr(call.args[0], "text", "")).removeprefix("@") if call.args else ""
        body = graph.subgraphs.get(target)
        index = node.args[1] if node.op == "getitem" and len(node.args) == 2 else 0
        if body is None or not isinstance(index, int) or index >= len(body.outputs):
            return None
        output = body.outputs[index]
        inner = f"{scope}/{target}" if scope else target
        return self.residence((inner, output.name)) if isinstance(output, Ref) else None

    def _given(self, owner: Node) -> tuple[Buffer, ...]:
        names = {owner.name, owner.location.module} - {""}
        return tuple(buffer for buffer in self.plan.buffers if buffer.name in names)

    def _readers(self, here: Scope, owner: Node) -> list[str]:
        """The nearest ops that steps name among those that read the value, through ops that live in registers too."""
        waiting, seen, found = [owner.name], {owner.name}, []
        while waiting:
            for reader in here.users.get(waiting.pop(0), ()):
                if reader in seen:
                    continue
                seen.add(reader)
                if (here.graph.name, reader) in self.by_op:
                    found.append(reader)
                else:
                    waiting.append(reader)
        return found

    def _held(self, owner: Node, node: Node, steps: Sequence[Step]) -> tuple[Buffer, ...]:
        touched = {identity: None for step in steps for identity in (*step.writes, *step.reads)}
        index = node.args[1] if node.op == "getitem" and len(node.args) == 2 else 0
        names = {owner.name, f"{owner.name}.{index}", node.name}
        near = [self.buffers[identity] for identity in touched if identity in self.buffers]
        exact = [buffer for buffer in near if buffer.name in names or buffer.name.split(" ")[0] in names]
        # A kernel that works in place does not always say that it touches its result's memory.
        exact = exact or [buffer for buffer in self._touched if buffer.name in names]
        if exact:
            return tuple(exact)
        # In registers: what its kernel writes, or works on in place.
        written = {identity: None for step in steps for identity in step.writes}
        held = [self.buffers[identity] for identity in written if identity in self.buffers]
        return tuple(held or self._in_place(steps))

    def _in_place(self, steps: Sequence[Step]) -> list[Buffer]:
        """What kernels that name no memory work on: buffers that their region made before and that live on."""
        places = {step.id: position for position, step in enumerate(self.plan.steps)}
        regions = {step.region for step in steps}
        made = {identity for step in self.steps if step.region in regions for identity in (*step.reads, *step.writes)}
        moments = [places[step.id] for step in steps]
        return [
            buffer
            for buffer in self._touched
            if buffer.id in made
            and buffer.role in ("scratch", "workspace", "saved", "output")
            and any(buffer.lower <= moment < buffer.upper for moment in moments)
        ]
