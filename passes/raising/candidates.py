"""A component worked out: staged, each stage extracted and rewritten, ops that leak its wide tensors taken in."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import networkx
import sympy

from ...ir.cascade import Cascade, Einsum, Equal, NotEqual, accesses, rank, ranks_of, tensor_name
from ...ir.graph import Graph
from ...ir.types import TensorType
from ..cascade_analysis import group_of, rank_passes
from ..contraction_exchange import exchange
from ..effects import has_effect
from ..rewrite_cascade import Rewriting, rewrite, without_unread
from .components import Component, Space, outer_ranks
from .emit import Tensor, elements
from .extract import Extracted, Surroundings, extract
from .group import Traffic
from .guards import prepare
from .nested_sums import merge_nested_sums
from .partial_sums import Part, with_partial_sums
from .program import PRECISION
from .raise_graph import Raised
from .ranks import unify_ranks
from .stages import Level, Stage, Staging
from .traffic import Copies, TablePrices, traffic

if TYPE_CHECKING:
    from .chunked import Uncut

#: Rounds in which ops outside that need parts of a component's wide tensors are taken into it.
_MAX_ABSORBED = 4
#: A stage whose rewritten form still needs another pass is cut there, at most this many times.
_MAX_CUTS = 3
#: Exchange compares all sums of a component with each other; beyond this many Einsums it is not tried.
_MAX_EXCHANGE = 60
#: More Einsums than this are no kernel: the residual stream of a whole model, whose work grows with its square.
MAX_CORE = 128

_NO_TENSOR = Tensor("", (), "", (), (), False)
#: In place of a position in the graph.
_NOBODY = -1


class NotFused(Exception):
    """A component stays as it is; the message says why."""


@lru_cache(maxsize=512)
def rewritten(cascade: Cascade) -> Rewriting:
    """``rewrite``, once for all equal cascades: equal layers have equal ones."""
    return rewrite(cascade)


def value_name(tensor: Tensor) -> str:
    """The graph value that a tensor is; a name of its own for one inside an op."""
    return tensor.nodes[0] if tensor.nodes else f"cascade_{tensor.name}"


@dataclass
class Candidate:
    """``extracted``, ``traffic`` and ``parts`` have one entry a stage."""

    component: Component
    stages: list[Stage]
    space: Space
    tensors: dict[str, Tensor]
    extracted: list[Extracted] = field(default_factory=list)
    traffic: list[Traffic] = field(default_factory=list)
    parts: list[list[Part]] = field(default_factory=list)
    #: What ``chunked`` has found out of it.
    uncut: Uncut | None = None


class Candidates:
    """Works out components of one raised graph."""

    def __init__(self, raised: Raised, tables: TablePrices) -> None:
        self.raised, self.tables = raised, tables
        self.graph: Graph = raised.graph
        self.types = {node.name: node.type for node in self.graph.nodes}
        self.position = {node.name: number for number, node in enumerate(self.graph.nodes)}
        leaves = {name: elements(tensor.sizes) for name, tensor in raised.tensors.items()}
        self.space = Space(raised.cascade.einsums, raised.sizes, leaves)
        self.needed = raised.needed
        self.rank_sizes = {rank(name): size for name, size in raised.raw_sizes.items()}
        self.copies = Copies(self.graph)
        self.operands = [tuple(node.operands()) for node in self.graph.nodes]
        self.effects = [node.name for node in self.graph.nodes if has_effect(node, self.graph)]
        #: What components became, and why others stay as they are.
        self.worked_out: dict[Component, Candidate | str] = {}

    def traffic(self, stage: Stage, wanted: Collection[str], space: Space, tensors: Mapping[str, Tensor]) -> Traffic:
        """What a stage moves and computes, at the prices of the device."""
        return traffic(stage, wanted, space, tensors, self.copies, self.tables, self.raised.shared)

    @cached_property
    def operands_at(self) -> list[tuple[int, ...]]:
        """Position of a node -> those of its operands."""
        return [tuple(self.position[name] for name in names if name in self.position) for names in self.operands]

    @cached_property
    def leaf_at(self) -> list[bool]:
        """Position of a node -> whether it is a leaf of the cascade."""
        tensors, tensor_of = self.raised.tensors, self.raised.tensor_of
        return [tensors.get(tensor_of.get(node.name, ""), _NO_TENSOR).leaf for node in self.graph.nodes]

    @cached_property
    def reached(self) -> dict[str, frozenset[str]]:
        """Graph value -> the tangents that it depends on."""
        found: dict[str, frozenset[str]] = {}
        for node, operands in zip(self.graph.nodes, self.operands, strict=True):
            own = frozenset({node.name}) if node.role == "tangent" else frozenset()
            found[node.name] = own.union(*(found.get(name, frozenset()) for name in operands))
        return found

    def work_out(self, component: Component) -> Candidate:
        """The component as kernels, once however often it is asked for. Raises ``NotFused``."""
        if component not in self.worked_out:
            try:
                self.worked_out[component] = self._worked_out(component)
            except NotFused as refusal:
                self.worked_out[component] = str(refusal)
        found = self.worked_out[component]
        if isinstance(found, str):
            raise NotFused(found)
        return found

    def _worked_out(self, component: Component) -> Candidate:
        if len(component.core) > MAX_CORE:
            raise NotFused(f"{len(component.core)} Einsums hang together, more than the {MAX_CORE} of a kernel")
        for _ in range(_MAX_ABSORBED):
            found = self._staged(*self._prepared(component))
            leaks = self.leaks(found) | self.unmade(found)
            if not leaks:
                return found
            if any(
                outer_ranks(self.space.writer[name], self.space.sizes) for name in leaks if name in self.space.writer
            ):
                raise NotFused("an op with wide tensors of its own needs parts of it")
            core = set(component.core) | leaks
            component = replace(component, core=tuple(e.output for e in self.space.einsums if e.output in core))
        raise NotFused("too many ops outside of it need parts of its wide tensors")

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
        table = {einsum.output: einsum for einsum in own}
        for chunk in _chunks(own):
            if len(chunk) <= _MAX_EXCHANGE:
                exchanged, _ = exchange(Cascade(tuple(chunk)), always=True)
                table.update({einsum.output: einsum for einsum in exchanged.einsums})
        named = [table.get(einsum.output, einsum) for einsum in einsums]
        tensors = {**self.raised.tensors}
        for part, whole in parts.items():
            tensors[part] = replace(tensors[whole], name=part, nodes=(), leaf=False)
        named = list(without_unread(Cascade(tuple(named)), self.needed).einsums)
        order = tuple(einsum.output for einsum in named if einsum.output in core or einsum.output in parts)
        component = replace(component, wide=component.wide & frozenset(order))
        return replace(component, core=order), Space(named, self.raised.raw_sizes, self.space.leaf_elements), tensors

    def _staged(self, component: Component, space: Space, tensors: dict[str, Tensor]) -> Candidate:
        """The component's stages, cut until each is rewritten to one pass."""
        delays: dict[str, Level] = {}
        for _ in range(_MAX_CUTS):
            staging = Staging(self.graph, self.operands, space, tensors, component, delays, self.needed)
            found = Candidate(component, staging.run(), space, tensors)
            later = self._evaluate(found)
            if not later:
                return found
            for name, level in later.items():
                delays[name] = max(level, delays.get(name, level))
        raise NotFused("after each cut into passes, another one was needed")

    def _evaluate(self, candidate: Candidate) -> dict[str, Level]:
        """Extract and rewrite every stage. What must be put off to a later stage, if anything must."""
        candidate.extracted, candidate.traffic, candidate.parts = [], [], []
        around = self.surroundings(candidate)
        for stage in candidate.stages:
            _refuse_exact_comparisons(stage, candidate.tensors)
            wanted = self.wanted(stage, candidate)
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
                    raise NotFused(f"{', '.join(sorted(late))} needs another pass over what is computed again")
                return dict.fromkeys(put_off, (stage.level[0], stage.level[1] + 1))
            candidate.extracted.append(extracted)
            candidate.parts.append(parts)
            candidate.traffic.append(self.traffic(stage, wanted, candidate.space, candidate.tensors))
        return {}

    def _add_part(self, part: Part, candidate: Candidate) -> None:
        """Note the tensor of a partial sum: in float32 at least, whatever the sum is rounded to."""
        whole = candidate.tensors[part.whole]
        sizes = tuple(candidate.space.sizes[symbol.name] for symbol in part.indices)
        dtype = "f32" if whole.dtype in ("bf16", "f16") else whole.dtype
        candidate.tensors[part.part] = Tensor(part.part, (), dtype, sizes, (1,) * len(sizes), False)

    def wanted(self, stage: Stage, candidate: Candidate) -> list[str]:
        """Tensors of the stage that something outside needs, in order."""
        own = {einsum.output for einsum in stage.einsums}
        others = {einsum.output: einsum for other in candidate.stages if other is not stage for einsum in other.einsums}
        again = candidate.component.wide
        read = set().union(*(einsum.read_names for einsum in others.values())) - again
        inside = own | set(others)
        read |= {name for e in candidate.space.einsums if e.output not in inside for name in e.read_names}
        order = [einsum.output for einsum in stage.einsums if einsum.output in stage.own]
        return [name for name in order if name in read or name in self.needed]

    def surroundings(self, candidate: Candidate) -> Surroundings:
        order = {}
        for name, tensor in candidate.tensors.items():
            writer = candidate.space.writer.get(name)
            order[name] = writer.line if writer is not None else self.position.get(next(iter(tensor.nodes), ""), 0)
        return Surroundings(
            candidate.tensors, candidate.space.sizes, lambda name: self._type(candidate.tensors[name]), order
        )

    def _type(self, tensor: Tensor) -> TensorType:
        found = self.types.get(tensor.nodes[0]) if tensor.nodes else None
        return found if isinstance(found, TensorType) else TensorType(tensor.dtype, tensor.shape)

    def unmade(self, candidate: Candidate) -> set[str]:
        """Operands that only exist inside an op that is not done as such: what computes them has to be taken in."""
        made = {name for each in candidate.extracted for name in each.results}
        operands = {name for each in candidate.extracted for name in each.operands} - made
        unmade = {name for name in operands if value_name(candidate.tensors[name]) not in self.position}
        if not all(name in self.space.writer for name in unmade):
            raise NotFused("it needs a part of an op that is left as it is")
        return unmade

    def leaks(self, candidate: Candidate) -> set[str]:
        """Einsums outside of the component whose ops need an op of it that is no result (a column of a joined tensor):
        they have to be done by it too."""
        covered = {e.line for stage in candidate.stages for e in stage.einsums if e.output in stage.own}
        names = [*(name for each in candidate.extracted for name in each.results)]
        names += [part.whole for parts in candidate.parts for part in parts]
        results = {value_name(candidate.tensors[name]) for name in names}
        by_line: dict[int, set[str]] = {}
        for einsum in candidate.space.einsums:
            by_line.setdefault(einsum.line, set()).add(einsum.output)
        operands = {value_name(candidate.tensors[n]) for each in candidate.extracted for n in each.operands}
        at_hand = {self.position[name] for name in results if name in self.position}
        asked = [self.position.get(name, -1) for name in (*self.graph.output_names(), *operands, *self.effects)]
        # Nothing before the first of its ops needs one of them.
        first, count = min(covered, default=0), len(self.graph.nodes)
        waiting = [(at, _NOBODY) for at in asked]
        seen: set[int] = set()
        leaks: set[str] = set()
        while waiting:
            at, owner = waiting.pop()
            key = owner * count + at
            if at < first or key in seen or at in at_hand:
                continue
            seen.add(key)
            if at in covered:
                if owner == _NOBODY:
                    raise NotFused(f"%{self.graph.nodes[at].name} is needed as such")
                leaks |= by_line[owner]
                continue
            # An op that is only a view, or is written into its readers, hands the question on to its reader.
            mine = at if at in by_line else owner
            if self.leaf_at[at]:
                mine = _NOBODY
            waiting += [(operand, mine) for operand in self.operands_at[at]]
        return leaks


def _chunks(einsums: Sequence[Einsum]) -> list[list[Einsum]]:
    """Einsums that read each other's results, apart from what only shares a mask: the layers of a model."""
    writers = {einsum.output: einsum for einsum in einsums}
    shared = {
        einsum.output
        for einsum in einsums
        if einsum.reduction is None and not any(name in writers for name in einsum.read_names)
    }
    together = networkx.Graph()
    together.add_nodes_from(writers)
    for einsum in einsums:
        reads = einsum.read_names & writers.keys() - shared
        together.add_edges_from((einsum.output, name) for name in reads)
    order = {einsum.output: number for number, einsum in enumerate(einsums)}
    chunks = [sorted(part, key=order.__getitem__) for part in networkx.connected_components(together)]
    return [[writers[name] for name in chunk] for chunk in chunks if len(chunk) > 1]


def _refuse_exact_comparisons(stage: Stage, tensors: Mapping[str, Tensor]) -> None:
    """``S == max(S)``: a kernel that computes S again rounds it in another way, and finds no equal element."""
    for einsum in stage.einsums:
        for node in einsum.body.atoms(Equal, NotEqual):
            sides = [{tensor_name(item) for item in accesses(side)} for side in node.args]
            if all(any(tensors[name].dtype in PRECISION for name in side) for side in sides):
                raise NotFused(f"{einsum.output} compares computed numbers for equality")


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
