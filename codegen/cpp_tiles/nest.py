"""Element-wise statements of a tile program as C++ loops: maps, reductions, carries and stores over the same ranks
share one nest, vectorised along the rank whose elements are neighbours in most of what they read.

A subexpression is computed in the outermost loop in which all its ranks are known, once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import sympy
from sympy.core.function import AppliedUndef

from ...ir.cascade import IDENTITY, accesses, is_rank, ranks_of, tensor_name
from ...ir.tile import Carry, Load, Map, Reduce, State, Store
from .expressions import Emitter
from .frame import Frame
from .lookups import Scatter, looked_through
from .names import CPP_TYPES, count, indented, inside, integer, origin, pointer, size_name, stride, tensor

Elementwise = Load | Map | Reduce | State | Carry | Store | Scatter
_OPERATIONS = {"sum": 0, "prod": 1, "max": 2, "min": 3}
#: Accumulators of a reduction along vectors, so that one addition need not wait for the last.
_LANES = 4
#: A sum into a table has a table for each lane up to this many places, with at least so many terms a place.
_LONGEST_IN_LANES, _TERMS_A_PLACE = 256, 16


@dataclass(frozen=True)
class Shape:
    """The loops of a nest, outer first, and which of them is along vectors."""

    loops: tuple[sympy.Symbol, ...]
    vector: sympy.Symbol | None


def body_of(item: Elementwise) -> sympy.Expr:
    return item.source if isinstance(item, Load) else item.body


def read_by(item: Elementwise) -> tuple[sympy.Expr, ...]:
    return (item.body, item.index) if isinstance(item, Scatter) else (body_of(item),)


def target_ranks(item: Elementwise, frame: Frame) -> tuple[sympy.Symbol, ...]:
    picked = item.rank if isinstance(item, Scatter) else None
    return tuple(s for s in item.target.args if is_rank(s) and not frame.is_point(s) and s != picked)


def shape_of(item: Elementwise, frame: Frame) -> Shape:
    """The loops that a statement alone would have."""
    kept = target_ranks(item, frame)
    reduced = item.reduced if isinstance(item, Reduce | Scatter) else ()
    ranks = (*kept, *reduced)
    votes: dict[sympy.Symbol, float] = dict.fromkeys(ranks, 0.0)
    reads = [*accesses(body_of(item))]
    if isinstance(item, Scatter):
        reads += accesses(item.index)
    elif not isinstance(item, Reduce):
        reads.append(item.target)
    for each in reads:
        unit = unit_rank(each, frame)
        if unit in votes:
            # An access with many dimensions is walked more often than one with few.
            votes[unit] += len(ranks_of(each))
    order = {s: position for position, s in enumerate(ranks)}
    vector = max(ranks, key=lambda s: (votes[s], order[s]), default=None)
    if vector is None:
        return Shape((), None)
    if vector in kept and isinstance(item, Scatter):
        # Each term is added where it belongs: rows of neighbours, one term after the other.
        return Shape((*reduced, *(s for s in kept if s != vector), vector), vector)
    if vector in kept:
        return Shape((*(s for s in kept if s != vector), vector, *reduced), vector)
    return Shape((*kept, *(s for s in reduced if s != vector), vector), vector)


def unit_rank(item: AppliedUndef, frame: Frame) -> sympy.Symbol | None:
    """The rank along which an access walks neighbouring elements."""
    name = tensor_name(item)
    if not item.args:
        return None
    if name in frame.values and (name not in frame.tensors or tuple(item.args) == frame.values[name]):
        return item.args[-1]
    unit = frame.tensors[name].unit
    if unit is None:
        return None
    varying = [s for s in ranks_of(item.args[unit]) if not frame.is_point(s) and item.args[unit].coeff(s) == 1]
    return varying[0] if len(varying) == 1 else None


def groups(items: Sequence[Elementwise], frame: Frame) -> list[tuple[Shape, list[Elementwise]]]:
    """Neighbouring statements that can share a nest. None reads what a reduction before it in the nest computes, or
    looks up elements that the nest makes."""
    found: list[tuple[Shape, list[Elementwise]]] = []
    for item in items:
        shape = shape_of(item, frame)
        if found and found[-1][0] == shape:
            before = found[-1][1]
            made = {tensor_name(each.target) for each in before}
            finished = {tensor_name(each.target) for each in before if isinstance(each, Reduce | Scatter)}
            reads = {tensor_name(each) for e in read_by(item) for each in accesses(e)} | {tensor_name(item.target)}
            looked = frozenset().union(*map(looked_through, read_by(item)))
            if isinstance(item, Scatter):
                looked |= {tensor_name(item.target)}
            if not finished & reads and not made & looked:
                before.append(item)
                continue
        found.append((shape, [item]))
    return found


def passing(items: Sequence[Elementwise], frame: Frame) -> frozenset[str]:
    """Values that the nest makes and that nothing outside of it reads: they are never in scratch."""
    uses = Counter(
        name for item in items for name in {tensor_name(each) for e in read_by(item) for each in accesses(e)}
    )
    found = set()
    for item in items:
        name = tensor_name(item.target)
        alone = sum(tensor_name(each.target) == name for each in items) == 1 == frame.makers[name]
        looked = any(name in looked_through(e) for each in items for e in read_by(each))
        if isinstance(item, Map) and alone and not looked and uses[name] == frame.readers[name]:
            found.add(name)
    return frozenset(found)


class NestWriter:
    """Writes one nest."""

    def __init__(self, frame: Frame, shape: Shape, items: Sequence[Elementwise]) -> None:
        self.frame, self.shape, self.items = frame, shape, items
        self.passing = passing(items, frame)
        self.before: list[list[str]] = [[] for _ in range(len(shape.loops) + 1)]
        self.after: list[list[str]] = [[] for _ in range(len(shape.loops) + 1)]
        self.emitter = Emitter(frame, shape.loops, shape.vector, self.before)
        self.lanes = _LANES if self.reduces_along_vector and not self.has_maps else 1

    @property
    def reduces_along_vector(self) -> bool:
        return any(isinstance(item, Reduce) and self.shape.vector in item.reduced for item in self.items)

    @property
    def has_maps(self) -> bool:
        return any(not isinstance(item, Reduce) for item in self.items)

    def lines(self) -> list[str]:
        for number, item in enumerate(self.items):
            value = self.emitter.value(body_of(item))
            if isinstance(item, Scatter):
                self.scatter(item, value, number)
            elif isinstance(item, Reduce):
                self.reduce(item, value, number)
            else:
                if tensor_name(item.target) not in self.passing:
                    self.before[-1].append(self.write(item.target, value, isinstance(item, Store)))
                if not isinstance(item, Store):
                    self.emitter.remember(item.target, value)
        return self.nested(0)

    # Statements -------------------------------------------------------------------------------------------------------

    def write(self, target: AppliedUndef, value: str, in_memory: bool) -> str:
        vector, name = self.shape.vector, tensor_name(target)
        full, width = ("full", "w") if vector is not None else ("false", "1")
        at, step = self.emitter.address(target, in_memory)
        if vector is None or step == "1":
            line = f"store<{full}>({at}, {value}, {width});"
        else:
            line = f"scatter<{full}>({at}, {step}, {value}, {width});"
        if in_memory:
            # Ranks of the grid that the tensor does not have: the first block writes.
            walked = [s for s in sorted(self.frame.walked, key=str) if self.is_grid(s) and s not in ranks_of(target)]
            if walked:
                line = f"if ({' && '.join(f'{origin(s)} == 0' for s in walked)}) {line}"
        assert name
        return line

    def is_grid(self, s: sympy.Symbol) -> bool:
        return any(loop.rank == s and loop.kind == "grid" for loop in self.frame.program.loops)

    def reduce(self, item: Reduce, value: str, number: int) -> None:
        kept = [s for s in self.shape.loops if s in item.target.args]
        depth = len(kept)
        operation = _OPERATIONS[item.reduction]
        along = self.shape.vector in item.reduced
        # Integral, so that -inf and inf have their names.
        start = {"sum": "0", "prod": "1", "max": "-INF", "min": "INF"}[item.reduction]
        assert item.reduction in IDENTITY
        at, step = self.emitter.address(item.target, False)
        accumulator = f"acc_{number}"
        if along:
            self.before[depth].append(f"Vec {accumulator}[{self.lanes}];")
            self.before[depth].append(f"for (auto& a : {accumulator}) a = Vec(scalar_t({start}));")
            self.before[-1].append(
                f"{accumulator}[lane] = accumulated<full, {operation}>({accumulator}[lane], {value}, w);"
            )
            merged = f"{accumulator}[0]"
            for lane in range(1, self.lanes):
                merged = f"reduced({merged}, {accumulator}[{lane}], std::integral_constant<int, {operation}>{{}})"
            total = f"across<{operation}>({merged})"
            if item.accumulate:
                total = _join(item.reduction, f"*({at})", total)
            self.after[depth].append(f"*({at}) = {total};")
        else:
            first = f"load<full>({at}, w)" if item.accumulate else f"Vec(scalar_t({start}))"
            if step != "1" and item.accumulate:
                first = f"lanes_of<full>(w, [&](int64_t k) {{ return ({at})[k * {step}]; }})"
            self.before[depth].append(f"Vec {accumulator} = {first};")
            self.before[-1].append(f"{accumulator} = accumulated<true, {operation}>({accumulator}, {value}, VL);")
            self.after[depth].append(self.write(item.target, accumulator, False))

    def scatter(self, item: Scatter, value: str, number: int) -> None:
        """Each term added at its place. Terms along vectors that go to one table have a table for each lane, so that
        equal places in a vector need not wait for each other."""
        vector, emitter = self.shape.vector, self.emitter
        index = emitter.value(item.index)
        at, along, stride = emitter.place(item.target, item.rank, False)
        first, length = emitter.stretch(item.rank)
        full, width = ("full", "w") if vector is not None else ("false", "1")
        if vector in item.target.args and vector not in ranks_of(item.index) and along == "1":
            line = f"add_row<full>({at}, {stride}, {index}, {first}, {length}, {value}, w);"
        elif vector is not None and vector in item.reduced and self.is_short(item):
            lanes = f"lanes_{number}"
            room = 1 << (self.frame.room(tensor_name(item.target), item.rank) - 1).bit_length()
            depth = len([s for s in self.shape.loops if s in item.target.args])
            self.before[depth].append(f"alignas(64) scalar_t {lanes}[{room} * VL];")
            self.before[depth].append(f"std::fill({lanes}, {lanes} + {length} * VL, scalar_t(0));")
            line = f"add_in_lanes<full>({lanes}, {index}, {first}, {length}, {value}, w);"
            total = f"({at})[j * {stride}] += across<0>(Vec::loadu({lanes} + j * VL));"
            self.after[depth].append(f"for (int64_t j = 0; j < {length}; ++j) {total}")
        else:
            line = f"add_each<{full}>({at}, {stride}, {along}, {index}, {first}, {length}, {value}, {width});"
        self.before[-1].append(line)

    def is_short(self, item: Scatter) -> bool:
        """Whether a table for each lane is small, beside what is summed into it as well as by itself."""
        room = self.frame.room(tensor_name(item.target), item.rank)
        terms = math.prod(self.frame.steps.get(s) or self.frame.size(s) for s in item.reduced)
        return room <= _LONGEST_IN_LANES and terms >= _TERMS_A_PLACE * room

    # Loops ------------------------------------------------------------------------------------------------------------

    def nested(self, depth: int) -> list[str]:
        body = list(self.before[depth])
        if depth < len(self.shape.loops):
            rank = self.shape.loops[depth]
            inner = self.nested(depth + 1)
            body += self.vector_loop(rank, inner) if rank == self.shape.vector else self.loop(rank, inner)
        return body + self.after[depth]

    def loop(self, rank: sympy.Symbol, inner: list[str]) -> list[str]:
        i = inside(rank)
        head = f"for (int64_t {i} = 0; {i} < {self.frame.length(rank)}; ++{i}) {{"
        return [head, *indented(inner), "}"]

    def vector_loop(self, rank: sympy.Symbol, inner: list[str]) -> list[str]:
        i, length = inside(rank), self.frame.length(rank)
        step = f"step_{rank.name}"
        lines = [f"const auto {step} = [&](auto whole, int64_t {i}, int64_t w, int64_t lane) {{"]
        lines += [*indented(["constexpr bool full = decltype(whole)::value;", *inner]), "};"]
        lines.append(f"int64_t {i} = 0;")
        if self.lanes > 1:
            lines.append(f"for (; {i} + {self.lanes} * VL <= {length}; {i} += {self.lanes} * VL) {{")
            lines += [f"  {step}(std::true_type{{}}, {i} + {k} * VL, VL, {k});" for k in range(self.lanes)] + ["}"]
        lines.append(f"for (; {i} + VL <= {length}; {i} += VL) {step}(std::true_type{{}}, {i}, VL, 0);")
        lines.append(f"if ({i} < {length}) {step}(std::false_type{{}}, {i}, {length} - {i}, 0);")
        return ["{", *indented(lines), "}"]


def _join(reduction: str, a: str, b: str) -> str:
    if reduction in ("sum", "prod"):
        return f"{a} {'+' if reduction == 'sum' else '*'} {b}"
    operation = _OPERATIONS[reduction]
    return f"across<{operation}>(reduced(Vec({a}), Vec({b}), std::integral_constant<int, {operation}>{{}}))"


__all__ = ["CPP_TYPES", "NestWriter", "count", "groups", "integer", "pointer", "size_name", "stride", "tensor"]
