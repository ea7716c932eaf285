"""The plan of a compiled step: what its wrappers do with memory, its predicted peak, and its scratch arena."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .codegen.region_compiler import CompiledSegments
from .codegen.region_memory import SegmentMemory, memory_of_segments
from .codegen.scratch import call_function, movable, use_scratch
from .codegen.scratch_choice import choose_layouts, without
from .cost_model.devices import load_device
from .cost_model.region_memory import RegionMemory
from .errors import EffccError
from .ir.graph import Graph
from .ir.plan import Plan
from .passes.planner import make_plan
from .runtime.compiled_graph import CompiledGraph
from .runtime.scratch import pool


@dataclass
class _Member:
    compiled: CompiledSegments
    result: CompiledGraph
    memory: SegmentMemory


@dataclass
class StepPlanner:
    """Collects the compiled graphs of one model: forward and backward, or inference."""

    #: What costs are taken from: a name or file, see ``cost_model.devices``.
    device: str
    members: dict[str, _Member] = field(default_factory=dict)

    def add(self, name: str, compiled: CompiledSegments, result: CompiledGraph) -> None:
        self.members[name] = _Member(compiled, result, memory_of_segments(compiled, f"{name}/"))

    def plan(self, graphs: Sequence[Graph], moved: Mapping[str, frozenset[str]] | None = None) -> Plan:
        """Plan of the step; ``moved`` buffers (by segment identity) are left out."""
        return make_plan(
            "model",
            graphs,
            load_device(self.device),
            None,
            functools.partial(self.region_memory, moved or {}),
            place=False,
        )

    def plan_or_none(self, graphs: Sequence[Graph]) -> Plan | None:
        """The plan, or None where there is nothing to plan (a graph was compiled as captured)."""
        try:
            return self.plan(graphs) if graphs else None
        except EffccError:
            return None

    def region_memory(self, moved: Mapping[str, frozenset[str]], region: Graph) -> RegionMemory | None:
        for member in self.members.values():
            found = member.memory.of_region(region)
            if found is not None:
                identity, memory = found
                return without(memory, moved.get(identity, frozenset()))
        return None

    def use_scratch(self, graphs: Sequence[Graph]) -> None:
        """Move internal buffers of CPU regions to the scratch arena where the step's peak allows it."""
        movables = {
            f"{name}/{identity}": movable(member.memory.by_identity[f"{name}/{identity}"], code.source)
            for name, member in self.members.items()
            for identity, code in member.compiled.code.items()
            if f"{name}/{identity}" in member.memory.by_identity and call_function(code.run) is not None
        }
        if not any(movables.values()):
            return
        try:
            layouts = choose_layouts(movables, lambda moved: self.plan(graphs, moved).peak.get("device", 0))
        except EffccError:  # sizes that are only known at run time: the regions allocate for themselves
            return
        arena = pool("cpu")
        for name, member in self.members.items():
            for identity, code in member.compiled.code.items():
                chosen = layouts.get(f"{name}/{identity}")
                found = call_function(code.run)
                if chosen is None or found is None:
                    continue
                function, runner = found
                function.__globals__["_effcc_scratch"] = arena
                arena.reserve(chosen.height)
                moved = types.MethodType(use_scratch(function, code.source, chosen, arena), runner)
                member.result.replace(member.compiled.functions[identity], moved)
