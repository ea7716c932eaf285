"""``effcc calibrate``: what the cost model measures by itself, and the kernels of cascades, which this package makes.

A cascade's matrix products run in generated code, on tiles; their share of a library's rate is measured on attention in
two sizes, forward. What the kernels do besides is taken off (``cost_model.cascade_cost``).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from .cost_model.calibrate import calibrate
from .cost_model.cascade_cost import map_seconds
from .cost_model.devices import Device
from .errors import EffccError
from .logs import logger
from .runtime.freed_memory import keep_freed_memory

if TYPE_CHECKING:
    import torch

ATTENTION = """\
S[b,h,m,n] = sum[d] Q[b,h,m,d] * K[b,h,n,d]
G[b,h,m]   = max[n] S[b,h,m,n]
E[b,h,m,n] = exp(S[b,h,m,n] - G[b,h,m])
D[b,h,m]   = sum[n] E[b,h,m,n]
A[b,h,m,n] = E[b,h,m,n] / D[b,h,m]
O[b,h,m,f] = sum[n] A[b,h,m,n] * V[b,h,n,f]
"""
#: (samples, heads, rows, features).
SIZES = ((2, 8, 256, 32), (1, 8, 512, 64))
#: Sets of operands that are walked in turn, and seconds for each size.
SETS, SECONDS = 4, 0.6


def calibrate_machine(seconds: float = 20.0, save: bool = True) -> Device:
    """Measure this machine's CPU in about ``seconds``, and about twice as long again for compiling what is measured."""
    keep_freed_memory()  # as where a step runs
    return calibrate(seconds, save=save, cascade=cascade_share)


def cascade_share(device: Device) -> float | None:
    """Share of ``device``'s f32 products that products in generated cascades reach; None where they do not compile."""
    import torch

    from .codegen.cascade_kernel import build, prepare_cascade
    from .ir.cascade_parser import parse_cascade
    from .passes.rewrite_cascade import rewrite

    cascade = parse_cascade(ATTENTION)
    rewriting = rewrite(cascade)
    shares = []
    try:
        sizes = [dict(zip("bhmd", shape, strict=True)) | {"n": shape[2], "f": shape[3]} for shape in SIZES]
        kernels = [prepare_cascade(rewriting, each) for each in sizes]
        build(kernels)
    except EffccError as error:
        logger("calibrate").info("cascades were not measured: %s", error.message)
        return None
    lanes = device.vector_lanes
    for each, kernel in zip(sizes, kernels, strict=True):
        points = math.prod(each[rank] for rank in "bhmn")
        flop = 2.0 * points * (each["d"] + each["f"])
        rows, columns = ([each[rank] for rank in ranks] for ranks in ("bhmd", "bhnd"))
        sets = [{"Q": torch.rand(rows), "K": torch.rand(columns), "V": torch.rand(columns)} for _ in range(SETS)]
        spent = _median(kernel, sets)
        others = map_seconds(cascade, each, device.added, lanes) / max(1, device.threads)
        shares.append(flop / device.matrix_rate("f32") / max(spent - others, 0.1 * spent))
    return math.exp(sum(map(math.log, shares)) / len(shares))


def _median(kernel: Callable[[dict[str, torch.Tensor]], object], sets: list[dict[str, torch.Tensor]]) -> float:
    spent: list[float] = []
    begin = time.perf_counter()
    while len(spent) < 4 * len(sets) or time.perf_counter() - begin < SECONDS:
        for inputs in sets:
            start = time.perf_counter()
            kernel(inputs)
            spent.append(time.perf_counter() - start)
    return statistics.median(spent[len(sets) :])
