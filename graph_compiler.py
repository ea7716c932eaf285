"""One ATen graph from capture to compiled code: IR, passes, regions, host module, report."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch

from . import torch_internals
from .activation_planner import ActivationPlanner, OverBudgetError
from .captured_graph import CapturedGraph
from .cascade_fusion import CascadeFusion, choice_for
from .codegen.host_module import constants_of, host_source
from .codegen.kernel_batch import Collector
from .codegen.kernel_order import kernel_order
from .codegen.known_faults import avoid_faults
from .codegen.region_compiler import CompiledSegments, compile_segments, cut_again, source_of
from .codegen.region_store import (
    GraphRecord,
    load_record,
    load_regions,
    record_key,
    record_of,
    save_record,
    with_scratch,
)
from .codegen.scratch import ScratchLayout
from .codegen.shared_values import shared_values
from .cost_model.devices import device_titled
from .cost_model.gemm_measurement import GemmMeasurements
from .errors import BudgetError, CompileError
from .formatting import bytes_text
from .held_elsewhere import Elsewhere
from .ir.plan import Decision, Plan
from .options import Options
from .passes.manager import DUMP_VARIABLE
from .runtime.cache_directory import usable_directory
from .runtime.compiled_graph import CompiledGraph
from .runtime.freed_memory import keep_freed_memory
from .runtime.peak_meter import PeakMeter
from .runtime.reports import GraphReport, RegionReport, add_report
from .step_planner import Member, StepPlanner, move_to_scratch
from .summary import summarize


@dataclass
class Compilation:
    """What one captured model's graphs share: options, number, and the graphs compiled so far."""

    options: Options
    number: int
    #: parameter, buffer or input, for each input of Dynamo's graph.
    roles: list[str] = field(default_factory=list)
    #: A plan made earlier for this graph, if one was given.
    given_plan: Plan | None = None
    forward: torch.fx.GraphModule | None = None
    planner: StepPlanner = field(init=False)
    meter: PeakMeter = field(default_factory=PeakMeter)
    fusion: CascadeFusion = field(default_factory=CascadeFusion)
    #: Whether a graph of the step came out of the cache.
    restored: bool = False
    #: Chooses what forwards save, where there is a budget; and whether cascades are fused for the memory they save.
    activation: ActivationPlanner | None = None
    short_of_memory: bool = False
    #: What was decided of the graph as a whole.
    decisions: list[Decision] = field(default_factory=list)
    #: Records to be kept once the whole step is compiled, by key.
    records: dict[str, tuple[Member, GraphRecord]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        budgeted = self.options.memory_budget is not None
        self.planner = StepPlanner(self.options.device or "cpu", self.options.gemm, outside_loss=budgeted)
        self.fusion.short_of_memory = self.short_of_memory
        self.fusion.looks_ahead = budgeted
        self.fusion.choice = choice_for(self.planner.costs, self.short_of_memory)

    def run(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile Dynamo's graph, forward and backward."""
        if self.options.keep_freed_memory:
            keep_freed_memory()
        key = "effcc cascades" if self.options.cascades else "effcc"
        with torch_internals.joint_pass(self.prepare_joint, key):
            return torch_internals.compile_fx(gm, example_inputs, self.compile)  # type: ignore[no-any-return]

    @property
    def stores_shared(self) -> bool:
        """Where every byte counts, nothing is held that could be computed again."""
        return self.activation is None or not self.activation.exhausted

    def prepare_joint(self, graph: torch.fx.Graph) -> None:
        avoid_faults(graph)
        if self.options.cascades:
            self.fusion(graph)

    def compile(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        """Inductor's ``inner_compile``: ``gm`` (forward, backward or inference) as a boxed callable."""
        if torch_internals.cudagraphs_wanted(kwargs):
            # A CUDA graph records the whole call, so the graph stays one region.
            return torch_internals.compile_region(gm, example_inputs, **kwargs)
        begin = time.perf_counter()
        phase = "backward" if kwargs.get("is_backward") else "inference" if kwargs.get("is_inference") else "forward"
        report = GraphReport(name=f"graph_{self.number}_{phase}", phase=phase)
        self.planner.device = self.options.device or cost_device(example_inputs, report)
        torch_internals.refresh_values(gm, example_inputs)
        source = self.source(gm, report)
        near = self.activation.fusions(phase) if self.activation is not None else contextlib.nullcontext()
        stored = shared_values(self.planner.costs) if self.stores_shared else contextlib.nullcontext()
        with torch_internals.region_settings(), kernel_order(self.options.kernel_order), stored, near:
            # Dumps show passes at work, so they are run.
            key = None if wants_dumps(self.options) else record_key(gm, example_inputs, kwargs, self.options.gemm)
            result = self.restore(key, source, report, kwargs) or self.compile_anew(key, source, report, kwargs)
        report.make_plan = self.plan
        report.activation = self.activation.choice if self.activation is not None else None
        report.make_graph = functools.partial(getattr, self.planner.members[report.name], "graph")
        report.not_fused = self.fusion.refused
        if phase != "forward":
            self.finish_step()
        report.cascades = self.fusion.reports
        report.compile_seconds = time.perf_counter() - begin
        add_report(report)
        return result

    def source(self, gm: torch.fx.GraphModule, report: GraphReport) -> CapturedGraph:
        (output,) = gm.graph.find_nodes(op="output")
        saved = torch_internals.saved_outputs(len(output.args[0])) if report.phase == "forward" else 0
        before = self.forward if report.phase == "backward" else None
        if report.phase != "backward":
            self.forward = gm
        fits = len(self.roles) == len(gm.graph.find_nodes(op="placeholder"))
        roles = self.roles if fits and report.phase != "backward" else None
        return CapturedGraph(gm, report.name, report.phase, roles, saved, before, self.options)

    def compile_anew(
        self, key: str | None, source: CapturedGraph, report: GraphReport, kwargs: dict[str, Any]
    ) -> CompiledGraph:
        rewritten = source.rewritten
        report.notes += rewritten.notes
        compiled = compile_segments(rewritten.module, kwargs, gemm=self.gemm(), strict=self.options.fallback == "error")
        functions = compiled.functions
        names = [functions[segment.identity] for segment in compiled.segments]
        report.host_source = host_source(
            rewritten.module, compiled.segments, names, f"{report.name}, generated by effcc"
        )
        namespace = constants_of(rewritten.module, compiled.segments)
        namespace.update({functions[identity]: code.run for identity, code in compiled.code.items()})
        fill_report(report, compiled)
        result = CompiledGraph(report.host_source, namespace, report, self.meter)
        strides = output_strides(rewritten.module, compiled)
        member = self.add_member(result, source, lambda: compiled, compiled.collector)
        record = record_of(compiled, report.host_source, strides, report.notes) if key is not None else None
        if key is not None and record is not None:
            self.records[key] = (member, record)
        torch_internals.report_output_strides(strides)
        return result

    def restore(
        self, key: str | None, source: CapturedGraph, report: GraphReport, kwargs: dict[str, Any]
    ) -> CompiledGraph | None:
        """The graph as an earlier process compiled it, None when nothing is kept of it."""
        record = load_record(key) if key is not None else None
        collector = Collector()
        code = load_regions(record, source.module, kwargs, collector) if record is not None else None
        if record is None or code is None:
            return None
        report.host_source = record.host_source
        report.notes += record.notes
        for region in record.regions:
            entry = code[region.function]
            report.regions.append(
                RegionReport(
                    name=region.function.lstrip("_"),
                    kind=region.kind,
                    calls=region.calls,
                    ops=region.ops,
                    kernels=region.kernels,
                    library=region.library,
                    source=entry.source,
                )
            )
        namespace = {name: each.run for name, each in code.items()}
        result = CompiledGraph(record.host_source, namespace, report, self.meter)
        for region in record.regions:
            if region.scratch is not None:
                layout = ScratchLayout(region.scratch.offsets, region.scratch.height)
                move_to_scratch(result, region.function, code[region.function], layout)

        def segments() -> CompiledSegments:
            by_identity = {region.identity: code[region.function] for region in record.regions}
            return cut_again(source.rewritten.module, by_identity, collector)

        self.add_member(result, source, segments, collector)
        self.restored = True
        torch_internals.report_output_strides(record.output_strides)
        return result

    def add_member(
        self,
        result: CompiledGraph,
        source: CapturedGraph,
        make_compiled: Callable[[], CompiledSegments],
        collector: Collector,
    ) -> Member:
        member = Member(source.name, result, make_compiled, lambda: source.rewritten.graph)
        result.finish = functools.partial(self.finish, member, collector)
        self.planner.members[source.name] = member
        return member

    def finish_step(self) -> None:
        """All graphs of the step are compiled: share out the scratch arena, check the budget, keep the records."""
        # A restored graph has its place in the arena already.
        scratch = {} if self.restored else self.planner.choose_scratch()
        for name, layouts in scratch.items():
            member = self.planner.members[name]
            for identity, layout in layouts.items():
                code = member.compiled.code[identity]
                move_to_scratch(member.result, member.compiled.functions[identity], code, layout)
        self.fusion.finish(strict=self.options.fallback == "error")
        self.keep_budget()
        for key, (member, record) in self.records.items():
            save_record(key, with_scratch(record, scratch.get(member.name, {})))
        self.records.clear()

    def finish(self, member: Member, collector: Collector) -> None:
        """Before the first run: wait for the kernels. A region whose kernels do not compile runs as eager ops.
        Raises CompileError instead where the option ``fallback`` says so."""
        report = member.result.report
        begin = time.perf_counter()
        failed = collector.finish()
        report.wait_seconds = time.perf_counter() - begin
        for identity, reason in failed.items():
            segment = member.compiled.first(identity)
            if self.options.fallback == "error":
                raise CompileError(
                    f"the kernels of a region of {len(segment.ops)} ops do not compile: {reason}",
                    where=source_of(segment),
                    remedy="Install a C++ compiler (or set CXX), or leave the option fallback at 'eager'.",
                )
            member.result.replace(member.compiled.functions[identity], member.compiled.eager[identity].run)
            report.fall_back(f"{len(segment.ops)} ops", reason, source_of(segment), member.compiled.functions[identity])

    def gemm(self) -> GemmMeasurements:
        return gemm_measurements(str(usable_directory(self.options.cache_path())), self.options.gemm)

    def plan(self) -> Plan | None:
        """The plan that was given, else one made from what was compiled."""
        made = self.given_plan or self.planner.plan_or_none()
        found = (*self.fusion.decisions, *self.decisions)
        if made is None or not found:
            return made
        return msgspec.structs.replace(made, decisions=(*made.decisions, *found))

    def keep_budget(self) -> None:
        """Raises BudgetError when the step does not fit in the option ``memory_budget``."""
        budget = self.options.memory_budget
        if not isinstance(budget, int):
            return
        plan = self.planner.plan_or_none()
        if plan is None:
            raise BudgetError(
                "this step's memory cannot be bounded: a graph has sizes that are known only at run time, or ops that "
                "the IR does not carry",
                where="option 'memory_budget'",
                remedy="Leave memory_budget out, or compile without dynamic shapes.",
            )
        elsewhere = self.activation.elsewhere if self.activation is not None else Elsewhere()
        peak = plan.peak.get("device", 0) + elsewhere.bytes
        if max(peak, elsewhere.optimizer_step) > budget:
            if peak > budget and self.activation is not None and self.activation.exceeded(peak):
                raise OverBudgetError(peak)
            least = min(peak, self.activation.least or peak) if self.activation is not None else peak
            if elsewhere.optimizer_step > least:
                raise _optimizer_does_not_fit(elsewhere, budget)
            held = ", ".join(
                f"{holder.role} {holder.what} {bytes_text(holder.bytes)}" for holder in summarize(plan).holders[:5]
            )
            held += f", {elsewhere.words}" if elsewhere.words else ""
            proven = self.activation.proven if self.activation is not None else 0
            below = f". No choice of what is kept gets below {bytes_text(proven)}" if proven else ""
            raise BudgetError(
                f"the step needs {bytes_text(least)} ({least} bytes), more than the budget of "
                f"{bytes_text(budget)}; most of it is {held}{below}",
                where="option 'memory_budget'",
                remedy=f"Give it at least {least} bytes, or a smaller batch.",
            )


def _optimizer_does_not_fit(elsewhere: Elsewhere, budget: int) -> BudgetError:
    least = elsewhere.optimizer_step
    return BudgetError(
        f"the optimizer's step needs {bytes_text(least)} ({least} bytes), more than the budget of "
        f"{bytes_text(budget)}: parameters, gradients, {elsewhere.words}",
        where="option 'memory_budget'",
        remedy=f"Give it at least {least} bytes, or an optimizer with less state.",
    )


def wants_dumps(options: Options) -> bool:
    return bool(options.dump_dir or os.environ.get(DUMP_VARIABLE) or os.environ.get("TORCH_TRACE"))


def cost_device(example_inputs: Sequence[Any], report: GraphReport) -> str:
    """The device file that fits what the graph's tensors lie on."""
    kinds = {value.device for value in example_inputs if isinstance(value, torch.Tensor)}
    accelerators = [device for device in kinds if device.type == "cuda"]
    if not accelerators:
        return "cpu"
    title = torch.cuda.get_device_name(accelerators[0])
    name = device_titled(title)
    if name is None:
        report.notes.append(f"no device file for {title}: predictions take the figures of h100")
    return name or "h100"


def input_role(node: torch.fx.Node) -> str:
    """What an input of Dynamo's graph is, by the name that Dynamo gives it."""
    name = str(node.target).lower()
    if isinstance(node.meta.get("example_value"), torch.SymInt | int | float):
        return "symbol"
    return "parameter" if "_parameters_" in name else "buffer" if "_buffers_" in name else "input"


@functools.cache
def gemm_measurements(directory: str, mode: str) -> GemmMeasurements:
    return GemmMeasurements(Path(directory), mode)


def output_strides(gm: torch.fx.GraphModule, compiled: CompiledSegments) -> list[tuple[int, ...] | None]:
    """Strides of the graph's outputs as its segments will really make them; None where they are as traced."""
    found: dict[torch.fx.Node, tuple[int, ...] | None] = {}
    for segment in compiled.segments:
        for node, strides in zip(segment.outputs, compiled.code[segment.identity].output_strides, strict=True):
            if node is not None:
                found[node] = strides
    (output,) = gm.graph.find_nodes(op="output")
    return [found.get(result) if isinstance(result, torch.fx.Node) else None for result in output.args[0]]


def fill_report(report: GraphReport, compiled: CompiledSegments) -> None:
    calls = Counter(segment.identity for segment in compiled.segments)
    for identity, function in compiled.functions.items():
        code, segment = compiled.code[identity], compiled.first(identity)
        report.regions.append(
            RegionReport(
                name=function.lstrip("_"),
                kind=segment.kind,
                calls=calls[identity],
                ops=len(segment.ops),
                kernels=code.kernels,
                library=code.library,
                source=code.source,
            )
        )
    for item in compiled.fallbacks:
        report.fall_back(item.op, item.reason, item.source)
