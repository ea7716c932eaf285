"""Seconds of a tile program on a GPU, from its device file, so that ways to launch one kernel can be compared: tile
lengths, warps, stages of loads in flight.

A block of the grid does so much of its program: products, statements on elements, bytes from shared memory. Blocks that
a multiprocessor holds at once (by registers and shared memory) overlap: r of them take r times what the busiest of its
parts does for one, and no less than one takes by itself, where the products of four warps wait for their statements
and, without stages, both for loads. The grid goes round in waves of such blocks, the last of which may be nearly empty.
Bytes from memory and from the last cache are the whole device's, and memory is busy only if enough is on the way.

Nothing here is measured, and nothing but quotients of one kernel's prices is meant to be used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import sympy
from sympy.core.function import AppliedUndef

from ..ir.cascade import accesses, tensor_name
from ..ir.tile import Cases, Dot, Load, Loop, Program, Reduce, Skip, State, Statement, expressions
from .devices import Device
from .tile_cost import _Place, _Pricing

#: Results of exp, log and the like that a multiprocessor makes in a cycle, beside 128 products of lanes (CUDA C++
#: Programming Guide, table of throughputs of arithmetic instructions, capabilities 8.x and 9.0).
_SPECIAL = 16 / 128
_SPECIAL_NAMES = frozenset({"exp", "log", "tanh", "sin", "cos", "erf"})
#: Share of a product's rate where a block has fewer rows than an instruction that reads shared memory takes: the older
#: instructions reach 62.9 % of an H100 (Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU, 2024).
_SHORT = 0.629
#: Shortest side of a product's operands.
_LEAST = 16
#: Warps of which each has matrix units to itself; more of them take turns with products and statements.
_GROUP = 4
#: Bytes that a thread has on the way where no tiles are loaded ahead: four loads of 16.
_THREAD_BYTES = 64


@dataclass(frozen=True)
class GpuRates:
    """Of one multiprocessor, a second: ``product`` operations of matrix units on each type, ``vector`` element
    operations, ``scratch`` bytes of shared memory. Of the device: bytes of ``cache`` and ``memory``. ``rows``: of a
    tile that one instruction multiplies; each such instruction reads the right operand again."""

    units: int
    product: tuple[tuple[str, float], ...]
    vector: float
    scratch: float
    cache: float
    cache_bytes: float
    memory: float
    latency: float
    launch: float
    rows: int = 16

    @classmethod
    def of(cls, device: Device, rows: int = 16) -> GpuRates:
        units = int(device.units.value)
        share = device.efficiency_of("gemm")
        kinds = {"f32": "tf32" if "tf32" in device.matrix else "f32"} | {k: k for k in ("bf16", "f16", "f64")}
        last = device.caches[-1] if device.caches else None
        tier = device.tiers["device"]
        return cls(
            units=units,
            product=tuple((name, device.matrix_rate(kind) * share / units) for name, kind in kinds.items()),
            vector=device.vector_rate("f32") / 2 / units,  # a rate counts a multiply-add as two
            scratch=device.tiers["scratchpad"].bandwidth.value / units,
            cache=last.bandwidth.value if last else device.bandwidth,
            cache_bytes=last.bytes.value if last else 0.0,
            memory=device.bandwidth * device.efficiency_of("memory"),
            latency=tier.latency.value,
            launch=device.launch.value,
            rows=rows,
        )


@dataclass(frozen=True)
class Launched:
    """How a program is launched. ``resident``: blocks that a multiprocessor holds at once; ``in_flight``: bytes that a
    block has on the way, 0 where no tiles are loaded ahead. ``operand``: type of products; ``parts``: products that
    stand for one."""

    warps: int
    stages: int
    resident: int
    in_flight: int = 0
    operand: str = "f32"
    parts: int = 1


def program_seconds(program: Program, sizes: Mapping[str, int], rates: GpuRates, launched: Launched) -> float:
    """Seconds of one launch. ``sizes``: of every rank."""
    return _Launch(program, sizes, rates, launched).seconds()


class _Launch(_Pricing):
    """Sums over the whole grid: seconds of a multiprocessor for each of its parts, bytes of the device's."""

    def __init__(self, program: Program, sizes: Mapping[str, int], rates: GpuRates, launched: Launched) -> None:
        super().__init__(program, sizes, rates)  # type: ignore[arg-type]
        self.gpu, self.launched = rates, launched
        self.product = self.statements = self.scratch = self.from_cache = self.from_memory = self.visits = 0.0

    def seconds(self) -> float:
        for loop in self.program.loops:
            self.steps[loop.rank] = loop.step
        self.values = self.program.values
        self.tensors = {tensor.name: tensor for tensor in self.program.tensors}
        self.body(self.program.body, _Place())
        rates, launched = self.gpu, self.launched
        slots = rates.units * launched.resident
        whole, rest = divmod(self.blocks, slots)
        waves = whole * self.together(launched.resident) + (self.together(-(-rest // rates.units)) if rest else 0.0)
        # So much must be on the way that memory is busy while the first of it comes.
        ahead = launched.in_flight or launched.warps * 32 * _THREAD_BYTES
        reachable = min(rates.memory, min(self.blocks, slots) * ahead / rates.latency)
        return rates.launch + max(waves, self.from_memory / reachable, self.from_cache / rates.cache)

    def together(self, count: int) -> float:
        """Seconds of so many blocks on one multiprocessor."""
        blocks, stages = self.blocks, self.launched.stages
        groups = max(1, self.launched.warps // _GROUP)
        alone = (max(self.product, self.scratch) + self.statements) / blocks / groups
        visits = self.visits / blocks
        ahead = (stages - 1) * alone / max(visits, 1.0)
        alone += self.gpu.latency * (1 + (visits * max(0.0, 1 - ahead / self.gpu.latency)))
        return max(count * max(self.product, self.scratch, self.statements) / blocks, alone)

    def extent(self, rank: sympy.Symbol) -> float:
        """Of an array: a power of two, whatever of it lies beyond the rank's end."""
        return float(self.steps.get(rank) or 1 << (self.size(rank) - 1).bit_length())

    def statement(self, item: Statement, place: _Place) -> None:
        assert not isinstance(item, Loop | Cases | Skip)
        target = item.target
        points = self.elements(each for each in target.args if each.is_Symbol)
        if isinstance(item, Dot):
            self.dot(item, place)
        else:
            body = item.source if isinstance(item, Load) else item.body
            reduced = item.reduced if isinstance(item, Reduce) else ()
            if reduced and body.is_number:  # nothing is added, where a mask left a tile out
                return
            points *= self.elements(reduced)
            if isinstance(item, Load):
                self.visits = max(self.visits, place.times)
                self.scratch += place.times * 4 * points / self.gpu.scratch
            else:
                called = sum(type(each).__name__.lower() in _SPECIAL_NAMES for each in body.atoms(sympy.Function))
                operations = max(1, int(sympy.count_ops(body))) + bool(reduced) - called
                self.statements += place.times * points * (operations + called / _SPECIAL) / self.gpu.vector
        for source in {access for each in expressions(item) for access in accesses(each)}:
            if tensor_name(source) in self.tensors and tensor_name(source) not in self.values:
                self.read(source, place)
        if tensor_name(target) in self.tensors and not isinstance(item, State):
            moved = place.times * points * self.item(target)
            self.from_memory += moved
            self.from_cache += moved

    def dot(self, item: Dot, place: _Place) -> None:
        launched, depth = self.launched, self.side(item.reduced)
        walked = set(item.reduced)
        rows, columns = (
            self.side(s for index in side.args for s in index.free_symbols if s not in walked and self.walks(s))
            for side in (item.left, item.right)
        )
        rate = dict(self.gpu.product)[launched.operand] / launched.parts
        if rows < self.gpu.rows:
            rate *= _SHORT
        self.product += place.times * 2 * rows * columns * depth / rate
        # Instructions for many rows are shared by the warps; with those for few, each warp reads for itself.
        times = -(-rows // self.gpu.rows) if self.gpu.rows > _LEAST else min(launched.warps, -(-rows // _LEAST))
        size = {"f64": 8, "f32": 4}.get(launched.operand, 2)
        self.scratch += place.times * depth * (rows + times * columns) * size / self.gpu.scratch

    def walks(self, rank: sympy.Symbol) -> bool:
        return self.steps.get(rank) != 1

    def side(self, ranks: Iterable[sympy.Symbol]) -> float:
        return max(float(_LEAST), self.elements(ranks))

    def read(self, source: AppliedUndef, place: _Place) -> None:
        """An operand in memory: all of it comes from there once, and again from the cache, if that holds what blocks
        that run at once read between two visits."""
        moved, whole, between = self.visited(source, place)
        together = min(whole, between * self.gpu.units * self.launched.resident)
        self.from_cache += moved
        self.from_memory += min(moved, whole) if together <= self.gpu.cache_bytes else moved
