"""Seconds of a tile program on a calibrated CPU, so that programs of one cascade can be compared: other tiles, parts of
the streamed rank, one kernel for two directions or two.

What a tile's shape changes is counted: statements for each element (a state is rescaled once a tile of the streamed
rank), products, the bytes of values in scratch at the rate of the cache that holds them, operands that are read once
more for each tile of rows, tiles that a mask leaves out, and threads that have nothing left to do.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import sympy
from sympy.core.function import AppliedUndef

from ..ir.cascade import accesses, tensor_name
from ..ir.tile import GRID, MAKERS, Cases, Dot, Load, Loop, Program, Reduce, Skip, State, Statement, expressions
from .cpu_kernels import SETS
from .devices import Device
from .generated_loops import MEASURED

#: Tiles of each rank that a condition is looked at in.
_SAMPLES = 8
#: Begin and end of a statement's loops, and of a product's, in statements on vectors. Assumptions: some twenty
#: instructions, and a call into a library that chooses among its kernels.
_LOOPS, _PRODUCT = 20, 500
#: Statements that copying an element takes: from memory, to scratch.
_COPY = 2
#: The cascade language's comparisons, on numbers.
_COMPARISONS = {
    "LessEqual": operator.le, "Less": operator.lt, "GreaterEqual": operator.ge, "Greater": operator.gt,
    "Equal": operator.eq, "NotEqual": operator.ne,
}  # fmt: skip
#: Prices of one kernel in two shapes are not told apart below this share of them.
ALIKE = 0.05
_BYTES = {"f64": 8, "i64": 8, "bf16": 2, "f16": 2, "i16": 2, "i8": 1, "u8": 1, "b1": 1}


@dataclass(frozen=True)
class KernelVariant:
    """One way to generate a kernel. ``seconds``: its price, or its time where it was ``measured``. ``schedule``: what
    the generator is told (``FusedCascade.schedule``), nothing for its own rules. ``bytes``: what the kernel holds while
    it runs. ``alike``: share by which ``seconds`` must be below those of the rules' variant to speak against it."""

    what: str
    seconds: float
    schedule: tuple[tuple[str, int], ...] = ()
    bytes: int = 0
    measured: bool = False
    alike: float = ALIKE


@dataclass(frozen=True)
class TileRates:
    """Of a calibrated CPU. ``product``: operations a second of one thread in tiles; ``statement``: seconds of one, on a
    vector of ``lanes``; ``functions``: seconds an element, all threads working, by name; ``ladder``: bytes in use ->
    bytes a second, of all threads together."""

    threads: int
    lanes: int
    product: float
    statement: float
    functions: tuple[tuple[str, float], ...]
    ladder: tuple[tuple[float, float], ...]
    launch: float

    @classmethod
    def of(cls, device: Device) -> TileRates | None:
        """None for a device whose generated kernels were not measured."""
        if "statement" not in device.added or not device.ladder:
            return None
        threads = device.thread_count
        return cls(
            threads=threads,
            lanes=device.vector_lanes,
            product=device.matrix_rate("f32") * device.efficiency_of("cascade") / threads,
            statement=device.added["statement"].value * threads,
            functions=tuple((name, figure.value * threads) for name, figure in sorted(device.added.items())),
            ladder=tuple((rung.bytes.value, rung.bandwidth.value) for rung in device.ladder),
            launch=device.launch.value,
        )

    def moving(self, moved: float, held: float) -> float:
        """Seconds of one thread to move bytes of which ``held`` are in use on each thread. The ladder was measured on
        so many sets of buffers in turn."""
        together = held * self.threads / SETS
        rungs = self.ladder
        rate = rungs[0][1] if together <= rungs[0][0] else rungs[-1][1]
        for low, high in itertools.pairwise(rungs):
            if low[0] < together <= high[0]:
                share = math.log(together / low[0]) / math.log(high[0] / low[0])
                rate = math.exp((1 - share) * math.log(low[1]) + share * math.log(high[1]))
        return moved / (rate / self.threads)


def programs_seconds(programs: Iterable[Program], sizes: Mapping[str, int], rates: TileRates) -> float:
    """Seconds of programs one after the other. ``sizes``: of every rank."""
    return sum(_Pricing(program, sizes, rates).seconds() for program in programs)


@dataclass(frozen=True)
class _Place:
    """Where the walk is: how often it comes here, and the loops around, outer first."""

    times: float = 1.0
    loops: tuple[Loop, ...] = ()
    blocks: int = 1


@dataclass
class _Pricing:
    program: Program
    sizes: Mapping[str, int]
    rates: TileRates
    steps: dict[sympy.Symbol, int] = field(default_factory=dict)
    work: float = 0.0
    blocks: int = 1

    def seconds(self) -> float:
        for loop in self.program.loops:
            self.steps[loop.rank] = loop.step
        self.values = self.program.values
        self.tensors = {tensor.name: tensor for tensor in self.program.tensors}
        self.held = sum(4.0 * self.elements(ranks) for ranks in self.values.values())
        self.body(self.program.body, _Place())
        busy = -(-self.blocks // self.rates.threads) / self.blocks
        return self.work * busy + self.rates.launch

    # Sizes ------------------------------------------------------------------------------------------------------------

    def size(self, rank: sympy.Symbol) -> int:
        return max(1, self.sizes[rank.name])

    def trips(self, loop: Loop) -> int:
        length = min(loop.length, self.size(loop.rank)) if loop.part is not None else self.size(loop.rank)
        return -(-length // loop.step)

    def extent(self, rank: sympy.Symbol) -> float:
        """Coordinates of a tile, on average."""
        if rank not in self.steps:
            return float(self.size(rank))
        return self.size(rank) / -(-self.size(rank) // self.steps[rank])

    def elements(self, ranks: Iterable[sympy.Symbol]) -> float:
        return math.prod(self.extent(rank) for rank in ranks)

    # The walk ---------------------------------------------------------------------------------------------------------

    def body(self, body: Sequence[Statement], place: _Place) -> None:
        for item in body:
            if isinstance(item, Loop):
                trips = self.trips(item)
                blocks = place.blocks * trips if item.kind == GRID else place.blocks
                if item.kind == GRID:
                    self.blocks = max(self.blocks, blocks)
                self.body(item.body, _Place(place.times * trips, (*place.loops, item), blocks))
            elif isinstance(item, Cases):
                share = self.share(item.condition, everywhere=True)
                self.body(item.full, replace(place, times=place.times * share))
                self.body(item.partial, replace(place, times=place.times * (1 - share)))
            elif isinstance(item, Skip):
                walked = {loop.rank for loop in place.loops if loop.kind != GRID}
                share = self.share(item.condition, everywhere=False, points=walked)
                place = replace(place, times=place.times * share)
            else:
                self.statement(item, place)

    def statement(self, item: Statement, place: _Place) -> None:
        assert not isinstance(item, Loop | Cases | Skip)
        rates, target = self.rates, item.target
        points = self.elements(each for each in target.args if each.is_Symbol)
        if isinstance(item, Dot):
            spent = 2 * points * self.elements(item.reduced) / rates.product + _PRODUCT * rates.statement
        else:
            body = item.source if isinstance(item, Load) else item.body
            reduced = item.reduced if isinstance(item, Reduce) else ()
            if reduced and body.is_number:  # nothing is added, where a mask left a tile out
                return
            points *= self.elements(reduced)
            operations = _COPY if isinstance(item, Load) else max(1, int(sympy.count_ops(body))) + bool(reduced)
            called = dict(rates.functions)
            names = [type(each).__name__.lower() for each in body.atoms(sympy.Function)]
            spent = (points * operations / rates.lanes + _LOOPS) * rates.statement
            spent += points * sum(called.get(MEASURED.get(name, name), 0.0) for name in names)
        spent += rates.moving(4 * self.touched(item), self.held)
        self.work += place.times * spent
        for source in {access for each in expressions(item) for access in accesses(each)}:
            if tensor_name(source) in self.tensors and tensor_name(source) not in self.values:
                self.read(source, place)
        if tensor_name(target) in self.tensors and not isinstance(item, State):
            self.work += place.times * rates.moving(points * self.item(target), rates.ladder[-1][0])

    def touched(self, item: Statement) -> float:
        """Elements of values in scratch that a statement reads and writes."""
        named = [access for each in expressions(item) for access in accesses(each)]
        named += [item.target] * (2 if getattr(item, "accumulate", False) else 1) if isinstance(item, MAKERS) else []
        return sum(
            self.elements(rank for rank in each.args if rank.is_Symbol)
            for each in named
            if tensor_name(each) in self.values
        )

    def item(self, source: AppliedUndef) -> int:
        return _BYTES.get(self.tensors[tensor_name(source)].dtype, 4)

    def visited(self, source: AppliedUndef, place: _Place) -> tuple[float, float, float]:
        """Bytes of an operand that are read in all, that it has, and that are read between two visits of one place."""
        ranks = {symbol for index in source.args for symbol in index.free_symbols}
        once = self.elements(ranks) * self.item(source)
        moved = once * place.times
        whole = math.prod(float(self.size(rank)) for rank in ranks) * self.item(source)
        between = once
        for loop in reversed(place.loops):
            if loop.rank not in ranks:
                break
            between *= self.trips(loop)
        return moved, whole, between

    def read(self, source: AppliedUndef, place: _Place) -> None:
        """An operand in memory: all of it comes from there once, and again from the cache that holds what is read
        between two visits, for every loop that walks none of its ranks."""
        moved, whole, between = self.visited(source, place)
        first = min(moved, whole)
        self.work += self.rates.moving(first, self.rates.ladder[-1][0])
        self.work += self.rates.moving(moved - first, min(2 * between, self.rates.ladder[-1][0]))

    # Masks ------------------------------------------------------------------------------------------------------------

    def share(self, condition: sympy.Expr, everywhere: bool, points: Collection[sympy.Symbol] = ()) -> float:
        """Share of the tiles in which a condition holds somewhere, or everywhere: looked at in the corners of some
        tiles. One that data decide counts as held. Loops over the ranks in ``points`` end where the condition does,
        within a tile."""
        ranks = sorted(condition.free_symbols, key=str)
        if condition.atoms(AppliedUndef) or not ranks or any(rank.name not in self.sizes for rank in ranks):
            return 1.0
        holds = sympy.lambdify(ranks, condition, [_COMPARISONS, "math"])
        seen = held = 0
        for tiles in itertools.product(*(self.corners(rank, 1 if rank in points else 0) for rank in ranks)):
            found = (bool(holds(*corner)) for corner in itertools.product(*tiles))
            held += all(found) if everywhere else any(found)
            seen += 1
        return held / seen

    def corners(self, rank: sympy.Symbol, step: int = 0) -> list[tuple[int, int]]:
        """First and last coordinate of some tiles."""
        size = self.size(rank)
        step = step or self.steps.get(rank, size)
        count = -(-size // step)
        most = min(_SAMPLES if step > 1 else 4 * _SAMPLES, count)
        chosen = sorted({round(i * (count - 1) / max(1, most - 1)) for i in range(most)})
        return [(number * step, min(size, (number + 1) * step) - 1) for number in chosen]
