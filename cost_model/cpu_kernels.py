"""What generated kernels cost on this machine's CPU: measured on kernels that Inductor makes of single ops.

A generated kernel takes a call, the time its bytes need, and what its ops add for each element: an exponential costs
ten times an addition. These additions are measured as the difference to a kernel that only multiplies, per element, all
threads working. Values are read a few kernels after they were made, so bandwidth is measured with several sets of
buffers in turn.
"""

from __future__ import annotations

import collections
import functools
import itertools
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: Elements of the kernels that are compared, and width of the rows that are reduced.
ELEMENTS, WIDTH = 1 << 18, 512
#: How many sets of buffers are walked in turn, and the bytes that a kernel moves in each rung of the ladder.
SETS, RUNGS = 8, tuple(1 << power for power in range(16, 28, 2))
#: Bytes of operands that are walked in turn while a product is measured, and most sets of them.
WALKED, MOST_SETS = 32 << 20, 24
_NAME = re.compile(r"cpp_fused_(?:\w+_)?(\d+)$")


#: Multiplications and additions of the kernel that statements are measured on.
CHAIN = 32


@dataclass(frozen=True)
class GeneratedKernels:
    """``added``: op -> seconds that it adds for each element (of its input, for a reduction); ``statement`` for each
    statement of the generated code that is executed, whatever it works on. ``call``: seconds of a
    generated kernel's call and its buffers, ``library`` of an op of a library beside its work, ``graph`` of calling a
    compiled graph of a training step."""

    added: Mapping[str, float]
    call: float
    library: float
    graph: float


def ops() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Name -> a function of [rows, WIDTH] that Inductor makes one kernel of. ``add`` is what others are compared to;
    the names are those that Inductor gives the kernels."""
    import torch

    signs = torch.randn(ELEMENTS // WIDTH, WIDTH)  # so that nothing can guess what is stored
    mask = signs > 0

    def chain(x: torch.Tensor) -> torch.Tensor:
        for number in range(CHAIN):
            x = x * (0.5 + 0.01 * number) + 0.25
        return x

    return {
        "add": lambda x: x * 2.0,
        "statement": chain,
        "mask_read": lambda x: torch.where(mask, x, 0.5),
        "exp": torch.exp,
        "log": torch.log,
        "tanh": torch.tanh,
        "erf": torch.erf,
        "sigmoid": torch.sigmoid,
        "rsqrt": torch.rsqrt,
        "div": lambda x: 1.5 / x,
        "pow": lambda x: x**2.5,
        "sin": torch.sin,
        "sum": lambda x: x.sum(-1),
        "amax": lambda x: x.amax(-1),
        "var_mean": lambda x: torch.add(*torch.var_mean(x, -1, correction=0)),
        "mean": lambda x: x.mean(0),
        "mask_write": lambda x: signs * x > 0.0,
    }


def measure_generated(rounds: int = 40) -> GeneratedKernels | None:
    """None where Inductor cannot compile for the CPU (no C++ compiler). Takes some 20 seconds, most of it compiling."""
    import torch
    from torch._inductor import config

    found = ops()
    inputs = [torch.rand(ELEMENTS // WIDTH, WIDTH) + 0.5 for _ in found]
    weight = torch.rand(4, 4)

    def each(*values: torch.Tensor) -> list[torch.Tensor]:
        """A small product between two ops, which waits for the one and which the other waits for, keeps Inductor from
        making one kernel of both."""
        made, shift = [], values[0][0, 0]
        for run, value in zip(found.values(), values, strict=True):
            made.append(run(value + shift))
            if made[-1].is_floating_point():  # the last one's is not
                shift = torch.mm(made[-1].reshape(-1)[:16].reshape(4, 4), weight)[0, 0]
        return made

    settings = {"cpp.enable_kernel_profile": True, "cpp.descriptive_names": "original_aten"}  # else equal ones are one
    try:
        with config.patch(settings), torch.no_grad():
            compiled: Any = torch.compile(each, backend="inductor", dynamic=False)
            compiled(*inputs)
            numbered = _by_kernel(lambda: compiled(*inputs), rounds)
            call, library, graph = _calls(rounds)
    except Exception as error:  # Inductor and compilers raise what they like; the roofline does without
        _tell(error)
        return None
    if sorted(numbered) != list(range(len(found))):
        return None
    seconds = {name: numbered[index] for index, name in enumerate(found)}
    plain = seconds["add"]
    added = {}
    for index, name in enumerate(found):
        if name != "add":
            elements = inputs[index].numel()
            # A reduction writes next to nothing: half of the plain kernel's bytes.
            share = 0.5 if name in ("sum", "amax", "var_mean", "mean") else 1.0
            added[name] = max(0.0, seconds[name] / elements - share * plain / inputs[0].numel())
    # One statement of the chain does a vector's elements.
    added["statement"] *= vector_lanes() / (2 * CHAIN - 1)
    return GeneratedKernels(added, call, library, graph)


def vector_lanes() -> int:
    """f32 elements of the vectors that Inductor writes."""
    import torch

    return {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 4)


def _tell(error: Exception) -> None:
    from ..logs import logger

    logger("calibrate").info("generated kernels were not measured: %s: %s", type(error).__name__, str(error)[:200])


def _by_kernel(run: Callable[[], Any], rounds: int) -> dict[int, float]:
    """Shortest seconds of each generated kernel, by its number in the generated code."""
    import torch

    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(rounds):
            run()
    best: dict[int, float] = collections.defaultdict(lambda: float("inf"))
    for event in profile.events() or ():
        if match := _NAME.search(event.name):
            best[int(match[1])] = min(best[int(match[1])], event.self_cpu_time_total * 1e-6)
    return dict(best)


def _calls(rounds: int, depth: int = 24) -> tuple[float, float, float]:
    """Seconds of a generated kernel's call, of a library op's, and of a graph's: of chains that compute next to
    nothing, with operands that are views, as most are."""
    import torch

    weight, bias, x = torch.rand(16, 16), torch.rand(16), torch.rand(16, 16, requires_grad=True)

    def chain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, count: int) -> torch.Tensor:
        for _ in range(count):
            x = torch.relu(torch.addmm(bias, x.t(), weight.t()))
        return x

    compiled: Any = torch.compile(chain, backend="inductor", dynamic=False)

    def step() -> None:
        compiled(x, weight, bias, 1).sum().backward()

    with torch.no_grad():
        long = _shortest(lambda: compiled(x, weight, bias, depth), 4 * rounds)
        short = _shortest(lambda: compiled(x, weight, bias, 1), 4 * rounds)
    both = max(long - short, 1e-7) / (depth - 1)
    out = torch.empty(16, 16)
    with torch.no_grad():
        library = _shortest(lambda: torch.addmm(bias, weight, weight, out=out), 10 * rounds)
    library = min(library, 0.7 * both)
    with torch.enable_grad():
        train = _shortest(step, 4 * rounds)
    return both - library, library, max(train - 3 * both, 0.0) / 2


def _shortest(run: Callable[[], Any], rounds: int) -> float:
    run()
    best = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    return best


def bandwidth_ladder(seconds: float, launch: float) -> dict[int, float]:
    """Bytes that a kernel moves -> bytes a second, where each value is read a few kernels after it was made,
    and results are allocated anew."""
    import torch

    found: dict[int, float] = {}
    for moved in RUNGS:
        count = moved // 12
        sets = [(torch.ones(count), torch.ones(count)) for _ in range(SETS)]
        results: list[Any] = [None] * SETS

        def walk(sets: list[Any] = sets, results: list[Any] = results) -> None:
            for index, (a, b) in enumerate(sets):
                results[index] = torch.add(a, b)

        walk()
        best, begin, rounds = float("inf"), time.perf_counter(), 0
        while rounds < 3 or time.perf_counter() - begin < seconds / len(RUNGS):
            start = time.perf_counter()
            walk()
            best, rounds = min(best, (time.perf_counter() - start) / SETS), rounds + 1
        found[moved] = 12 * count / max(best - launch, 1e-8)
    return found


def fresh_seconds(seconds: float, size: int = 64 << 20) -> float:
    """Seconds a byte that writing to memory takes longer when the system has just handed it out."""
    import torch

    kept = torch.ones(size, dtype=torch.uint8)
    fresh = warm = float("inf")
    begin, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        torch.empty(size, dtype=torch.uint8).fill_(1)  # freed at once: larger than what the C library holds back
        middle = time.perf_counter()
        kept.fill_(1)
        warm, fresh = min(warm, time.perf_counter() - middle), min(fresh, middle - start)
        rounds += 1
    return max(fresh - warm, 0.0) / size


#: (samples, heads, length, head size) of attentions, and (samples, channels, side) of 3 by 3 convolutions.
ATTENTIONS = ((2, 8, 256, 64), (4, 8, 128, 32), (1, 4, 512, 64))
CONVOLUTIONS = ((4, 64, 28), (4, 32, 56), (4, 128, 14))


def library_rates(seconds: float) -> dict[str, float]:
    """Operations a second of fused attention and convolution, forward and backward: geometric means over some sizes."""
    import torch
    import torch.nn.functional as F

    cases: list[tuple[str, float, float, Callable[[], torch.Tensor]]] = []
    for samples, heads, length, size in ATTENTIONS:
        q, k, v = (torch.rand(samples, heads, length, size, requires_grad=True) for _ in range(3))
        flop = 4.0 * samples * heads * length * length * size
        cases.append(("attention", flop, 2.5, functools.partial(F.scaled_dot_product_attention, q, k, v)))
    for samples, channels, side in CONVOLUTIONS:
        x = torch.rand(samples, channels, side, side, requires_grad=True)
        w = torch.rand(channels, channels, 3, 3, requires_grad=True)
        flop = 18.0 * samples * side * side * channels * channels
        cases.append(("convolution", flop, 2.0, functools.partial(F.conv2d, x, w, padding=1)))
    rates: dict[str, list[float]] = collections.defaultdict(list)
    for name, flop, ratio, forward in cases:
        ahead = back = float("inf")
        begin, rounds = time.perf_counter(), 0
        while rounds < 3 or time.perf_counter() - begin < seconds / len(cases):
            start = time.perf_counter()
            made = forward()
            middle = time.perf_counter()
            made.backward(torch.ones_like(made))  # type: ignore[no-untyped-call]
            back, ahead = min(back, time.perf_counter() - middle), min(ahead, middle - start)
            rounds += 1
        rates[name].append(flop / ahead)
        rates[f"{name}_backward"].append(ratio * flop / back)
    return {name: math.exp(sum(map(math.log, found)) / len(found)) for name, found in rates.items()}


def in_turn(run: Callable[..., Any], sets: list[Any]) -> Callable[[], Any]:
    """``run`` on the next of the sets of operands, at each call."""
    turns = itertools.cycle(sets)
    return lambda: run(*next(turns))


def sets_of(size: int) -> int:
    """How many sets of operands of that size are walked in turn."""
    return max(2, min(MOST_SETS, -(-WALKED // size)))
