"""From a model to a plan, on any machine: capture, passes, plan, check. ``effcc plan`` is a shell around it."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from .activation_words import with_choices
from .collector import collecting_seldom
from .cost_model.devices import Device
from .errors import BudgetError, OptionError
from .formatting import bytes_text, seconds_text
from .ir.graph import Graph
from .ir.plan import GraphPlan, Plan, TradePoint
from .logs import logger
from .options import parse_bytes
from .passes.dump import PassRecord
from .plan_copies import with_copies
from .plan_streams import MOST_STREAMS, with_streams
from .stage_times import StageTimes
from .summary import Summary, device_named, summarize

if TYPE_CHECKING:
    import torch

    from .budget_planning import BudgetPlanner, ParetoPoint
    from .cascade_fusion import CascadeFusion
    from .cascade_watch import CascadeWatch
    from .frontend.capture import Captured
    from .frontend.model_file import ModelSpec
    from .passes.activation.choice import ActivationChoice
    from .passes.flatten import RegionBuffers
    from .passes.planner import StateBytes
    from .passes.raising.analysis import GraphAnalysis

#: What is done to every captured graph before it is planned.
PIPELINE = "normalize,saved-layouts,repeated-structure,regions,schedule"
#: The same where layers may differ in what they save: they are not folded into one.
BUDGET_PIPELINE = "normalize,regions,schedule"

Progress = Callable[[str], AbstractContextManager[None]]


#: Names of the floating-point types that ``dtype`` may convert a model to, with torch's own.
DTYPES = {
    "f64": "f64", "f32": "f32", "bf16": "bf16", "f16": "f16",
    "float64": "f64", "float32": "f32", "bfloat16": "bf16", "float16": "f16",
}  # fmt: skip


@dataclass(frozen=True)
class PlanRequest:
    """What ``effcc plan`` is asked for. ``model``: ``FILE.py[:name]`` or ``FILE.mlir``; ``memory_budget`` in bytes."""

    model: str
    train: bool = False
    optimizer: str | None = None
    dtype: str | None = None
    device: str = "cpu"
    memory_budget: int | None = None
    #: Under a budget, values may be swapped to the host.
    swap: bool = False
    #: Also the curve of time against memory.
    pareto: bool = False
    #: Also which dependent reductions could be one kernel.
    cascades: bool = False
    #: Fuse cascades as ``torch.compile`` does.
    fuse: bool = True
    #: Most kernels at once, each on a stream of its own; plans for GPUs only.
    streams: int = 1
    dynamic: bool = False
    pipeline: str = PIPELINE
    dump_dir: Path | None = None
    verify: bool = True


@dataclass(frozen=True, repr=False)
class Planned:
    """A checked plan with the text of its graphs."""

    plan: Plan
    graphs_text: dict[str, str]
    records: tuple[PassRecord, ...]
    captured: Captured
    #: What is kept, recomputed and swapped, for each joint graph; empty without a budget.
    activations: tuple[ActivationChoice, ...] = ()
    #: Time against memory, where it was asked for.
    pareto: tuple[ParetoPoint, ...] = ()

    @property
    def summary(self) -> Summary:
        """Peak, time, who holds the peak: as figures, and in ``summary.words`` as sentences."""
        return summarize(self.plan)

    def __repr__(self) -> str:
        peak = bytes_text(self.plan.peak.get("device", 0))
        fallbacks = f", {len(self.plan.fallbacks)} fallbacks" if self.plan.fallbacks else ""
        return (
            f"<Planned {self.plan.model} on {self.plan.device}: peak {peak}, {seconds_text(self.plan.seconds)}, "
            f"{len(self.plan.steps)} steps{fallbacks}>"
        )

    def __str__(self) -> str:
        return "\n".join((f"{self.plan.model} on {self.plan.device}", *self.summary.words))

    def _repr_html_(self) -> str:
        from .report.notebook import plan_html

        return plan_html(self.plan)

    def report(self) -> str:
        """The whole report, as one HTML page."""
        from .ir.plan_file import decode_plan, encode_plan
        from .report.page import render_report

        return render_report(decode_plan(encode_plan(self.plan, self.graphs_text, {}), validate=False))

    def save(self, path: str | Path) -> None:
        """Write ``plan.effcc``, for ``torch.compile(options={"plan": path})`` and the commands. Raises OutputError."""
        from .ir.plan_file import save_plan

        save_plan(path, self.plan, self.graphs_text, {})


def plan(
    model: str | Path | torch.nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    *,
    train: bool = False,
    loss: Callable[..., Any] | None = None,
    optimizer: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    memory_budget: int | str | None = None,
    dynamic: bool = False,
    fuse: bool = True,
) -> Planned:
    """The plan of a model for a device that need not be at hand, without running the model.

    Args:
        model: a model file (``"model.py"``, ``"model.py:name"``, ``"model.mlir"``), or a module, which
            is copied without its weights and left as it is.
        example_inputs: for a module, its arguments: a tuple, or a dict of keyword arguments.
        train: a training step (forward, backward, optimizer), not a forward pass.
        loss: for a module, a function of its outputs that gives the scalar to differentiate; without it ``.loss`` or
            the sum of the outputs is taken.
        optimizer: counts this optimizer's state, for instance ``"adamw"``; needs ``train``.
        dtype: converts floating-point parameters and inputs: f32, bf16, f16, f64.
        device: a name from ``effcc devices`` or the path of a device file.
        memory_budget: most bytes on the device, as a number or a text such as ``"8GiB"``; ``"auto"``: its memory.
        dynamic: keeps the inputs' sizes symbolic.
        fuse: makes kernels of cascades as ``torch.compile`` does.

    Raises:
        EffccError: see ``plan_model``.
    """
    request = PlanRequest(
        model=str(model) if isinstance(model, str | Path) else type(model).__name__,
        train=train,
        optimizer=optimizer,
        dtype=dtype,
        device=device,
        memory_budget=budget_bytes(memory_budget, device),
        dynamic=dynamic,
        fuse=fuse,
    )
    if isinstance(model, str | Path):
        if example_inputs is not None or loss is not None:
            raise OptionError(
                "example_inputs and loss go with a module", remedy="a model file has its own: define them in it"
            )
        return plan_model(request)
    return plan_model(request, spec=_spec_of_module(model, example_inputs, loss))


def capture_model(request: PlanRequest) -> Captured:
    """The capture that ``plan_model`` plans, to be planned for several devices of one kind. Raises what it raises."""
    check_options(request)
    device = device_named(request.device)
    with _joint_passes(None, _fusion(device, False) if request.fuse else None):
        return _capture(request, device, _load(request.model))


@collecting_seldom()
def plan_model(
    request: PlanRequest,
    progress: Progress = lambda _: nullcontext(),
    *,
    spec: ModelSpec | None = None,
    captured: Captured | None = None,
) -> Planned:
    """Capture a model file (or ``spec``, or take what was ``captured`` of it for this kind of device), run the passes,
    make the plan and have the independent validator check it.

    Raises:
        ModelFileError, CaptureError: the file offers no model, or the model cannot be traced.
        OptionError, DeviceError: an option's value is not understood.
        BudgetError: the plan needs more than the budget; the message says the least that works and what holds it.
        PassError, PlanError: a fault of ours, with what to send us.
    """
    from .ir.plan_validator import validate
    from .ir.printer import print_graph
    from .passes.manager import PassManager
    from .passes.pipeline import parse_pipeline
    from .passes.planner import make_plan

    device = device_named(request.device)
    check_options(request)
    budgeted = request.train and (request.memory_budget is not None or request.pareto)
    pipeline = request.pipeline if not budgeted or request.pipeline != PIPELINE else BUDGET_PIPELINE
    passes = parse_pipeline(pipeline)
    planner = _budget_planner(device, request.swap) if budgeted else None
    watch = _cascade_watch() if request.cascades else None
    fusion = _fusion(device, budgeted) if request.fuse else None
    progress = times = StageTimes(progress)
    with progress("capture"):
        if captured is None:
            spec = spec or _load(request.model)
            with _joint_passes(watch, fusion):
                captured = _capture(request, device, spec, planner)
        for line in (*captured.notes, *_graph_breaks(captured)):
            logger("capture").info("%s", line)
    manager = PassManager(passes, dump_dir=request.dump_dir, verify=request.verify)
    graphs: list[Graph] = []

    def make(captured: Captured) -> Plan:
        graphs[:] = []
        for graph in map(_with_saved_roles, captured.graphs):
            with progress(f"passes on {graph.name} ({len(graph.nodes)} ops)"):
                graphs.append(manager.run(graph))
        with progress("plan"):
            plan = make_plan(
                captured.name,
                graphs,
                device,
                state=_state(captured),
                budget=request.memory_budget,
                optimizer=captured.optimizer,
                bindings=captured.sizes,
                region_buffers=_ordered_memory(device, captured.sizes) if budgeted else _region_buffers(device),
                outside_loss=budgeted,
            )
            plan = with_streams(with_copies(plan, device), device, request.streams)
        logger("plan").info(
            "%s: %d steps, %d buffers, peak %s, %.3g s",
            plan.model, len(plan.steps), len(plan.buffers), bytes_text(plan.peak.get("device", 0)), plan.seconds,
        )  # fmt: skip
        return plan

    made = make(captured)
    curve: tuple[ParetoPoint, ...] = ()
    if planner is not None:
        from .budget_planning import pareto_curve

        if request.pareto:
            with progress("time against memory"):
                curve = tuple(pareto_curve(planner, made))
        if request.memory_budget is not None:
            first: list[Plan] = [made]
            with progress("choice of activations"):
                captured, made = planner.plan(
                    captured, request.memory_budget, lambda each: first.pop() if first else make(each)
                )
    _check_budget(made, request.memory_budget)
    made = msgspec.structs.replace(
        made,
        graphs=_captured_identities(made, captured),
        decisions=(*made.decisions, *(fusion.decisions if fusion is not None else ())),
        notes=(
            *made.notes,
            *_fused_notes(fusion),
            *captured.notes,
            *_graph_breaks(captured),
            *(planner.notes if planner else ()),
        ),
        cascades=tuple(watch.verdicts()) if watch is not None else (),
        curve=tuple(
            TradePoint(peak=point.peak, seconds=point.seconds, bound=point.bound, saved_bytes=point.saved_bytes)
            for point in curve
        ),
    )
    choices = tuple(planner.choices(request.memory_budget)) if planner is not None else ()
    made = with_choices(made, choices)
    with progress("validate"):
        validate(made)
    logger("plan").info("%s: processor time of %s", made.model, times.words)
    texts = {entry.name: print_graph(graph) for entry, graph in zip(made.graphs, graphs, strict=True)}
    return Planned(made, texts, tuple(manager.records), captured, choices, curve)


def _budget_planner(device: Device, swap: bool) -> BudgetPlanner:
    from .budget_planning import BudgetPlanner

    return BudgetPlanner(device, swap=swap)


def _fused_notes(fusion: CascadeFusion | None) -> tuple[str, ...]:
    count = len(fusion.reports) if fusion is not None else 0
    return (f"groups of dependent reductions that are one kernel: {count}; --cascades lists them",) if count else ()


def _fusion(device: Device, short_of_memory: bool) -> CascadeFusion | None:
    """None for a GPU that kernels are not made for."""
    from .cascade_fusion import CascadeFusion, choice_for
    from .codegen.triton_tiles.target import CAPABILITIES, Target

    if device.kind != "cpu" and device.name not in CAPABILITIES:
        return None
    target = None if device.kind == "cpu" else Target.of_device(device)
    return CascadeFusion(choice_for(device, short_of_memory), compiles=False, target=target)


def _joint_passes(watch: CascadeWatch | None, fusion: CascadeFusion | None) -> AbstractContextManager[Any]:
    """Inside, joint graphs are looked at as they are, and then fused."""
    from .codegen.known_faults import avoid_faults
    from .torch_internals import joint_pass

    passes: list[Callable[[Any], None]] = [avoid_faults]
    if watch is not None:
        passes.append(watch.keep)
    if fusion is not None:
        passes.append(fusion)

    def run(graph: Any) -> None:
        for each in passes:
            each(graph)

    return joint_pass(run, "effcc plan")


def _cascade_watch() -> CascadeWatch:
    from .cascade_watch import CascadeWatch

    return CascadeWatch()


def cascade_analyses(model_file: str, *, train: bool) -> list[GraphAnalysis]:
    """The groups of each captured graph of a model file that one kernel could compute, and why others stay; a repeated
    layer is one graph. Raises ModelFileError, CaptureError."""
    from .cascade_watch import CascadeWatch
    from .frontend.capture import capture
    from .passes.raising.analysis import analyse
    from .passes.raising.choose import Choice, Rates

    watch = CascadeWatch()
    spec = _load(model_file)
    with watch.watching():
        capture(spec, train=train)
    choice = Choice(Rates.of(device_named("cpu")))
    return [analyse(graph, graph.name, choice) for graph in watch.graphs]


def _ordered_memory(device: Device, sizes: Mapping[str, int]) -> RegionBuffers:
    from .passes.activation.ordered_memory import ordered_memory

    return lambda region: ordered_memory(region, device, sizes)


def budget_bytes(given: int | str | None, device: str, option: str = "memory_budget") -> int | None:
    """A budget in bytes; ``"auto"`` is the device's memory. Raises OptionError, DeviceError."""
    if given == "auto":
        return int(device_named(device).memory)
    return None if given is None else parse_bytes(given, option=option)


def check_options(request: PlanRequest) -> None:
    """What can be refused before the model is built, which may take a while. Raises OptionError."""
    if not 1 <= request.streams <= MOST_STREAMS:
        raise OptionError(f"--streams {request.streams} is out of range", remedy=f"give 1 to {MOST_STREAMS}")
    if request.optimizer is not None and not request.train:
        raise OptionError("--optimizer without --train", remedy="add --train: only a training step has an optimizer")
    if request.dtype is not None and request.dtype.removeprefix("torch.") not in DTYPES:
        raise OptionError(
            f"dtype {request.dtype!r} is not understood", remedy=f"one of {', '.join(dict.fromkeys(DTYPES.values()))}"
        )
    if request.optimizer is not None:
        from .frontend.state import OPTIMIZERS

        name = request.optimizer.lower().replace("-", "_")
        if name not in OPTIMIZERS:
            close = difflib.get_close_matches(name, OPTIMIZERS, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise OptionError(
                f"unknown optimizer {request.optimizer!r}", remedy=f"{hint}known optimizers: {', '.join(OPTIMIZERS)}"
            )


def _check_budget(made: Plan, budget: int | None) -> None:
    """A plan over its budget is refused, with the least budget that this plan keeps and what holds the peak."""
    peak = made.peak.get("device", 0)
    if budget is None or peak <= budget:
        return
    holders = summarize(made).holders[:3]
    held = "; ".join(f"{bytes_text(holder.bytes)} {holder.role} {holder.what}" for holder in holders)
    raise BudgetError(
        f"the step needs {bytes_text(peak)}, more than the memory budget of {bytes_text(budget)}",
        where=f"the peak on {made.device}, where most is held by: {held}",
        remedy=f"The least budget that works is {peak} bytes ({bytes_text(peak)}). A smaller batch or a narrower dtype "
        "needs less.",
    )


def _spec_of_module(
    model: torch.nn.Module, example_inputs: tuple[Any, ...] | Mapping[str, Any] | None, loss: Callable[..., Any] | None
) -> ModelSpec:
    from torch import Tensor
    from torch.nn import Module

    from .frontend.model_file import ModelSpec

    if not isinstance(model, Module):
        raise OptionError(
            f"the model is {type(model).__name__}", remedy="give a torch.nn.Module, or the path of a model file"
        )
    if example_inputs is None:
        raise OptionError("example_inputs are missing", remedy='effcc.plan(model, (x,)) or effcc.plan(model, {"x": x})')
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    named = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
    positional = () if isinstance(example_inputs, Mapping) else tuple(example_inputs)
    return ModelSpec(
        name=type(model).__name__,
        # The copy is made where tensors come out fake, so that it has no weights.
        build_model=lambda: copy.deepcopy(model),
        example_inputs=lambda: copy.deepcopy((positional, named)),
        loss=loss,
    )


def _load(model_file: str) -> ModelSpec:
    from .frontend.model_file import load_model_file
    from .frontend.without_weights import Weightless

    with Weightless().building():
        return load_model_file(model_file)


def _capture(request: PlanRequest, device: Device, spec: ModelSpec, planner: BudgetPlanner | None = None) -> Captured:
    from .frontend.capture import capture

    return capture(
        spec,
        train=request.train,
        optimizer=request.optimizer,
        dtype=request.dtype,
        device="cpu" if device.kind == "cpu" else "cuda",
        dynamic=True if request.dynamic else None,
        partition=planner.partition if planner is not None else None,
    )


def _region_buffers(device: Device) -> RegionBuffers | None:
    """How regions use memory inside: read from the code that Inductor generates for them on a CPU, which needs no other
    device than this one; estimated elsewhere."""
    if device.kind != "cpu":
        return None
    from .codegen.region_memory import memory_of_generated_code

    return memory_of_generated_code


def _with_saved_roles(graph: Graph) -> Graph:
    """A backward graph in which parameters and inputs of the model that it reads have the role ``saved`` too.

    The forward hands them on among its saved values, and the planner pairs the two lists.
    """
    if graph.phase != "backward":
        return graph
    handed = ("parameter", "buffer", "input")
    nodes = (
        replace(node, role="saved") if node.op == "input" and node.role in handed else node for node in graph.nodes
    )
    return graph.with_nodes(tuple(nodes))


def _state(captured: Captured) -> StateBytes:
    from .passes.planner import StateBytes

    def entries(*kinds: str) -> tuple[tuple[str, int, str], ...]:
        found = (entry for entry in captured.state.entries if entry.kind in kinds)
        return tuple((entry.name, entry.bytes, entry.module) for entry in found)

    return StateBytes(entries("parameter"), entries("gradient"), entries("optimizer", "master"), entries("buffer"))


def _captured_identities(plan: Plan, captured: Captured) -> tuple[GraphPlan, ...]:
    """The plan's graphs with the hashes of the Dynamo graphs they come from: by those a plan is matched elsewhere."""
    from .ir.structural_hash import graph_hash, op_hashes

    forwards: list[Graph] = [frame.dynamo for frame in captured.frames]
    backwards = [frame.dynamo for frame in reversed(captured.frames) if frame.backward is not None]
    return tuple(
        msgspec.structs.replace(entry, graph_hash=graph_hash(origin), op_hashes=op_hashes(origin))
        for entry, origin in zip(plan.graphs, [*forwards, *backwards], strict=True)
    )


def _graph_breaks(captured: Captured) -> tuple[str, ...]:
    # Of an installed package, the path in it is enough.
    return tuple(
        f"graph break at {item.file.rpartition('site-packages/')[2]}:{item.line}: {item.reason}"
        for item in captured.graph_breaks
    )
