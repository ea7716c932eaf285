"""From a model to a plan, on any machine: capture, passes, plan, check. ``effcc plan`` is a shell around it."""

from __future__ import annotations

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
from .passes.dump import PassRecord
from .plan_capture import capture_for, cascade_watch, fusion_for, joint_passes, load_spec, spec_of_module
from .plan_copies import with_copies
from .plan_request import BUDGET_PIPELINE, PIPELINE, PlanRequest, budget_bytes, check_options
from .plan_streams import with_streams
from .stage_times import StageTimes
from .summary import Summary, device_named, summarize

if TYPE_CHECKING:
    import torch

    from .budget_planning import BudgetPlanner, ParetoPoint
    from .cascade_fusion import CascadeFusion
    from .frontend.capture import Captured
    from .frontend.model_file import ModelSpec
    from .passes.activation.choice import ActivationChoice
    from .passes.flatten import RegionBuffers
    from .passes.planner import StateBytes


Progress = Callable[[str], AbstractContextManager[None]]


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
    return plan_model(request, spec=spec_of_module(model, example_inputs, loss))


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

    Under a memory budget cascades are fused where that is faster; where more could be fused for the memory that it
    saves, and something is computed again without, the step is planned both ways, as ``torch.compile`` does it.

    Raises:
        ModelFileError, CaptureError: the file offers no model, or the model cannot be traced.
        OptionError, DeviceError: an option's value is not understood.
        BudgetError: the plan needs more than the budget; the message says the least that works and what holds it.
        PassError, PlanError: a fault of ours, with what to send us.
    """
    device = device_named(request.device)
    check_options(request)
    budgeted = request.train and (request.memory_budget is not None or request.pareto)

    def planned(fusion: CascadeFusion | None) -> Planned:
        return _plan_as_fused(request, device, fusion, progress, spec, captured)

    def fused(short_of_memory: bool) -> CascadeFusion | None:
        return fusion_for(device, short_of_memory, budgeted) if request.fuse else None

    if not budgeted or request.pareto or captured is not None:
        return planned(fused(budgeted))
    fusion = fused(False)
    try:
        made = planned(fusion)
    except BudgetError:
        if fusion is None or not fusion.more_if_short:
            raise
        return planned(fused(True))
    if fusion is None or not fusion.more_if_short or all(each.rule == "keep" for each in made.activations):
        return made
    try:
        return min(made, planned(fused(True)), key=lambda each: each.plan.seconds)
    except BudgetError:
        return made


def _plan_as_fused(
    request: PlanRequest,
    device: Device,
    fusion: CascadeFusion | None,
    progress: Progress,
    spec: ModelSpec | None,
    captured: Captured | None,
) -> Planned:
    from .ir.plan_validator import validate
    from .ir.printer import print_graph
    from .passes.manager import PassManager
    from .passes.pipeline import parse_pipeline
    from .passes.planner import make_plan

    budgeted = request.train and (request.memory_budget is not None or request.pareto)
    pipeline = request.pipeline if not budgeted or request.pipeline != PIPELINE else BUDGET_PIPELINE
    passes = parse_pipeline(pipeline)
    planner = _budget_planner(device, request.swap) if budgeted else None
    if planner is not None and fusion is not None and captured is None:
        planner.otherwise = lambda: fusion.more_if_short
    watch = cascade_watch() if request.cascades else None
    progress = times = StageTimes(progress)
    with progress("capture"):
        if captured is None:
            spec = spec or load_spec(request.model)
            with joint_passes(watch, fusion):
                captured = capture_for(request, device, spec, planner)
        for line in (*captured.notes, *_graph_breaks(captured)):
            logger("capture").info("%s", line)
    manager = PassManager(passes, dump_dir=request.dump_dir, verify=request.verify)
    #: What the passes made of each captured graph: another split of one graph leaves the others as they are.
    passed: dict[int, tuple[Graph, Graph]] = {}
    #: The plans that were made, each with its graphs; one of them is taken in the end.
    plans: list[tuple[Plan, list[Graph]]] = []

    def after_passes(graph: Graph) -> Graph:
        if id(graph) not in passed:
            with progress(f"passes on {graph.name} ({len(graph.nodes)} ops)"):
                passed[id(graph)] = graph, manager.run(_with_saved_roles(graph))
        return passed[id(graph)][1]

    def make(captured: Captured) -> Plan:
        graphs = [after_passes(graph) for graph in captured.graphs]
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
        plans.append((plan, graphs))
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
    graphs = next(graphs for plan, graphs in plans if plan is made)
    if plans[-1][0] is not made and manager.directory is not None:  # dumps end in what is taken
        passed.clear()
        for graph in captured.graphs:
            after_passes(graph)
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


def _ordered_memory(device: Device, sizes: Mapping[str, int]) -> RegionBuffers:
    from .passes.activation.ordered_memory import ordered_memory

    return lambda region: ordered_memory(region, device, sizes)


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
