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
import re
import statistics
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
#: Bytes of results that are held meanwhile.
HELD = 8 << 20
_NAME = re.compile(r"cpp_fused_(?:\w+_)?(\d+)$")


#: Multiplications and additions of the kernel that statements are measured on, in strands that do not wait for each
#: other.
CHAIN, STRANDS = 32, 4


@dataclass(frozen=True)
class GeneratedKernels:
    """``added``: op -> seconds that it adds for each element (of its input, for a reduction), kind of random number ->
    for each one that is drawn; ``statement`` for each statement of the generated code that is executed, whatever it
    works on; ``turn`` of a loop over groups. ``call``: seconds of a generated kernel's call and its buffers,
    ``library`` of an op of a library beside its work, ``graph`` of calling a compiled graph of a training step,
    ``parameter`` of each parameter of it."""

    added: Mapping[str, float]
    call: float
    library: float
    graph: float
    parameter: float


def ops() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Name -> a function of [rows, WIDTH] that Inductor makes one kernel of. ``add`` is what others are compared to;
    the names are those that Inductor gives the kernels."""
    import torch

    signs = torch.randn(ELEMENTS // WIDTH, WIDTH)  # so that nothing can guess what is stored
    mask = signs > 0
    rows = torch.randperm(ELEMENTS // WIDTH)

    def statements(x: torch.Tensor) -> torch.Tensor:
        strands = [x] * STRANDS
        for number in range(CHAIN):
            strands[number % STRANDS] = strands[number % STRANDS] * (0.5 + 0.01 * number) + 0.25
        return sum(strands[1:], strands[0])

    return {
        "add": lambda x: x * 2.0,
        "statement": statements,
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
        "atomic_add": lambda x: torch.zeros_like(x).index_put((rows,), x, accumulate=True),
        "mask_write": lambda x: signs * x > 0.0,
    }


def draws() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Kind of random number -> a function that draws one for each element."""
    import torch

    return {
        "rand": lambda x: x * torch.rand_like(x),
        "randn": lambda x: x * torch.randn_like(x),
        "randint": lambda x: x * torch.randint_like(x, 1000),
    }


def measure_generated(rounds: int = 40) -> GeneratedKernels | None:
    """None where Inductor cannot compile for the CPU (no C++ compiler). Takes some 20 seconds, most of it compiling."""
    import torch
    from torch._inductor import config

    found = ops()
    # What the others are compared to comes again and again: it makes the same kernel.
    turns = [name for other in found if other != "add" for name in ("add", other)]
    inputs = [torch.rand(ELEMENTS // WIDTH, WIDTH) + 0.5 for _ in turns]
    weight = torch.zeros(4, 4)

    def each(*values: torch.Tensor) -> list[torch.Tensor]:
        """A small product between two ops, which waits for the one and which the other waits for, keeps Inductor from
        making one kernel of both. It is zero: all ops get the values that they are meant for."""
        made, shift = [], torch.mm(weight, weight)[0, 0]
        for name, value in zip(turns, values, strict=True):
            made.append(found[name](value + shift))
            if made[-1].is_floating_point():  # the last one's is not
                shift = torch.mm(made[-1].reshape(-1)[:16].reshape(4, 4), weight)[0, 0]
        return made

    settings = {"cpp.enable_kernel_profile": True, "cpp.descriptive_names": "original_aten"}  # else equal ones are one
    try:
        with config.patch(settings), torch.no_grad():
            compiled: Any = torch.compile(each, backend="inductor", dynamic=False)
            compiled(*inputs)
            numbered = _numbered(_by_kernel(lambda: compiled(*inputs), rounds))
            drawn = _drawing(inputs[0], rounds)
            calls = _calls(rounds)
    except Exception as error:  # Inductor and compilers raise what they like; the roofline does without
        _tell(error)
        return None
    if sorted(numbered) != list(range(len(found))):
        return None
    seconds = {name: statistics.median(numbered[index]) for index, name in enumerate(found)}
    plain = seconds["add"]
    added = {}
    for name in found:
        if name != "add":
            # A reduction writes next to nothing: half of the plain kernel's bytes.
            share = 0.5 if name in ("sum", "amax", "var_mean", "mean") else 1.0
            added[name] = max(0.0, seconds[name] - share * plain) / ELEMENTS
    added |= {name: max(0.0, spent - plain) / ELEMENTS for name, spent in drawn.items()}
    added["turn"] = _turn(rounds)
    # One statement does a vector's elements; the kernel that it is compared to has one too.
    added["statement"] *= vector_lanes() / (2 * CHAIN + STRANDS - 2)
    return GeneratedKernels(added, *calls)


def vector_lanes() -> int:
    """f32 elements of the vectors that Inductor writes."""
    import torch

    return {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 4)


def _tell(error: Exception) -> None:
    from ..logs import logger

    logger("calibrate").info("generated kernels were not measured: %s: %s", type(error).__name__, str(error)[:200])


def _drawing(x: torch.Tensor, rounds: int) -> dict[str, float]:
    """Kind of random number -> seconds of the kernels that draw one for each element of ``x``. Each is compiled by
    itself: what draws waits for nothing, so Inductor would make one kernel of all."""
    import torch

    found = {}
    for name, draw in draws().items():
        compiled: Any = torch.compile(draw, backend="inductor", dynamic=False)
        compiled(x)
        kernels = _by_kernel(functools.partial(compiled, x), rounds)
        found[name] = sum(statistics.median(spent) for spent in kernels.values())
    return found


def _numbered(kernels: Mapping[str, list[float]]) -> dict[int, list[float]]:
    """Seconds by the kernel's number."""
    return {int(match[1]): spent for name, spent in kernels.items() if (match := _NAME.search(name))}


def _by_kernel(run: Callable[[], Any], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call of a generated kernel, by its name in the generated code."""
    import torch

    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(rounds):
            run()
    found: dict[str, list[float]] = collections.defaultdict(list)
    for event in profile.events() or ():
        if _NAME.search(event.name):
            found[event.name].append(event.self_cpu_time_total * 1e-6)
    return dict(found)


def _calls(rounds: int, depth: int = 16) -> tuple[float, float, float, float]:
    """Seconds of a generated kernel's call, of a library op's, of a graph's in a training step, and of each parameter
    there: of layers that compute next to nothing, with operands that are views, as most are. As in a step of a model,
    other data pass through the caches before the forward, and before the backward."""
    import torch
    from torch.nn import Linear, ReLU, Sequential

    weight, bias, x, out = torch.rand(16, 16), torch.rand(16), torch.rand(16, 16), torch.empty(16, 16)
    between = torch.ones(WALKED // 2)

    def chain(x: torch.Tensor, count: int) -> torch.Tensor:
        for _ in range(count):
            x = torch.relu(torch.addmm(bias, x.t(), weight.t()))
        return x

    def step(model: torch.nn.Module) -> float:
        def run(x: torch.Tensor) -> Any:  # the model itself would have Dynamo remember this size with its class's code
            return model(x)

        compiled: Any = torch.compile(run, backend="inductor", dynamic=False)
        spent = []
        for _ in range(rounds):
            between.add_(1.0)
            begin = time.perf_counter()
            model.zero_grad(set_to_none=True)
            made = compiled(x)
            middle = time.perf_counter()
            between.add_(1.0)
            gradient = torch.ones_like(made)
            begun = time.perf_counter()
            made.backward(gradient)
            spent.append(middle - begin + time.perf_counter() - begun)
        return statistics.median(spent[1:])

    inference: Any = torch.compile(chain, backend="inductor", dynamic=False)
    with torch.no_grad():
        long = _median(lambda: inference(x, depth), rounds, between)
        short = _median(lambda: inference(x, 1), rounds, between)
        both = max(long - short, 1e-7) / (depth - 1)
        library = min(_median(lambda: torch.addmm(bias, weight, weight, out=out), rounds), 0.5 * both)
    with torch.enable_grad():
        flat = step(Sequential(Linear(16, 16), ReLU()))
        deep = step(Sequential(*(Sequential(Linear(16, 16), ReLU()) for _ in range(depth))))
    # A layer's backward has two products, and a kernel for the activation and the bias.
    parameter = max((deep - flat) / (depth - 1) - 2 * both - library, 0.0) / 2
    return both - library, library, max(flat - 2 * both - library - 2 * parameter, 0.0) / 2, parameter


def _turn(rounds: int, groups: int = 8, rows: int = 64, width: int = 192) -> float:
    """Seconds that a turn of a loop over groups takes beside its product: the group's rows, its matrix, and its place
    in the result."""
    import torch

    wide = torch.rand(groups * rows, width)
    matrices = torch.rand(groups, width, width)
    own = [(wide[:rows].clone(), matrices[0].clone(), torch.empty(rows, width)) for _ in range(groups)]
    loops, products = [], []
    with torch.no_grad():
        for _ in range(rounds):
            begin = time.perf_counter()
            made = torch.empty(groups * rows, width)
            for group, start in enumerate(torch.arange(0, groups * rows, rows).tolist()):
                torch.mm(wide[start : start + rows], matrices[group], out=made[start : start + rows])
            middle = time.perf_counter()
            for left, right, out in own:
                torch.mm(left, right, out=out)
            loops.append(middle - begin)
            products.append(time.perf_counter() - middle)
    return max(statistics.median(loops) - statistics.median(products), 0.0) / groups


def _median(run: Callable[[], Any], rounds: int, between: torch.Tensor | None = None) -> float:
    """Median seconds; before each round ``between`` passes through the caches."""
    run()
    found = []
    for _ in range(rounds):
        if between is not None:
            between.add_(1.0)
        begin = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


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

        for _ in range(3):  # which get their memory from the system
            walk()
        spent: list[float] = []
        begin = time.perf_counter()
        while len(spent) < 3 or time.perf_counter() - begin < seconds / len(RUNGS):
            start = time.perf_counter()
            walk()
            spent.append((time.perf_counter() - start) / SETS)
        found[moved] = 12 * count / max(statistics.median(spent) - launch, 1e-8)
    return found


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
#: (samples, channels, side, results, kernel, stride, groups) of two-dimensional convolutions.
CONVOLUTIONS = (
    (4, 64, 28, 64, 3, 1, 1),
    (4, 32, 56, 64, 3, 2, 1),
    (4, 128, 14, 128, 3, 1, 1),
    (4, 64, 28, 256, 1, 1, 1),
    (2, 96, 28, 96, 3, 1, 96),
    (4, 3, 64, 32, 7, 2, 1),
    (2, 96, 40, 96, 3, 1, 1),
    (1, 16, 6, 16, 3, 1, 1),
)


def library_laws(seconds: float, call: float) -> dict[str, float]:
    """Coefficients of the laws of fused attention and of convolution, forward and backward (``library_laws.py``);
    ``call``: seconds of a library op's call."""
    import torch
    import torch.nn.functional as F

    from .library_laws import AttentionSize, Parts, fit_law

    cases: list[tuple[str, tuple[Parts, Parts], Callable[[], torch.Tensor]]] = []
    for samples, heads, length, size, causal in ATTENTIONS:
        q, k, v = (torch.rand(samples, heads, length, size, requires_grad=True) for _ in range(3))
        parts = AttentionSize(samples * heads, length, length, size, causal).parts
        attend = functools.partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal)
        cases.append(("attention", (parts, parts), attend))
    for samples, channels, side, results, kernel, stride, groups in CONVOLUTIONS:
        x = torch.rand(samples, channels, side, side).to(memory_format=torch.channels_last).requires_grad_()
        w = torch.rand(results, channels // groups, kernel, kernel, requires_grad=True)
        convolve = functools.partial(F.conv2d, x, w, stride=stride, padding=kernel // 2, groups=groups)
        made = convolve().numel()
        flop, elements, weights = 2.0 * made * w[0].numel(), float(x.numel() + made), float(w.numel())
        both = ((1.0, flop, elements, weights), (1.0, 2 * flop, elements, weights))
        cases.append(("convolution", both, convolve))
    rows: dict[tuple[str, bool], list[tuple[Parts, float]]] = collections.defaultdict(list)
    for kind, parts_of_both, forward in cases:
        ahead, back = _both_ways(forward, seconds / len(cases))
        for backward, parts, spent in ((False, parts_of_both[0], ahead), (True, parts_of_both[1], back)):
            rows[kind, backward].append((parts, max(spent - call, 0.1 * spent)))
    found: dict[str, float] = {}
    for (kind, backward), measured in rows.items():
        found |= fit_law(kind, backward, [parts for parts, _ in measured], [spent for _, spent in measured])
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


def in_turn(run: Callable[..., Any], sets: list[Any]) -> Callable[[], Any]:
    """``run`` on the next of the sets of operands, at each call; some results are held, so that none lies where one
    has just been written. Called before it is measured until it has the memory that it needs."""
    turns = itertools.cycle(sets)
    size = run(*sets[0]).nbytes
    held: collections.deque[Any] = collections.deque(maxlen=max(1, min(len(sets), HELD // max(1, size))))

    def turn() -> Any:
        held.append(run(*next(turns)))
        return held[-1]

    for _ in range((held.maxlen or 0) + 1):
        turn()
    return turn


def sets_of(size: int) -> int:
    """How many sets of operands of that size are walked in turn."""
    return max(2, min(MOST_SETS, -(-WALKED // size)))
