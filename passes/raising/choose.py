"""Which groups of Einsums become one kernel each.

A component is taken as a whole, with all its stages (a forward and its backward): its wide tensors are then never in
memory. It is taken where every stage can be rewritten to one pass and the time that the rates predict falls enough, or
where far less memory is needed and dependent reductions make Inductor keep the wide tensor anyway. Where a library in
chunks of rows is predicted to be faster than such kernels, all stages are done together that way (``chunked``). What is
refused is reported with the reason.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import sympy

from ...cost_model.devices import Device
from ...cost_model.tile_cost import ALIKE
from ...ir.cascade import Cascade, rank
from ...ir.fused_cascade import FusedCascade
from ...ir.graph import Graph, Location
from ...ir.plan import Decision
from ...logs import logger
from ..cascade_analysis import group_of, rank_passes
from ..rewrite_cascade import Rewriting
from .candidates import Candidate, Candidates, NotFused, rewritten, value_name
from .chunked import Chunked, chunked
from .components import Component, components
from .emit import Tensor
from .fusion_choice import Offer, Offers, Variants, choose_offers, left_as_written, once_each
from .group import Group, Rest, Traffic
from .own_copies import with_own_copies
from .raise_graph import Raised
from .run_order import RunOrder
from .stages import Stage
from .traffic import INDEXED, SEARCHED, TablePrices, element_bytes, is_contraction

_log = logger("cascades")

#: Types that kernels for CPUs turn into f32 when they read them.
_HALF = ("bf16", "f16")
#: A place that is not known.
_NOWHERE = Location()


@dataclass(frozen=True)
class Rates:
    """What is compared: operations a second in a library's matrix product and in a fused kernel, on f32 and (dtype,
    library, fused) on ``others``; bytes a second from memory and, for what fits into it, from each cache: (its bytes,
    bytes a second), the smallest first; what tables cost in a fused kernel. The defaults are of the order of two cores
    with AVX-512."""

    library: float = 4e11
    fused: float = 4e11
    bandwidth: float = 2e10
    caches: tuple[tuple[float, float], ...] = ()
    tables: TablePrices = INDEXED
    others: tuple[tuple[str, float, float], ...] = ()

    @classmethod
    def of(cls, device: Device) -> Rates:
        library, fused = device.efficiency_of("gemm"), device.efficiency_of("cascade")
        peak = device.matrix_rate("f32")
        kinds = sorted({*device.matrix, *_HALF, "f64"} - {"f32", "tf32"})
        made_in = {kind: "f32" if device.kind == "cpu" and kind in _HALF else kind for kind in kinds}
        caches = sorted((cache.bytes.value, max(cache.bandwidth.value, device.bandwidth)) for cache in device.caches)
        memory = device.efficiency_of("memory")
        return cls(
            peak * library,
            peak * fused,
            device.bandwidth * memory,
            tuple((size, rate * memory) for size, rate in caches),
            INDEXED if device.kind == "cpu" else SEARCHED,
            tuple((k, device.matrix_rate(k) * library, device.matrix_rate(own) * fused) for k, own in made_in.items()),
        )

    def moving(self, moved: float, together: float) -> float:
        """Seconds to move so many bytes, of which so many are touched ``together``."""
        return moved / next((rate for size, rate in self.caches if together <= size), self.bandwidth)

    def written(self, t: Traffic) -> float:
        """Seconds that a stage takes as it is written."""
        counted = t.flops_written + t.tables_written
        return self._seconds(counted, _as_written(t), fused=False) + self.moving(t.written, t.largest)

    def products(self, t: Traffic) -> float:
        """Seconds that a library takes for a stage's products."""
        return self._seconds(t.flops_written, _as_written(t), fused=False)

    def products_at_least(self, t: Traffic) -> float:
        """The same in a fused kernel that makes none of them twice."""
        return self._seconds(t.flops_written, _as_written(t), fused=True)

    def kernels(self, t: Traffic) -> float:
        """Seconds that a stage's products and tables take in a fused kernel."""
        return self._seconds(t.flops_fused, {kind: count for kind, _, count in t.other}, fused=True)

    def _seconds(self, operations: int, other: Mapping[str, int], *, fused: bool) -> float:
        """Of so many operations, of which ``other`` are on other types than f32."""
        plain = self.fused if fused else self.library
        rates = {kind: in_kernel if fused else library for kind, library, in_kernel in self.others}
        parts = (count / rates.get(kind, plain) for kind, count in other.items())
        return (operations - sum(other.values())) / plain + math.fsum(parts)

    def library_of(self, dtype: str) -> float:
        """Operations a second of a library's products of such operands."""
        return next((library for kind, library, _ in self.others if kind == dtype), self.library)


@dataclass(frozen=True)
class Choice:
    """``gain``: least ratio of predicted times. ``wide_bytes`` and ``memory_ratio``: a component whose dependent
    reductions keep a wide tensor of at least so many bytes, so many times what must be moved anyway, is taken for the
    memory that it saves. ``saved_bytes``: least traffic that a component must save at all. ``chunk_bytes``: of
    a wide tensor, where a component is done in chunks; 0 for never. The caller must know ``Group.early``.
    ``variants``: the ways to generate a group's kernel; without, its generator's rules decide. ``price``: seconds of a
    group's kernel by what its generator makes of it, None where that is not known; then the rates of the component must
    promise ``gain``, and the prices be below by ``ALIKE``."""

    rates: Rates = Rates()
    gain: float = 1.2
    wide_bytes: int = 16 << 20
    memory_ratio: float = 1.5
    saved_bytes: int = 1 << 18
    chunk_bytes: int = 0
    variants: Variants | None = None
    price: Callable[[FusedCascade], float | None] | None = None


@dataclass(frozen=True)
class Refused:
    """Why a component (named by its largest tensor) stays as it is."""

    tensor: str
    why: str
    location: Location = _NOWHERE


@dataclass(frozen=True)
class Chosen:
    """``decisions``: what was chosen among what, and by how much."""

    groups: tuple[Group, ...]
    refused: tuple[Refused, ...]
    decisions: tuple[Decision, ...] = ()


def choose(raised: Raised, choice: Choice | None = None) -> Chosen:
    """The groups of a raised graph, in the order of its nodes."""
    choice = choice or Choice()
    return choose_among(candidates_of(raised, choice), choice)


def candidates_of(raised: Raised, choice: Choice) -> Candidates:
    """What a raised graph's components could become, for all choices with the rates of this one."""
    return Candidates(with_own_copies(raised), choice.rates.tables)


def choose_among(candidates: Candidates, choice: Choice) -> Chosen:
    """``choose`` where another choice may have been made among the same candidates: what was worked out is known."""
    return _Chooser(candidates, choice).run()


class _Chooser:
    def __init__(self, candidates: Candidates, choice: Choice) -> None:
        self.raised, self.choice = candidates.raised, choice
        self.graph: Graph = self.raised.graph
        self.candidates = candidates
        self.space = self.candidates.space
        self.refused: list[Refused] = []
        #: Components of which no way is worth it.
        self.left: list[Decision] = []

    def run(self) -> Chosen:
        """What takes least time, all components together."""
        found: list[Offers] = []
        owners: list[Component] = []
        for component in components(self.space):
            try:
                self._hopeless(component)
                found.append(self._offers(self.candidates.work_out(component)))
                owners.append(component)
            except NotFused as refusal:
                self._refuse(component, str(refusal))
        made = choose_offers(found, RunOrder(self.graph).runnable, self.choice.variants)
        groups: list[Group] = []
        for component, offer, why in zip(owners, made.taken, made.why, strict=True):
            if offer is None:
                self._refuse(component, why)
            else:
                groups += offer.groups
        position = self.candidates.position
        groups.sort(key=lambda group: min(position.get(name, 0) for name in group.nodes))
        return Chosen(tuple(groups), tuple(self.refused), (*made.decisions, *once_each(self.left)))

    def _refuse(self, component: Component, why: str) -> None:
        name = self._largest(component)
        line = self.space.writer[name].line
        self.refused.append(Refused(name, why, self.graph.nodes[line].location))

    def _largest(self, component: Component) -> str:
        return max(component.wide, key=lambda each: (self.space.tensor_elements(each), each))

    def _hopeless(self, component: Component) -> None:
        """Refuse at once what cannot gain enough even if it were one kernel that moves nothing twice."""
        core = [self.space.writer[name] for name in component.core]
        inside = set(component.core)
        wanted = [
            name
            for name in component.core
            if name in self.raised.needed or any(e.output not in inside for e in self.space.readers.get(name, ()))
        ]
        whole = Stage((0, 0), tuple(core), frozenset(inside))
        total = self.candidates.traffic(whole, wanted, self.space, self.raised.tensors)
        saved = total.written - total.compulsory
        rates, choice = self.choice.rates, self.choice
        if saved < choice.saved_bytes:
            raise NotFused(f"it would save {max(saved, 0)} bytes only")
        before = rates.written(total)
        least = rates.products_at_least(total)
        if before < choice.gain * least and _most_passes_over(Cascade(tuple(core)), component.pair) == 1:
            raise NotFused(
                f"{total.flops_written / 1e9:.3g} GFLOP to {total.written / 1e6:.3g} MB: computing, not memory, takes "
                "the time"
            )

    def _offers(self, candidate: Candidate) -> Offers:
        """As kernels of its own, and in chunks of several sizes. Raises ``NotFused`` where neither is worth it."""
        refusal: NotFused | None = None
        ways: list[Offer] = []
        total = candidate.traffic
        rates = self.choice.rates
        before = sum(rates.written(t) for t in total)
        try:
            saved, wanted, groups = self._decide(candidate)
            ways.append(Offer(_as_kernels(groups), before - saved, groups, _einsums(candidate.stages), wanted))
        except NotFused as error:
            refusal = error
        for size in (self.choice.chunk_bytes, 2 * self.choice.chunk_bytes) if self.choice.chunk_bytes else ():
            try:
                cut = chunked(self.candidates, candidate, size)
                saved = self._decide_chunked(candidate, cut)
            except NotFused as error:
                _log.debug("%s not in chunks: %s", candidate.component.core[0], error)
                break
            rows = ", ".join(f"{size} {rank}" for rank, size in cut.extracted.fused.chunks.items())
            groups = (self._chunked_group(candidate, cut),)
            if not any(way.what == f"in chunks of {rows}" for way in ways):
                ways.append(
                    Offer(f"in chunks of {rows}", before - saved, groups, _einsums([cut.stage]), True, cut.chunk_bytes)
                )
        lines = [einsum.line for stage in candidate.stages for einsum in stage.einsums]
        name = self._largest(candidate.component)
        place = self._location(lines)
        where = f"{os.path.basename(place.file)}:{place.line}" if place.file else ""
        if not ways:
            assert refusal is not None
            self.left.append(left_as_written(name, where, before, self._fused(candidate)[0]))
            raise refusal
        return Offers(name, where, before, self._wide_bytes(candidate), min(lines), max(lines), tuple(ways))

    def _decide_chunked(self, candidate: Candidate, cut: Chunked) -> float:
        """Seconds that it saves. A library's products stay what they were; what lies between them stays in a cache."""
        rates, total = self.choice.rates, cut.traffic
        if cut.wide_bytes < self.choice.wide_bytes:
            raise NotFused(f"its largest tensor has {cut.wide_bytes} bytes only")
        if any(is_contraction(einsum) for einsum in cut.stage.einsums if einsum.output in candidate.component.wide):
            before = rates.written(total)
            return before - rates.products(total) - rates.moving(total.written, cut.chunk_bytes)
        raise NotFused("no product of a library makes its wide tensors")

    def _decide(self, candidate: Candidate) -> tuple[float, bool, tuple[Group, ...]]:
        """Seconds that the component saves, whether it is taken for its memory, and its groups. Raises ``NotFused`` if
        it is not worth it."""
        rates, choice = self.choice.rates, self.choice
        total = candidate.traffic
        saved = sum(t.written - t.fused for t in total)
        before = sum(rates.written(t) for t in total)
        if saved < choice.saved_bytes:
            raise NotFused(f"it would save {saved} bytes only")
        after, gain = self._fused(candidate)
        if before >= gain * after:
            # A gain below 1 asks for it although it is no faster.
            return before - after, before <= after, tuple(self._groups(candidate))
        wide = self._wide_bytes(candidate)
        core = [self.space.writer[name] for name in candidate.component.core if name in self.space.writer]
        if (
            _most_passes_over(Cascade(tuple(core)), candidate.component.pair) > 1
            and wide >= choice.wide_bytes
            and wide >= choice.memory_ratio * sum(t.compulsory for t in total)
        ):
            return before - after, True, tuple(self._groups(candidate))
        raise NotFused(f"predicted {before * 1e3:.3g} ms as written, {after * 1e3:.3g} ms fused")

    def _fused(self, candidate: Candidate) -> tuple[float, float]:
        """Seconds of the component as kernels of its own, and the ratio that is asked of them: by their prices, where
        the rates promise enough and all are known."""
        rates, choice = self.choice.rates, self.choice
        total = candidate.traffic
        rough = sum(rates.kernels(t) + rates.moving(t.fused, t.fused) for t in total)
        if choice.price is None or sum(rates.written(t) for t in total) < choice.gain * rough:
            return rough, choice.gain
        prices = [choice.price(group.fused) for group in self._groups(candidate)]
        if None in prices:
            return rough, choice.gain
        return math.fsum(price for price in prices if price is not None), min(choice.gain, 1 + ALIKE)

    def _wide_bytes(self, candidate: Candidate) -> int:
        """Bytes of the largest wide tensor that is in memory as written: one that a product or several Einsums read."""
        found = 0
        for name in candidate.component.wide:
            readers = candidate.space.readers.get(name, ())
            if len(readers) > 1 or any(reader.reduction for reader in readers):
                found = max(found, candidate.space.tensor_elements(name) * element_bytes(candidate.tensors[name]))
        return found

    def _chunked_group(self, candidate: Candidate, cut: Chunked) -> Group:
        extracted, tensors = cut.extracted, candidate.tensors
        lines = sorted({einsum.line for einsum in cut.stage.einsums})
        nodes = tuple(self.graph.nodes[line].name for line in lines)
        results = tuple(value_name(tensors[name]) for name in extracted.results)
        fused = extracted.fused
        return Group(
            name=f"chunked_{results[0].removeprefix('cascade_')}",
            component=candidate.component.core[0],
            fused=fused,
            operands=tuple(value_name(tensors[name]) for name in extracted.operands),
            results=results,
            nodes=nodes,
            rewriting=Rewriting(fused.cascade, (), (), ()),
            grid=tuple(rank(name) for name in fused.chunks),
            streamed=(),
            wide=fused.wide,
            traffic=cut.traffic,
            rounded=_rounded(cut.stage, tensors),
            location=self._location(lines),
            early=cut.early,
        )

    def _location(self, lines: Sequence[int]) -> Location:
        return next((self.graph.nodes[line].location for line in lines if self.graph.nodes[line].location), _NOWHERE)

    def _groups(self, candidate: Candidate) -> list[Group]:
        groups = []
        for number, stage in enumerate(candidate.stages):
            extracted, moved = candidate.extracted[number], candidate.traffic[number]
            fused = extracted.fused
            kept = [frozenset(view.ranks) for view in fused.outputs]
            wide = [
                extracted.names[e.output]
                for e in stage.einsums
                if e.output in candidate.component.wide and e.output in extracted.names
            ]
            spaces = [fused.cascade.definitions[name].kept for name in wide if name in fused.cascade.definitions]
            walked = dict.fromkeys(symbol for space in spaces for symbol in space)
            grid = tuple(symbol for symbol in walked if all(symbol in ranks for ranks in kept))
            streamed = tuple(symbol for symbol in walked if symbol not in grid)
            written = {view.tensor for view in fused.outputs}
            fused = replace(fused, wide=tuple(name for name in wide if name not in written))
            lines = sorted({einsum.line for einsum in stage.einsums if einsum.output in stage.own})
            nodes = tuple(self.graph.nodes[line].name for line in lines)
            results = tuple(value_name(candidate.tensors[name]) for name in extracted.results)
            groups.append(
                Group(
                    name=f"fused_{results[0].removeprefix('cascade_')}",
                    component=candidate.component.core[0],
                    fused=fused,
                    operands=tuple(value_name(candidate.tensors[name]) for name in extracted.operands),
                    results=results,
                    nodes=nodes,
                    rewriting=rewritten(fused.cascade),
                    grid=grid,
                    streamed=streamed,
                    wide=tuple(wide),
                    traffic=moved,
                    rounded=_rounded(stage, candidate.tensors),
                    location=self._location(lines),
                    rests=tuple(
                        Rest(
                            value_name(candidate.tensors[part.whole]),
                            value_name(candidate.tensors[part.part]),
                            part.count,
                        )
                        for part in candidate.parts[number]
                    ),
                )
            )
        return groups


def _as_written(t: Traffic) -> dict[str, int]:
    """Operations of a stage's products as written, by the types that are no f32."""
    return {kind: count for kind, count, _ in t.other}


def _as_kernels(groups: Sequence[Group]) -> str:
    return "one kernel" if len(groups) == 1 else f"{len(groups)} kernels"


def _einsums(stages: Sequence[Stage]) -> frozenset[str]:
    return frozenset(einsum.output for stage in stages for einsum in stage.einsums)


def _rounded(stage: Stage, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    narrow = ("bf16", "f16", "f8e4m3", "f8e5m2")
    names = [einsum.output for einsum in stage.einsums if tensors[einsum.output].dtype in narrow]
    return tuple(node for name in names for node in tensors[name].nodes[:1])


def _most_passes_over(cascade: Cascade, ranks: Collection[sympy.Symbol]) -> int:
    """Most passes over one of the ranks."""
    levels = [rank_passes(cascade, group_of(cascade, symbol)).einsum.values() for symbol in ranks]
    return max((level for found in levels for level in found), default=1)
