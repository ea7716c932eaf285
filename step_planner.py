"""The plan of a compiled step: what its wrappers do with memory, its predicted peak, and its scratch arena."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .codegen.region_compiler import CompiledSegment, CompiledSegments
from .codegen.region_memory import SegmentMemory, memory_of_segments
from .codegen.scratch import ScratchLayout, call_function, movable, use_scratch
from .codegen.scratch_choice import choose_layouts, without
from .cost_model.devices import Device
from .cost_model.region_memory import RegionMemory
from .errors import EffccError, PlanError
from .ir.graph import Graph
from .ir.plan import Plan
from .passes.planner import make_plan
from .runtime.compiled_graph import CompiledGraph
from .runtime.scratch import pool
from .summary import device_named


@dataclass
class Member:
    """One compiled graph of a step. What only planning and reading need is made when it is first asked for."""

    name: str
    result: CompiledGraph
    make_compiled: Callable[[], CompiledSegments]
    make_graph: Callable[[], Graph | None]

    @functools.cached_property
    def compiled(self) -> CompiledSegments:
        return self.make_compiled()

    @functools.cached_property
    def memory(self) -> SegmentMemory:
        return memory_of_segments(self.compiled, f"{self.name}/")

    @functools.cached_property
    def graph(self) -> Graph | None:
        """The graph after all passes, None where the IR cannot carry it."""
        return self.make_graph()


@dataclass
class StepPlanner:
    """Collects the compiled graphs of one model: forward and backward, or inference."""

    #: What costs are taken from: a name or file, see ``cost_model.devices``.
    device: str
    #: The option ``gemm``.
    gemm: str = "measure"
    #: Whether memory of a loss that the caller computes is counted: under a budget.
    outside_loss: bool = False
    members: dict[str, Member] = field(default_factory=dict)

    @property
    def costs(self) -> Device:
        return device_named(self.device, self.gemm)

    def plan(self, moved: Mapping[str, frozenset[str]] | None = None) -> Plan:
        """Plan of the step; ``moved`` buffers (by segment identity) are left out. Raises EffccError for a step with a
        graph that the IR cannot carry."""
        graphs = [member.graph for member in self.members.values() if member.graph is not None]
        if not graphs or len(graphs) < len(self.members):
            raise PlanError(
                "a graph of this step has no form in the IR", remedy="Its report says which op is in the way."
            )
        memory = functools.partial(self.region_memory, moved or {})
        return make_plan("model", graphs, self.costs, None, memory, place=False, outside_loss=self.outside_loss)

    def plan_or_none(self) -> Plan | None:
        try:
            return self.plan()
        except EffccError:
            return None

    def region_memory(self, moved: Mapping[str, frozenset[str]], region: Graph) -> RegionMemory | None:
        for member in self.members.values():
            found = member.memory.of_region(region)
            if found is not None:
                identity, memory = found
                return without(memory, moved.get(identity, frozenset()))
        return None

    def choose_scratch(self) -> dict[str, dict[str, ScratchLayout]]:
        """Member name -> segment identity -> the internal buffers that move to the scratch arena: as many as the step's
        peak allows."""
        movables = {
            f"{name}/{identity}": movable(member.memory.by_identity[f"{name}/{identity}"], code.source)
            for name, member in self.members.items()
            for identity, code in member.compiled.code.items()
            if f"{name}/{identity}" in member.memory.by_identity and call_function(code.run) is not None
        }
        if not any(movables.values()):
            return {}
        try:
            layouts = choose_layouts(movables, lambda moved: self.plan(moved).peak.get("device", 0))
        except EffccError:  # sizes that are only known at run time: the regions allocate for themselves
            return {}
        chosen: dict[str, dict[str, ScratchLayout]] = {}
        for key, layout in layouts.items():
            name, identity = key.split("/", 1)
            chosen.setdefault(name, {})[identity] = layout
        return chosen


def move_to_scratch(result: CompiledGraph, function: str, code: CompiledSegment, layout: ScratchLayout) -> None:
    """Let the host module's ``function`` take the laid-out buffers from the scratch arena."""
    found = call_function(code.run)
    if found is None:
        return
    call, runner = found
    arena = pool("cpu", result)
    call.__globals__["_effcc_scratch"] = arena
    arena.reserve(layout.height)
    result.replace(function, types.MethodType(use_scratch(call, code.source, layout, arena), runner))
