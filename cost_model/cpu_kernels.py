"""What kernels that move bytes, and library ops besides products, reach on this machine's CPU.

Values are read a few kernels after they were made, so bandwidth is measured with several sets of buffers in turn.
"""

from __future__ import annotations

import collections
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .library_laws import AttentionSize, Parts, convolution_law, convolution_parts, fit_law

if TYPE_CHECKING:
    import torch

#: How many sets of buffers are walked in turn, and the bytes that a kernel moves in each rung of the ladder.
SETS, RUNGS = 8, tuple(1 << power for power in range(16, 28, 2))
#: Bytes of operands that are walked in turn while a product is measured, and most sets of them.
WALKED, MOST_SETS = 32 << 20, 24
#: Bytes of results that are held meanwhile.
HELD = 8 << 20
#: Calls of what is measured in turn before it is measured, at least.
FEWEST_WARM = 1


def walking_seconds(seconds: float) -> dict[int, float]:
    """Bytes that a kernel moves -> seconds with its call, where each value is read a few kernels after it was made,
    and results are allocated anew. Nearly none (0) first: what the call takes."""
    import torch

    found: dict[int, float] = {}
    for moved in (0, *RUNGS):
        count = max(1, moved // 12)
        sets = [(torch.ones(count), torch.ones(count)) for _ in range(SETS)]
        results: list[Any] = [None] * SETS

        def walk(sets: list[Any] = sets, results: list[Any] = results) -> None:
            for index, (a, b) in enumerate(sets):
                results[index] = torch.add(a, b)

        for _ in range(3):  # which get their memory from the system
            walk()
        spent: list[float] = []
        begin = time.perf_counter()
        while len(spent) < 3 or time.perf_counter() - begin < seconds / (1 + len(RUNGS)):
            start = time.perf_counter()
            walk()
            spent.append((time.perf_counter() - start) / SETS)
        found[moved] = statistics.median(spent)
    return found


def bandwidth_ladder(spent: Mapping[int, float]) -> dict[int, float]:
    """Bytes that a kernel moves -> bytes a second without its call, from ``walking_seconds``."""
    return {
        moved: moved // 12 * 12 / max(seconds - spent[0], 0.1 * seconds) for moved, seconds in spent.items() if moved
    }


def fresh_seconds(seconds: float, size: int = 64 << 20) -> float:
    """Seconds a byte that writing to memory takes longer when the system has just handed it out. To be called before
    others have freed as much."""
    import torch

    kept = torch.ones(size, dtype=torch.uint8)
    longer: list[float] = []
    begin = time.perf_counter()
    while len(longer) < 3 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        torch.empty(size, dtype=torch.uint8).fill_(1)  # freed at once: more than what the C library holds back
        middle = time.perf_counter()
        kept.fill_(1)
        longer.append((middle - start) - (time.perf_counter() - middle))
    return max(statistics.median(longer), 0.0) / size


#: (samples, heads, length, head size, causal) of attentions.
ATTENTIONS = (
    (2, 8, 256, 64, False),
    (4, 8, 128, 32, False),
    (1, 4, 512, 64, False),
    (2, 4, 384, 32, True),
    (8, 4, 64, 48, False),
    (1, 4, 768, 32, True),
    (1, 2, 16, 32, False),
)
#: Shape of the operand, results, kernel, stride, groups of convolutions in two dimensions, and of such in one.
CONVOLUTIONS = (
    ((4, 64, 28, 28), 64, 3, 1, 1),
    ((4, 32, 56, 56), 64, 3, 2, 1),
    ((4, 128, 14, 14), 128, 3, 1, 1),
    ((4, 64, 28, 28), 256, 1, 1, 1),
    ((4, 3, 64, 64), 32, 7, 2, 1),
    ((2, 96, 40, 40), 96, 3, 1, 1),
    ((1, 16, 6, 6), 16, 3, 1, 1),
    ((2, 96, 28, 28), 96, 3, 1, 96),
    ((4, 144, 14, 14), 144, 3, 1, 144),
    ((2, 240, 14, 14), 240, 5, 1, 240),
    ((4, 128, 28, 28), 128, 3, 1, 32),
    ((2, 64, 80, 80), 64, 3, 1, 64),
    ((4, 192, 128), 192, 3, 1, 192),
    ((1, 512, 200), 512, 4, 1, 512),
    ((2, 384, 40), 384, 5, 1, 384),
    ((6, 64, 512), 64, 4, 1, 64),
    ((2, 80, 400), 160, 3, 1, 1),
)


@dataclass(frozen=True)
class LawCase:
    """An op of a library: ``parts`` of its law (``library_laws.py``) forward, and backward."""

    kind: str
    parts: tuple[Parts, Parts]
    forward: Callable[[], torch.Tensor]


def law_cases() -> list[LawCase]:
    """The attentions and convolutions that are measured."""
    import torch
    import torch.nn.functional as F

    cases: list[LawCase] = []
    for samples, heads, length, size, causal in ATTENTIONS:
        q, k, v = (torch.rand(samples, heads, length, size, requires_grad=True) for _ in range(3))
        parts = AttentionSize(samples * heads, length, length, size, causal).parts
        attend = functools.partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal)
        cases.append(LawCase("attention", (parts, parts), attend))
    for shape, results, kernel, stride, groups in CONVOLUTIONS:
        x, w = torch.rand(shape), torch.rand(results, shape[1] // groups, *(kernel for _ in shape[2:]))
        x = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
        convolution = F.conv2d if x.dim() == 4 else F.conv1d
        convolve = functools.partial(
            convolution, x.requires_grad_(), w.requires_grad_(), stride=stride, padding=kernel // 2, groups=groups
        )
        made = convolve()
        shapes, flop = (tuple(made.shape), shape, tuple(w.shape)), 2.0 * made.numel() * w[0].numel()
        both = (convolution_parts(*shapes, flop), convolution_parts(*shapes, 2 * flop))
        cases.append(LawCase(convolution_law(*shapes), both, convolve))
    return cases


def law_seconds(cases: Sequence[LawCase], seconds: float) -> dict[tuple[int, bool], float]:
    """(number of a case, whether backward) -> seconds."""
    found: dict[tuple[int, bool], float] = {}
    for number, case in enumerate(cases):
        found[number, False], found[number, True] = _both_ways(case.forward, seconds / len(cases))
    return found


def library_laws(cases: Sequence[LawCase], spent: Mapping[tuple[int, bool], float], call: float) -> dict[str, float]:
    """Coefficients of the laws of fused attention and of convolution, forward and backward, from ``law_seconds``;
    ``call``: seconds of a library op's call."""
    rows: dict[tuple[str, bool], list[tuple[Parts, float]]] = collections.defaultdict(list)
    for (number, backward), seconds in spent.items():
        case = cases[number]
        rows[case.kind, backward].append((case.parts[backward], max(seconds - call, 0.1 * seconds)))
    found: dict[str, float] = {}
    for (kind, backward), measured in rows.items():
        found |= fit_law(kind, backward, [parts for parts, _ in measured], [seconds for _, seconds in measured])
    return found


def _both_ways(forward: Callable[[], torch.Tensor], seconds: float) -> tuple[float, float]:
    """Median seconds forward, and backward; between two rounds other data pass through the caches."""
    import torch

    ahead: list[float] = []
    back: list[float] = []
    between = torch.ones(WALKED // 4)
    begin = time.perf_counter()
    while len(ahead) < 4 or time.perf_counter() - begin < seconds:
        between.add_(1.0)
        start = time.perf_counter()
        made = forward()
        middle = time.perf_counter()
        gradient = torch.ones_like(made)
        begun = time.perf_counter()
        made.backward(gradient)  # type: ignore[no-untyped-call]
        ahead.append(middle - start)
        back.append(time.perf_counter() - begun)
    return statistics.median(ahead[1:]), statistics.median(back[1:])


def in_turn(run: Callable[..., Any], sets: list[Any], seconds: float = math.inf) -> Callable[[], Any]:
    """``run`` on the next of the sets of operands, at each call; some results are held, so that none lies where one
    has just been written. Called before it is measured until it has the memory that it needs, but no longer than
    ``seconds`` once it was called ``FEWEST_WARM`` times: where a call takes long, new memory is little of it."""
    turns = itertools.cycle(sets)
    begin = time.perf_counter()
    size = run(*sets[0]).nbytes
    held: collections.deque[Any] = collections.deque(maxlen=max(1, min(len(sets), HELD // max(1, size))))

    def turn() -> Any:
        held.append(run(*next(turns)))
        return held[-1]

    for called in range(1, (held.maxlen or 0) + 2):
        if called >= FEWEST_WARM and time.perf_counter() - begin > seconds:
            break
        turn()
    return turn


def sets_of(size: int) -> int:
    """How many sets of operands of that size are walked in turn."""
    return max(2, min(MOST_SETS, -(-WALKED // size)))
