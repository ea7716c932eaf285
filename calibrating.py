"""``effcc calibrate``: what the cost model measures by itself, and the kernels of cascades, which this package makes.

A cascade's matrix products run in generated code, on tiles; their share of a library's rate is measured on attention in
two sizes, forward. What the kernels do besides is taken off (``cost_model.cascade_cost``).
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from .codegen.kernel_batch import Batch, Collector, CompileAlone, PendingKernel, collecting, unit_source
from .cost_model.calibrate import CascadeShare, calibrate
from .cost_model.cascade_cost import map_seconds
from .cost_model.devices import Device
from .cost_model.measuring_time import SECONDS, Account
from .errors import EffccError
from .logs import logger
from .runtime.freed_memory import keep_freed_memory
from .torch_internals import compile_cpp_module

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
#: Sets of operands that are walked in turn.
SETS = 4
#: Kernels that are compiled while others are still traced.
ENOUGH = 16


def calibrate_machine(seconds: float = SECONDS, save: bool = True, account: Account | None = None) -> Device:
    """Measure this machine's CPU in about ``seconds``, after compiling what is measured, which takes about as long
    where nothing is in a cache. ``account``, if given, is told what took how long."""
    keep_freed_memory()  # as where a step runs
    return calibrate(seconds, save=save, cascade=begin_cascades, together=together, account=account)


@contextlib.contextmanager
def together() -> Iterator[Callable[[], None]]:
    """Kernels of the graphs that are compiled inside are compiled by few calls of the C++ compiler. They do nothing
    before the given function is called, which waits for them; it raises RuntimeError where one does not compile."""
    collector = _PutOff()

    def finish() -> None:
        collector.headers.result()()
        failed = collector.finish()
        if failed:
            raise RuntimeError("; ".join(failed.values()))

    with collecting(collector):
        yield finish


class _PutOff(Collector):
    """Kernels do nothing when they are called before they are compiled.

    First the compiler is given nothing to compile, for which it reads the headers that all kernels share, and keeps
    them read: on a machine where nothing was compiled before, ten seconds of a core beside the one that traces. A
    translation unit is worth two seconds: the first one goes while the rest is traced.
    """

    def __init__(self) -> None:
        super().__init__()
        self.headers = _beside(lambda: compile_cpp_module(unit_source([])))

    def add(self, argument_types: list[str], source: str, alone: CompileAlone) -> Any:
        kernel = super().add(argument_types, source, alone)
        if isinstance(kernel, PendingKernel):
            kernel.compiled = _nothing
        if len(self.pending) >= ENOUGH and self.headers.done():
            self.flush()
        return kernel

    def flush(self, last: bool = False) -> None:
        """Start compiling all that is pending, as one unit. Raises what the compiler raises."""
        if self.pending:
            kernels, self.pending = self.pending, []
            self.batches.append(Batch(kernels, compile_cpp_module(unit_source(kernels))))


def _nothing(*_: Any) -> None:
    pass


def _beside(run: Callable[[], Any]) -> Future[Any]:
    """``run`` in a thread of its own."""
    import torch._inductor.async_compile  # noqa: F401  # modules that import each other are not for two threads

    pool = ThreadPoolExecutor(1, thread_name_prefix="effcc-calibrate")
    begun = pool.submit(run)
    pool.shutdown(wait=False)
    return begun


def begin_cascades() -> Callable[[], CascadeShare | None]:
    """Begins to compile two attentions. What is returned waits for them, and gives what measures the share of a
    device's f32 products that products in generated cascades reach; None where they do not compile."""
    import torch

    from .codegen.cascade_kernel import begin, prepare_cascade
    from .ir.cascade_parser import parse_cascade
    from .passes.rewrite_cascade import rewrite

    cascade = parse_cascade(ATTENTION)
    rewriting = rewrite(cascade)
    sizes = [dict(zip("bhmd", shape, strict=True)) | {"n": shape[2], "f": shape[3]} for shape in SIZES]
    try:
        kernels = [prepare_cascade(rewriting, each) for each in sizes]
    except EffccError as error:
        logger("calibrate").info("cascades were not measured: %s", error.message)
        return lambda: None
    begun = _beside(lambda: begin(kernels))

    def finish() -> CascadeShare | None:
        try:
            begun.result()
            for kernel in kernels:
                kernel.finish()
        except EffccError as error:
            logger("calibrate").info("cascades were not measured: %s", error.message)
            return None
        return share

    def share(device: Device, seconds: float) -> float:
        shares = []
        for each, kernel in zip(sizes, kernels, strict=True):
            points = math.prod(each[rank] for rank in "bhmn")
            flop = 2.0 * points * (each["d"] + each["f"])
            rows, columns = ([each[rank] for rank in ranks] for ranks in ("bhmd", "bhnd"))
            sets = [{"Q": torch.rand(rows), "K": torch.rand(columns), "V": torch.rand(columns)} for _ in range(SETS)]
            spent = _median(kernel, sets, seconds / len(sizes))
            others = map_seconds(cascade, each, device.added, device.vector_lanes) / max(1, device.threads)
            shares.append(flop / device.matrix_rate("f32") / max(spent - others, 0.1 * spent))
        return math.exp(sum(map(math.log, shares)) / len(shares))

    return finish


def _median(
    kernel: Callable[[dict[str, torch.Tensor]], object], sets: list[dict[str, torch.Tensor]], seconds: float
) -> float:
    spent: list[float] = []
    begin = time.perf_counter()
    while len(spent) < 4 * len(sets) or time.perf_counter() - begin < seconds:
        for inputs in sets:
            start = time.perf_counter()
            kernel(inputs)
            spent.append(time.perf_counter() - start)
    return statistics.median(spent[len(sets) :])
