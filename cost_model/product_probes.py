"""Rates of a library's matrix products on this machine's CPU, by dtype, layout and shape.

What a product takes is not known before: on one machine a bf16 product takes less than an f32 product, on another,
without instructions for it, a hundred times as long. So small shapes come first; the rate that a layout has reached
tells how long the next one will take, and one that would take more than its share of the time is measured on fewer
rows, with the same two other sizes, or left out. Its entry says the rows that it was measured on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .cpu_kernels import FEWEST_WARM, in_turn, sets_of
from .devices import GemmMeasurement
from .measuring_time import fair_shares

if TYPE_CHECKING:
    import torch

LAYOUTS = ("forward", "input_gradient", "weight_gradient")
#: (tokens, input features, output features) of the linear layers whose three products are measured: from a single
#: token to a training batch, square and oblong.
LINEAR_SHAPES = (
    (1, 1024, 1024),
    (16, 1024, 1024),
    (128, 768, 768),
    (512, 512, 2048),
    (512, 2048, 512),
    (1024, 1024, 1024),
    (2048, 256, 1024),
    (1024, 256, 8192),
    (256, 128, 128),
    (64, 512, 512),
    (2048, 1024, 256),
    (128, 64, 2048),
)
#: (products, m, k, n) of batched products.
BATCHED_SHAPES = (
    (8, 128, 64, 128),
    (8, 128, 128, 64),
    (16, 256, 32, 256),
    (16, 256, 256, 32),
    (64, 64, 64, 64),
    (4, 512, 64, 512),
    (4, 512, 512, 64),
    (128, 32, 32, 32),
    (32, 16, 128, 16),
)
#: dtype -> its torch name.
DTYPES = {"f32": "float32", "bf16": "bfloat16"}
#: Share of the time for products that is bf16's at most; f32 has the rest.
OF_BF16 = 0.35
#: Rounds that a median takes: fewest, and how many are enough where others need the time.
FEWEST, ENOUGH = 3, 50
#: Fewest rows of a product that is too long: one row is another matter.
LEAST_ROWS = 4
#: A product that takes so many times its share is measured on few of its rows, where operands that do not fit into a
#: cache may do so; of such, so many of a layout are measured, on more rows.
FAR, MOST_CUT = 8.0, 3
#: (m, k, n) of the product that gives a dtype's first rate.
FIRST = (32, 256, 256)


@dataclass(frozen=True)
class Shape:
    """``batch`` products (m, k) @ (k, n)."""

    layout: str
    batch: int
    m: int
    k: int
    n: int

    @property
    def flop(self) -> float:
        return 2.0 * self.batch * self.m * self.k * self.n

    def within(self, flop: float) -> Shape:
        """At most so many operations, by fewer products of a batch, then by fewer rows, powers of two of them; but no
        fewer than two products, and ``LEAST_ROWS``."""
        found = self
        while found.flop > flop:
            if found.batch > 2:
                found = replace(found, batch=_less(found.batch))
            elif found.m > LEAST_ROWS:
                found = replace(found, m=_less(found.m))
            else:
                break
        return found


#: Measures a dtype's product of a shape for about that many seconds.
Measure = Callable[[str, Shape, float], Sequence[GemmMeasurement]]


def _less(count: int) -> int:
    """The next smaller power of two."""
    return 1 << ((count - 1).bit_length() - 1)


def linear_products(seconds: float) -> Iterator[GemmMeasurement]:
    """The three products of each linear layer: x @ w.t(), dy @ w, dy.t() @ x."""
    shapes = [
        Shape(layout, 1, *sizes)
        for tokens, features, outputs in LINEAR_SHAPES
        for layout, sizes in zip(
            LAYOUTS,
            ((tokens, features, outputs), (tokens, outputs, features), (outputs, tokens, features)),
            strict=True,
        )
    ]
    yield from _both_dtypes(shapes, seconds, measure_product)


def batched_products(seconds: float) -> Iterator[GemmMeasurement]:
    """Batched products, both operands row-major."""
    yield from _both_dtypes([Shape("batched", *sizes) for sizes in BATCHED_SHAPES], seconds, measure_batched)


def measured_again(entries: Sequence[GemmMeasurement], seconds: float) -> Iterator[GemmMeasurement]:
    """The same products once more, in about ``seconds``."""
    taking: dict[tuple[str, Shape], float] = {}
    for each in entries:
        shape = Shape(each.layout, each.batch, each.m, each.k, each.n)
        taking[each.dtype, shape] = taking.get((each.dtype, shape), 0.0) + shape.flop / each.rate
    shares = fair_shares([(FEWEST_WARM + ENOUGH) * call for call in taking.values()], seconds)
    for (dtype, shape), share in zip(taking, shares, strict=True):
        yield from (measure_batched if shape.layout == "batched" else measure_product)(dtype, shape, share)


def _both_dtypes(shapes: Sequence[Shape], seconds: float, measure: Measure) -> Iterator[GemmMeasurement]:
    begin = time.perf_counter()
    few = measured("bf16", shapes, OF_BF16 * seconds, first_rate("bf16"), measure)
    left = max(seconds - (time.perf_counter() - begin), (1 - OF_BF16) * seconds)
    yield from measured("f32", shapes, left, first_rate("f32"), measure)
    yield from few


def measured(
    dtype: str, shapes: Sequence[Shape], seconds: float, rate: float, measure: Measure
) -> list[GemmMeasurement]:
    """Measurements of ``shapes``, in their order, in about ``seconds``: the smallest are done first, and what would
    take longer than its share is done with fewer rows. ``rate``: FLOP a second to begin with."""
    from ..logs import logger

    begin = time.perf_counter()
    found: dict[Shape, Sequence[GemmMeasurement]] = {}
    made: list[tuple[int, Shape]] = []
    rates: dict[str, float] = {}
    cut: dict[str, int] = dict.fromkeys((shape.layout for shape in shapes), 0)
    libraries = 1
    order = sorted(range(len(shapes)), key=lambda index: shapes[index].flop)
    for place, index in enumerate(order):
        calls = [
            libraries * shape.flop / rates.get(shape.layout, min(rates.values(), default=rate))
            for shape in (shapes[each] for each in order[place:])
        ]
        left = max(seconds - (time.perf_counter() - begin), 0.0)
        layouts = [shapes[each].layout for each in order[place:]]
        # No less than half an equal share, also where those before took longer than expected.
        share = _shares(calls, layouts, left, 0.5 * seconds / len(shapes), cut)[0]
        if share is None:
            told = "%s %s is left out: it would take far longer than its share, as %d of its layout that are measured"
            logger("calibrate").debug(told, dtype, shapes[index], MOST_CUT)
            continue
        longest = (FEWEST_WARM + FEWEST) * calls[0]
        shape = shapes[index]
        if longest > share:
            shape = shape.within(shape.flop * share / longest)
            cut[shape.layout] += longest > FAR * share
            told = "%s %s would take %.2f s of its share of %.2f s: measured on %s"
            logger("calibrate").debug(told, dtype, shapes[index], longest, share, shape)
        if shape in found:
            logger("calibrate").debug("%s %s was measured already", dtype, shape)
            continue
        found[shape] = measure(dtype, shape, share)
        made.append((index, shape))
        libraries = len(found[shape])
        # As if all libraries were as slow as the slowest.
        rates[shape.layout] = min(entry.rate for entry in found[shape])
    return [entry for _, shape in sorted(made, key=lambda each: each[0]) for entry in found[shape]]


def _shares(
    calls: Sequence[float], layouts: Sequence[str], left: float, least: float, cut: Mapping[str, int]
) -> list[float | None]:
    """Seconds for each shape whose call takes ``calls``, no fewer than ``least``; None for those that are left out:
    that would be measured on few of their rows, where a layout has ``MOST_CUT`` of such already. The others can then
    have more."""
    wanted = [(FEWEST_WARM + ENOUGH) * call for call in calls]
    room = {layout: MOST_CUT - count for layout, count in cut.items()}
    kept = []
    for place, share in enumerate(fair_shares(wanted, left)):
        if (FEWEST_WARM + FEWEST) * calls[place] > FAR * max(share, least):
            room[layouts[place]] -= 1
            if room[layouts[place]] < 0:
                continue
        kept.append(place)
    found: list[float | None] = [None] * len(calls)
    for place, share in zip(kept, fair_shares([wanted[place] for place in kept], left), strict=True):
        found[place] = max(share, least)
    return found


def first_rate(dtype: str) -> float:
    """FLOP a second of a small product."""
    import torch

    m, k, n = FIRST
    left, right = (torch.rand(rows, columns).to(_kind(dtype)) for rows, columns in ((m, k), (k, n)))
    with torch.no_grad():
        torch.mm(left[:1], right)
        begin = time.perf_counter()
        torch.mm(left, right)
        return 2.0 * m * k * n / (time.perf_counter() - begin)


def measure_product(dtype: str, shape: Shape, seconds: float) -> tuple[GemmMeasurement, ...]:
    """FLOP a second of each library that is there, operands laid out as in the shape's layout; median of interleaved
    rounds, in about ``seconds`` with what comes before."""
    import torch

    begin = time.perf_counter()
    layout, m, k, n = shape.layout, shape.m, shape.k, shape.n

    def matrix(rows: int, columns: int, transposed: bool) -> torch.Tensor:
        made = torch.rand((columns, rows) if transposed else (rows, columns), dtype=torch.float32).to(_kind(dtype))
        return made.t() if transposed else made

    sets = _copies(matrix(m, k, layout == "weight_gradient"), matrix(k, n, layout == "forward"))

    def onednn(left: torch.Tensor, right: torch.Tensor) -> Any:
        return torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")

    libraries: dict[str, Callable[..., Any]] = {"blas": torch.mm}
    if _has_onednn(dtype):
        libraries["onednn"] = onednn
    with torch.no_grad():
        candidates = {name: in_turn(run, sets, seconds / 3 / len(libraries)) for name, run in libraries.items()}
    best = interleaved(candidates, max(seconds / 2, seconds - (time.perf_counter() - begin)), warm=False)
    return tuple(
        GemmMeasurement(library=library, dtype=dtype, layout=layout, m=m, k=k, n=n, rate=shape.flop / best[library])
        for library in candidates
    )


def measure_batched(dtype: str, shape: Shape, seconds: float) -> tuple[GemmMeasurement, ...]:
    """FLOP a second of a batched product, as ``measure_product``."""
    import torch

    begin = time.perf_counter()
    batch, m, k, n = shape.batch, shape.m, shape.k, shape.n
    sets = _copies(torch.rand(batch, m, k).to(_kind(dtype)), torch.rand(batch, k, n).to(_kind(dtype)))
    run = in_turn(torch.bmm, sets, seconds / 3)
    left = max(seconds / 2, seconds - (time.perf_counter() - begin))
    rate = shape.flop / interleaved({"blas": run}, left, warm=False)["blas"]
    return (GemmMeasurement(library="blas", dtype=dtype, layout="batched", m=m, k=k, n=n, rate=rate, batch=batch),)


def _copies(left: torch.Tensor, right: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """In a step an operand was made, or read, long before: sets of operands take turns, so that none is in a near
    cache."""
    return [(left.clone(), right.clone()) for _ in range(sets_of(left.nbytes + right.nbytes))]


def _kind(dtype: str) -> torch.dtype:
    import torch

    kind: torch.dtype = getattr(torch, DTYPES[dtype])
    return kind


def _has_onednn(dtype: str) -> bool:
    """Whether oneDNN has products in ``dtype`` on this processor: bf16 takes more than AVX2."""
    import torch

    available: Any = torch.backends.mkldnn.is_available
    if not available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype != "bf16" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def interleaved(candidates: dict[str, Callable[[], Any]], seconds: float, warm: bool = True) -> dict[str, float]:
    """Median time of each candidate, in rounds that take turns, three and more after one to ``warm`` up, fewer where
    they take twice as long as they may: what it takes in a step, where the shortest time is rare."""
    import torch

    spent: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.no_grad():
        if warm:
            for run in candidates.values():
                run()
        begin = time.perf_counter()
        rounds, passed = 0, 0.0
        while rounds == 0 or passed < (seconds if rounds >= FEWEST else 2 * seconds):
            for name, run in candidates.items():
                start = time.perf_counter()
                run()
                spent[name].append(time.perf_counter() - start)
            rounds += 1
            passed = time.perf_counter() - begin
    return {name: statistics.median(found) for name, found in spent.items()}
