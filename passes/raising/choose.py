"""Which groups of Einsums become one kernel each.

A component is taken as a whole, with all its stages (a forward and its backward): its wide tensors are then never in
memory. It is taken where every stage can be rewritten to one pass and the time that the rates predict falls enough, or
where far less memory is needed and dependent reductions make Inductor keep the wide tensor anyway. What is refused is
reported with the reason.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

import sympy

from ...ir.cascade import Cascade, Equal, NotEqual, accesses, rank, ranks_of, tensor_name
from ...ir.graph import Graph, Location
from ...ir.types import TensorType
from ..cascade_analysis import group_of, rank_passes
from ..contraction_exchange import exchange
from ..effects import has_effect
from ..rewrite_cascade import Rewriting, rewrite, without_unread
from .components import Component, Space, components
from .emit import Tensor, elements
from .extract import Extracted, Surroundings, extract
from .group import Group, Rest, Traffic
from .guards import prepare
from .nested_sums import merge_nested_sums
from .partial_sums import Part, with_partial_sums
from .program import PRECISION
from .raise_graph import Raised
from .ranks import unify_ranks
from .stages import Level, Stage, Staging
from .traffic import element_bytes, operations, traffic

#: Rounds in which ops outside that need parts of a component's wide tensors are taken into it.
_MAX_ABSORBED = 4
#: A stage whose rewritten form still needs another pass is cut there, at most this many times.
_MAX_CUTS = 3
#: Exchange compares all sums of a component with each other; beyond this many Einsums it is not tried.
_MAX_EXCHANGE = 60


@dataclass(frozen=True)
class Rates:
    """What is compared: operations a second in a library's matrix product and in a fused kernel, bytes a second from
    memory. The defaults are of the order of two cores with AVX-512; ``from_device`` in the cost model's figures."""

    library: float = 4e11
    fused: float = 4e11
    bandwidth: float = 2e10


@dataclass(frozen=True)
class Choice:
    """``gain``: least ratio of predicted times. ``wide_bytes`` and ``memory_ratio``: a component whose dependent
    reductions keep at least so many bytes of wide tensors, so many times what must be moved anyway, is taken for the
    memory that it saves. ``saved_bytes``: least traffic that a component must save at all."""

    rates: Rates = Rates()
    gain: float = 1.2
    wide_bytes: int = 16 << 20
    memory_ratio: float = 1.5
    saved_bytes: int = 1 << 18


@dataclass(frozen=True)
class Refused:
    """Why a component (named by its largest tensor) stays as it is."""

    tensor: str
    why: str
    location: Location = Location()


@dataclass(frozen=True)
class Chosen:
    groups: tuple[Group, ...]
    refused: tuple[Refused, ...]


@lru_cache(maxsize=512)
def rewritten(cascade: Cascade) -> Rewriting:
    """``rewrite``, once for all equal cascades: equal layers have equal ones."""
    return rewrite(cascade)


@dataclass
class _Candidate:
    component: Component
    stages: list[Stage]
    space: Space
    tensors: dict[str, Tensor]
    extracted: list[Extracted] = field(default_factory=list)
    traffic: list[Traffic] = field(default_factory=list)
    parts: list[list[Part]] = field(default_factory=list)


def choose(raised: Raised, choice: Choice | None = None) -> Chosen:
    """The groups of a raised graph, in the order of its nodes."""
    return _Chooser(raised, choice or Choice()).run()


class _Chooser:
    def __init__(self, raised: Raised, choice: Choice) -> None:
        self.raised, self.choice = raised, choice
        self.graph: Graph = raised.graph
        self.types = {node.name: node.type for node in self.graph.nodes}
        self.position = {node.name: number for number, node in enumerate(self.graph.nodes)}
        leaves = {name: elements(tensor.sizes) for name, tensor in raised.tensors.items()}
        self.space = Space(raised.cascade.einsums, raised.sizes, leaves)
        self.needed = raised.needed
        self.rank_sizes = {rank(name): size for name, size in raised.raw_sizes.items()}
        self.operands = [tuple(node.operands()) for node in self.graph.nodes]
        self.effects = [node.name for node in self.graph.nodes if has_effect(node, self.graph)]
        self.refused: list[Refused] = []

    def run(self) -> Chosen:
        taken: set[str] = set()
        accepted: list[_Candidate] = []
        for component in components(self.space):
            if taken & set(component.core):
                continue
            try:
                candidate = self._candidate(component)
            except _Refusal as refusal:
                self._refuse(component, str(refusal))
                continue
            accepted.append(candidate)
            taken |= {einsum.output for stage in candidate.stages for einsum in stage.einsums}
        groups = [group for candidate in accepted for group in self._groups(candidate)]
        groups.sort(key=lambda group: min(self.position.get(name, 0) for name in group.nodes))
        return Chosen(tuple(groups), tuple(self.refused))

    def _refuse(self, component: Component, why: str) -> None:
        name = max(component.wide, key=lambda each: (self.space.tensor_elements(each), each))
        line = self.space.writer[name].line
        self.refused.append(Refused(name, why, self.graph.nodes[line].location))

    # One component ---------------------------------------------------------------------------------------------------

    def _candidate(self, component: Component) -> _Candidate:
        self._hopeless(component)
        for _ in range(_MAX_ABSORBED):
            found = self._staged(*self._prepared(component))
            leaks = self._leaks(found)
            if not leaks:
                self._decide(found)
                return found
            core = set(component.core) | leaks
            component = replace(component, core=tuple(e.output for e in self.space.einsums if e.output in core))
        raise _Refusal("too many ops outside of it need parts of its wide tensors")

    def _staged(self, component: Component, space: Space, tensors: dict[str, Tensor]) -> _Candidate:
        """The component's stages, cut until each is rewritten to one pass."""
        delays: dict[str, Level] = {}
        for _ in range(_MAX_CUTS):
            staging = Staging(self.graph, self.operands, space, tensors, component, delays, self.needed)
            found = _Candidate(component, staging.run(), space, tensors)
            later = self._evaluate(found)
            if not later:
                return found
            for name, level in later.items():
                delays[name] = max(level, delays.get(name, level))
        raise _Refusal("after each cut into passes, another one was needed")

    def _leaks(self, candidate: _Candidate) -> set[str]:
        """Einsums outside of the component whose ops need an op of it that is no result (a column of a joined tensor):
        they have to be done by it too."""
        covered = {e.line for stage in candidate.stages for e in stage.einsums if e.output in stage.own}
        names = [*(name for each in candidate.extracted for name in each.results)]
        names += [part.whole for parts in candidate.parts for part in parts]
        results = {self.value_name(candidate.tensors[name]) for name in names}
        by_line: dict[int, set[str]] = {}
        for einsum in candidate.space.einsums:
            by_line.setdefault(einsum.line, set()).add(einsum.output)
        operands = {self.value_name(candidate.tensors[n]) for each in candidate.extracted for n in each.operands}
        waiting: list[tuple[str, int | None]] = [(name, None) for name in (*self.graph.output_names(), *operands)]
        waiting += [(name, None) for name in self.effects]
        seen: set[tuple[str, int | None]] = set()
        leaks: set[str] = set()
        while waiting:
            name, owner = waiting.pop()
            at = self.position.get(name)
            if at is None or name in results or (name, owner) in seen:
                continue
            seen.add((name, owner))
            if at in covered:
                if owner is None:
                    raise _Refusal(f"%{name} is needed as such")
                leaks |= by_line[owner]
                continue
            # An op that is only a view, or is written into its readers, hands the question on to its reader.
            mine = at if at in by_line else owner
            if self.raised.tensors.get(self.raised.tensor_of.get(name, ""), _NO_TENSOR).leaf:
                mine = None
            waiting += [(operand, mine) for operand in self.operands[at]]
        return leaks

    def _hopeless(self, component: Component) -> None:
        """Refuse at once what cannot gain enough even if all of its traffic were saved."""
        core = [self.space.writer[name] for name in component.core]
        tensors = self.raised.tensors
        moved = 0
        for einsum in core:
            names = {einsum.output} | {tensor_name(item) for item in einsum.reads}
            moved += sum(self.space.tensor_elements(name) * element_bytes(tensors[name]) for name in names)
        work = operations(core, self.space)
        rates, choice = self.choice.rates, self.choice
        if moved < choice.saved_bytes:
            raise _Refusal(f"it moves {moved} bytes only")
        before, least = work / rates.library + moved / rates.bandwidth, work / rates.fused
        if before < choice.gain * least and _most_passes_over(Cascade(tuple(core)), component.pair) == 1:
            raise _Refusal(f"{work / 1e9:.3g} GFLOP to {moved / 1e6:.3g} MB: computing, not memory, takes the time")

    def _prepared(self, component: Component) -> tuple[Component, Space, dict[str, Tensor]]:
        """The component with sums opened and contractions exchanged (attention's delta), in ranks that only its own
        tensors tie together."""
        core = set(component.core)
        prepared, parts = prepare([e for e in self.raised.raw if e.output in core], component.wide)
        changed = {einsum.output: einsum for einsum in prepared}
        einsums = []
        for einsum in self.raised.raw:
            einsums += [changed[part] for part, whole in parts.items() if whole == einsum.output]
            einsums.append(changed.get(einsum.output, einsum))
        inside = [einsum for einsum in einsums if einsum.output in core or einsum.output in parts]
        own, _ = unify_ranks(inside, self.rank_sizes, core | set(parts))
        if len(core) <= _MAX_EXCHANGE:
            own = list(exchange(Cascade(tuple(own)), always=True)[0].einsums)
        table = {einsum.output: einsum for einsum in own}
        named = [table.get(einsum.output, einsum) for einsum in einsums]
        tensors = {**self.raised.tensors}
        for part, whole in parts.items():
            tensors[part] = replace(tensors[whole], name=part, nodes=(), leaf=False)
        named = list(without_unread(Cascade(tuple(named)), self.needed).einsums)
        order = tuple(einsum.output for einsum in named if einsum.output in core or einsum.output in parts)
        component = replace(component, wide=component.wide & frozenset(order))
        return replace(component, core=order), Space(named, self.raised.raw_sizes, self.space.leaf_elements), tensors

    def _evaluate(self, candidate: _Candidate) -> dict[str, Level]:
        """Extract and rewrite every stage. What must be put off to a later stage, if anything must."""
        candidate.extracted, candidate.traffic, candidate.parts = [], [], []
        around = self._surroundings(candidate)
        for stage in candidate.stages:
            _refuse_exact_comparisons(stage, candidate.tensors)
            wanted = self._wanted(stage, candidate)
            named, _ = unify_ranks(stage.einsums, self.rank_sizes, {einsum.output for einsum in stage.einsums})
            merged = merge_nested_sums(named, wanted)
            einsums, wanted, parts = with_partial_sums(merged, wanted, candidate.space)
            for part in parts:
                self._add_part(part, candidate)
            extracted = extract(einsums, wanted, around)
            rewriting = rewritten(extracted.fused.cascade)
            lost = [name for name in wanted if extracted.names[name] not in rewriting.cascade.definitions]
            if lost:
                extracted = extract(einsums, wanted, around, lost)
                rewriting = rewritten(extracted.fused.cascade)
            late = _late(extracted, rewriting, candidate.component)
            if late:
                # What is wide is computed again where it is read, unless it is a result.
                again = candidate.component.wide - set(wanted)
                put_off = (late & stage.own) - again
                if not put_off or put_off >= stage.own - again:
                    raise _Refusal(f"{', '.join(sorted(late))} needs another pass over what is computed again")
                return dict.fromkeys(put_off, (stage.level[0], stage.level[1] + 1))
            candidate.extracted.append(extracted)
            candidate.parts.append(parts)
            candidate.traffic.append(traffic(stage, wanted, candidate.space, candidate.tensors))
        return {}

    def _add_part(self, part: Part, candidate: _Candidate) -> None:
        """Note the tensor of a partial sum: in float32 at least, whatever the sum is rounded to."""
        whole = candidate.tensors[part.whole]
        sizes = tuple(candidate.space.sizes[symbol.name] for symbol in part.indices)
        dtype = "f32" if whole.dtype in ("bf16", "f16") else whole.dtype
        candidate.tensors[part.part] = Tensor(part.part, (), dtype, sizes, (1,) * len(sizes), False)

    def _wanted(self, stage: Stage, candidate: _Candidate) -> list[str]:
        """Tensors of the stage that something outside needs, in order."""
        own = {einsum.output for einsum in stage.einsums}
        others = {einsum.output: einsum for other in candidate.stages if other is not stage for einsum in other.einsums}
        again = candidate.component.wide
        read = {tensor_name(item) for einsum in others.values() for item in einsum.reads} - again
        inside = own | set(others)
        read |= {tensor_name(i) for e in candidate.space.einsums if e.output not in inside for i in e.reads}
        order = [einsum.output for einsum in stage.einsums if einsum.output in stage.own]
        return [name for name in order if name in read or name in self.needed]

    def _surroundings(self, candidate: _Candidate) -> Surroundings:
        order = {}
        for name, tensor in candidate.tensors.items():
            writer = candidate.space.writer.get(name)
            order[name] = writer.line if writer is not None else self.position.get(next(iter(tensor.nodes), ""), 0)
        return Surroundings(candidate.tensors, candidate.space.sizes, lambda name: self._type(candidate.tensors[name]), order)

    def _type(self, tensor: Tensor) -> TensorType:
        found = self.types.get(tensor.nodes[0]) if tensor.nodes else None
        return found if isinstance(found, TensorType) else TensorType(tensor.dtype, tensor.shape)

    def _decide(self, candidate: _Candidate) -> None:
        """Raise ``_Refusal`` unless the component is worth it."""
        rates, choice = self.choice.rates, self.choice
        total = candidate.traffic
        saved = sum(t.written - t.fused for t in total)
        before = sum(t.flops_written / rates.library + t.written / rates.bandwidth for t in total)
        after = sum(t.flops_fused / rates.fused + t.fused / rates.bandwidth for t in total)
        if saved < choice.saved_bytes:
            raise _Refusal(f"it would save {saved} bytes only")
        if before >= choice.gain * after:
            return
        wide = self._wide_bytes(candidate)
        core = [self.space.writer[name] for name in candidate.component.core if name in self.space.writer]
        if _most_passes_over(Cascade(tuple(core)), candidate.component.pair) > 1 and wide >= choice.wide_bytes and wide >= choice.memory_ratio * sum(t.compulsory for t in total):
            return
        raise _Refusal(f"predicted {before * 1e3:.3g} ms as written, {after * 1e3:.3g} ms fused")

    def _wide_bytes(self, candidate: _Candidate) -> int:
        """Bytes of wide tensors that are in memory as written: those that a product or several Einsums read."""
        total = 0
        for name in candidate.component.wide:
            readers = candidate.space.readers.get(name, ())
            if len(readers) > 1 or any(reader.reduction for reader in readers):
                total += candidate.space.tensor_elements(name) * element_bytes(candidate.tensors[name])
        return total

    # Groups ----------------------------------------------------------------------------------------------------------

    def _groups(self, candidate: _Candidate) -> list[Group]:
        groups = []
        for number, stage in enumerate(candidate.stages):
            extracted, moved = candidate.extracted[number], candidate.traffic[number]
            fused = extracted.fused
            kept = [frozenset(view.ranks) for view in fused.outputs]
            wide = [extracted.names[e.output] for e in stage.einsums if e.output in candidate.component.wide and e.output in extracted.names]
            spaces = [fused.cascade.definitions[name].kept for name in wide if name in fused.cascade.definitions]
            walked = dict.fromkeys(symbol for space in spaces for symbol in space)
            grid = tuple(symbol for symbol in walked if all(symbol in ranks for ranks in kept))
            streamed = tuple(symbol for symbol in walked if symbol not in grid)
            lines = sorted({einsum.line for einsum in stage.einsums if einsum.output in stage.own})
            nodes = tuple(self.graph.nodes[line].name for line in lines)
            location = next((self.graph.nodes[line].location for line in lines if self.graph.nodes[line].location), None)
            groups.append(
                Group(
                    name=_group_name(nodes),
                    fused=fused,
                    operands=tuple(self.value_name(candidate.tensors[name]) for name in extracted.operands),
                    results=tuple(self.value_name(candidate.tensors[name]) for name in extracted.results),
                    nodes=nodes,
                    rewriting=rewritten(fused.cascade),
                    grid=grid,
                    streamed=streamed,
                    wide=tuple(wide),
                    traffic=moved,
                    rounded=_rounded(stage, candidate.tensors),
                    location=location or Location(),
                    rests=tuple(
                        Rest(
                            self.value_name(candidate.tensors[part.whole]),
                            self.value_name(candidate.tensors[part.part]),
                            part.count,
                        )
                        for part in candidate.parts[number]
                    ),
                )
            )
        return groups

    @staticmethod
    def value_name(tensor: Tensor) -> str:
        """The graph value that a tensor is; a name of its own for one inside an op."""
        return tensor.nodes[0] if tensor.nodes else f"cascade_{tensor.name}"


class _Refusal(Exception):
    """A component stays as it is; the message says why."""


_NO_TENSOR = Tensor("", (), "", (), (), False)


def _refuse_exact_comparisons(stage: Stage, tensors: Mapping[str, Tensor]) -> None:
    """``S == max(S)``: a kernel that computes S again rounds it in another way, and finds no equal element."""
    for einsum in stage.einsums:
        for node in einsum.body.atoms(Equal, NotEqual):
            sides = [{tensor_name(item) for item in accesses(side)} for side in node.args]
            if all(any(tensors[name].dtype in PRECISION for name in side) for side in sides):
                raise _Refusal(f"{einsum.output} compares computed numbers for equality")


def _group_name(nodes: Collection[str]) -> str:
    return f"cascade_{next(iter(nodes))}"


def _rounded(stage: Stage, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    narrow = ("bf16", "f16", "f8e4m3", "f8e5m2")
    names = [einsum.output for einsum in stage.einsums if tensors[einsum.output].dtype in narrow]
    return tuple(node for name in names for node in tensors[name].nodes[:1])


def _wide_ranks(extracted: Extracted, component: Component) -> list[sympy.Symbol]:
    cascade = extracted.fused.cascade
    found: dict[sympy.Symbol, None] = {}
    for name, new in extracted.names.items():
        if name in component.wide and new in cascade.definitions:
            found.update(dict.fromkeys(cascade.definitions[new].kept))
    return list(found)


def _late(extracted: Extracted, rewriting: Rewriting, component: Component) -> set[str]:
    """Tensors (of the raised cascade) that a later pass of the rewritten stage writes over a rank of the wide ones."""
    back = {new: name for name, new in extracted.names.items()}
    found: set[str] = set()
    for symbol in _wide_ranks(extracted, component):
        levels = rank_passes(rewriting.cascade, group_of(rewriting.cascade, symbol))
        for position, level in levels.einsum.items():
            einsum = rewriting.cascade.einsums[position]
            walks = any(ranks_of(index) & levels.group for item in einsum.reads for index in item.args)
            if level > 1 and walks:
                found.add(_origin(einsum.output, back))
    return {name for name in found if name}


def _origin(name: str, back: Mapping[str, str]) -> str:
    """The tensor as written that a tensor of the rewritten cascade belongs to."""
    best = max((each for each in back if name == each or name.startswith(f"{each}_")), key=len, default="")
    return back.get(best, "")


def _most_passes_over(cascade: Cascade, ranks: Collection[sympy.Symbol]) -> int:
    """Most passes over one of the ranks."""
    levels = [rank_passes(cascade, group_of(cascade, symbol)).einsum.values() for symbol in ranks]
    return max((level for found in levels for level in found), default=1)


__all__ = ["Choice", "Chosen", "Rates", "Refused", "choose", "rank", "rewritten"]
