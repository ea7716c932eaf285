"""What generated kernels cost on this machine's CPU: measured on kernels that Inductor makes of single ops.

A generated kernel takes a call, the time its bytes need, and what its ops add for each element: an exponential costs
ten times an addition. These additions are measured as the difference to a kernel that only multiplies, per element, all
threads working.

All that is measured is compiled first, for a C++ compiler takes longer to read PyTorch's headers than to compile a
kernel: who can compile many kernels at once (``Together``) is asked to.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from .cpu_kernels import WALKED

if TYPE_CHECKING:
    import torch

#: Kernels of graphs that are compiled inside are put off: called before the given function has compiled them, together,
#: they do nothing. It raises RuntimeError where that fails.
Together: TypeAlias = Callable[[], contextlib.AbstractContextManager[Callable[[], None]]]

#: What is measured beside each other, so that it may be compared -> its parts -> seconds.
ProbeSeconds: TypeAlias = Mapping[str, Mapping[str, float]]

#: Elements of the kernels that are compared, and width of the rows that are reduced.
ELEMENTS, WIDTH = 1 << 18, 512
_NAME = re.compile(r"cpp_fused_(?:\w+_)?(\d+)$")
#: Rounds that are timed at most, and at least.
MOST, FEWEST = 40, 10
#: Layers of the deeper of two models that are compared.
DEPTH = 16

#: Multiplications and additions of the kernel that statements are measured on, in strands that do not wait for each
#: other.
CHAIN, STRANDS = 32, 4


@dataclass(frozen=True)
class GeneratedKernels:
    """``added``: op -> seconds that it adds for each element (of its input, for a reduction), kind of random number ->
    for each one that is drawn; ``statement`` for each statement of the generated code that is executed, whatever it
    works on; ``stride`` for each access to another cache line than the one before; ``turn`` of a loop over groups.
    ``call``: seconds of a generated kernel's call and its buffers, ``library`` of an op of a library beside its work,
    ``graph`` of calling a compiled graph of a training step, ``parameter`` of each parameter of it."""

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
    # Rows of one vector each, in the loops that they are read in: what is only viewed so has no vectors.
    vectors = torch.rand(ELEMENTS // WIDTH // vector_lanes(), WIDTH, vector_lanes())
    columns = torch.rand(WIDTH, len(vectors))

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
        "stride": lambda x: ((vectors + x[0, 0]) * columns.t()[:, :, None]).reshape(x.shape),
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


@dataclass(frozen=True)
class Probes:
    """Compiled graphs: ``ops`` runs a kernel of each op in ``turns``, ``draws`` kinds of random numbers; ``layers`` and
    ``steps``, inference and training, have ``DEPTH`` layers, and one."""

    turns: Sequence[str]
    ops: Callable[[], Any]
    draws: Mapping[str, Callable[[], Any]]
    layers: Sequence[Callable[[], Any]]
    steps: Sequence[Callable[[], float]]


def prepare_probes(together: Together | None = None) -> Probes | None:
    """None where Inductor cannot compile for the CPU (no C++ compiler)."""
    try:
        with (together or _one_by_one)() as finish:
            probes = _traced()
            finish()
    except (RuntimeError, OSError) as error:  # what Dynamo, Inductor and the C++ compiler raise; a mistake here is told
        _tell(error)
        return None
    return probes


@contextlib.contextmanager
def _one_by_one() -> Iterator[Callable[[], None]]:
    yield lambda: None


def _traced() -> Probes:
    """The graphs, each called once."""
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

    # Each is compiled by itself: what draws waits for nothing, so Inductor would make one kernel of all.
    graphs = {"": each} | draws()
    settings = {"cpp.enable_kernel_profile": True, "cpp.descriptive_names": "original_aten"}  # else equal ones are one
    with config.patch(settings), torch.no_grad():
        profiled = {}
        for name, graph in graphs.items():
            compiled: Any = torch.compile(graph, backend="inductor", dynamic=False)
            profiled[name] = functools.partial(compiled, *(inputs if name == "" else inputs[:1]))
            profiled[name]()
    layers = [_layers(depth) for depth in (DEPTH, 1)]
    steps = [_training_step(depth) for depth in (DEPTH, 1)]
    with torch.no_grad():
        for run in layers:
            run()
    with torch.enable_grad():
        for step in steps:
            step()
    return Probes(turns, profiled.pop(""), profiled, layers, steps)


def probe_seconds(probes: Probes, seconds: float) -> ProbeSeconds | None:
    """In about ``seconds``. None where Inductor made other kernels than one of each op."""
    import torch

    found = list(dict.fromkeys(probes.turns))
    with torch.no_grad():
        numbered = _numbered(_by_kernel(probes.ops, 0.25 * seconds))
        if sorted(numbered) != list(range(len(found))):
            return None
        taken = {name: statistics.median(numbered[index]) for index, name in enumerate(found)}
        for name, draw in probes.draws.items():
            kernels = _by_kernel(draw, 0.15 * seconds / len(probes.draws))
            taken[name] = sum(statistics.median(spent) for spent in kernels.values())
    return {"kernels": taken, "turn": {"turn": _turn(MOST)}, **_graph_seconds(probes, 0.6 * seconds)}


def generated_kernels(spent: ProbeSeconds) -> GeneratedKernels:
    """What ``probe_seconds`` say."""
    added = dict(spent["turn"])
    plain = spent["kernels"]["add"]
    for name, seconds in spent["kernels"].items():
        if name != "add":
            # A reduction writes next to nothing: half of the plain kernel's bytes.
            share = 0.5 if name in ("sum", "amax", "var_mean", "mean") else 1.0
            added[name] = max(0.0, seconds - share * plain) / ELEMENTS
    added["stride"] *= vector_lanes()  # one for each vector
    # One statement does a vector's elements; the kernel that it is compared to has one too.
    added["statement"] *= vector_lanes() / (2 * CHAIN + STRANDS - 2)
    return GeneratedKernels(added, *_calls(spent))


def vector_lanes() -> int:
    """f32 elements of the vectors that Inductor writes."""
    import torch

    return {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 4)


def _tell(error: Exception) -> None:
    from ..logs import logger

    logger("calibrate").info("generated kernels were not measured: %s: %s", type(error).__name__, str(error)[:200])


def _numbered(kernels: Mapping[str, list[float]]) -> dict[int, list[float]]:
    """Seconds by the kernel's number."""
    return {int(match[1]): spent for name, spent in kernels.items() if (match := _NAME.search(name))}


def _by_kernel(run: Callable[[], Any], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call of a generated kernel, by its name in the generated code."""
    import torch

    run()
    begin = time.perf_counter()
    run()
    # What the profiler tells of a call takes as long as the call.
    rounds = round(min(MOST, max(FEWEST, seconds / 2 / (time.perf_counter() - begin))))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(rounds):
            run()
    found: dict[str, list[float]] = collections.defaultdict(list)
    for event in profile.events() or ():
        if _NAME.search(event.name):
            found[event.name].append(event.self_cpu_time_total * 1e-6)
    return dict(found)


def _layers(depth: int) -> Callable[[], Any]:
    """Layers that compute next to nothing, with operands that are views, as most are."""
    import torch

    weight, bias, x = torch.rand(16, 16), torch.rand(16), torch.rand(16, 16)

    def chain(x: torch.Tensor) -> torch.Tensor:
        for _ in range(depth):
            x = torch.relu(torch.addmm(bias, x.t(), weight.t()))
        return x

    compiled: Any = torch.compile(chain, backend="inductor", dynamic=False)
    return functools.partial(compiled, x)


def _training_step(depth: int) -> Callable[[], float]:
    """Seconds of a training step of such layers. As in a step of a model, other data pass through the caches before the
    forward, and before the backward."""
    import torch
    from torch.nn import Linear, ReLU, Sequential

    model = Sequential(*(Sequential(Linear(16, 16), ReLU()) for _ in range(depth)))
    x, between = torch.rand(16, 16), torch.ones(WALKED // 2)

    def run(x: torch.Tensor) -> Any:  # the model itself would have Dynamo remember this size with its class's code
        return model(x)

    compiled: Any = torch.compile(run, backend="inductor", dynamic=False)

    def step() -> float:
        between.add_(1.0)
        begin = time.perf_counter()
        model.zero_grad(set_to_none=True)
        made = compiled(x)
        middle = time.perf_counter()
        between.add_(1.0)
        gradient = torch.ones_like(made)
        begun = time.perf_counter()
        made.backward(gradient)
        return middle - begin + time.perf_counter() - begun

    return step


def _graph_seconds(probes: Probes, seconds: float) -> ProbeSeconds:
    """Seconds of a library op, and of graphs of ``DEPTH`` layers and of one: inference, and training."""
    import torch

    weight, bias, out = torch.rand(16, 16), torch.rand(16), torch.empty(16, 16)
    between = torch.ones(WALKED // 2)
    with torch.no_grad():
        library = statistics.median(_seconds(lambda: torch.addmm(bias, weight, weight, out=out)) for _ in range(MOST))
        long, short = _in_rounds([functools.partial(_after, run, between) for run in probes.layers], seconds / 3)
    with torch.enable_grad():
        deep, flat = _in_rounds(probes.steps, 2 * seconds / 3)
    return {
        "library": {"op": library},
        "inference": {"deep": long, "flat": short},
        "training": {"deep": deep, "flat": flat},
    }


def _calls(spent: ProbeSeconds) -> tuple[float, float, float, float]:
    """Seconds of a generated kernel's call, of a library op's, of a graph's in a training step, and of each parameter
    there."""
    inference, training = spent["inference"], spent["training"]
    both = max(inference["deep"] - inference["flat"], 1e-7) / (DEPTH - 1)
    library = min(spent["library"]["op"], 0.5 * both)
    # A layer's backward has two products, and a kernel for the activation and the bias.
    parameter = max((training["deep"] - training["flat"]) / (DEPTH - 1) - 2 * both - library, 0.0) / 2
    return both - library, library, max(training["flat"] - 2 * both - library - 2 * parameter, 0.0) / 2, parameter


def _in_rounds(runs: Sequence[Callable[[], float]], seconds: float) -> list[float]:
    """Median of what each returns, in rounds that take turns, after one to warm up."""
    spent: list[list[float]] = [[] for _ in runs]
    begin = time.perf_counter()
    while len(spent[0]) <= FEWEST or (len(spent[0]) <= MOST and time.perf_counter() - begin < seconds):
        for run, found in zip(runs, spent, strict=True):
            found.append(run())
    return [statistics.median(found[1:]) for found in spent]


def _after(run: Callable[[], Any], between: torch.Tensor) -> float:
    """Seconds of a call after other data have passed through the caches."""
    between.add_(1.0)
    return _seconds(run)


def _seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


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
