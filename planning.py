"""From a model file to a plan, on any machine: capture, passes, plan, check. `effcc plan` is a shell around it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from .cost_model.devices import Device, load_device
from .errors import OptionError
from .ir.graph import Graph
from .ir.plan import GraphPlan, Plan
from .passes.dump import PassRecord

if TYPE_CHECKING:
    from .frontend.capture import Captured

#: What is done to every captured graph before it is planned.
PIPELINE = "normalize,repeated-structure,regions,schedule"

Progress = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class PlanRequest:
    """What ``effcc plan`` is asked for. ``memory_budget`` is in bytes."""

    model: str
    train: bool = False
    optimizer: str | None = None
    dtype: str | None = None
    device: str = "cpu"
    memory_budget: int | None = None
    dynamic: bool = False
    pipeline: str = PIPELINE
    dump_dir: Path | None = None
    verify: bool = True


@dataclass(frozen=True)
class Planned:
    """A checked plan with the text of its graphs."""

    plan: Plan
    graphs_text: dict[str, str]
    records: tuple[PassRecord, ...]
    captured: Captured


def plan_model(request: PlanRequest, progress: Progress = lambda _: nullcontext()) -> Planned:
    """Capture a model file, run the passes, make the plan and have it checked by the independent validator.

    Raises:
        ModelFileError, CaptureError: the file offers no model, or the model cannot be traced.
        OptionError, DeviceError: an option's value is not understood.
        PassError, PlanError: a fault of ours, with what to send us.
    """
    from .ir.plan_validator import validate
    from .ir.printer import print_graph
    from .passes.manager import PassManager
    from .passes.pipeline import parse_pipeline
    from .passes.planner import make_plan

    device = load_device(request.device)
    if request.optimizer is not None and not request.train:
        raise OptionError("--optimizer without --train", remedy="add --train: only a training step has an optimizer")
    passes = parse_pipeline(request.pipeline)
    with progress("capture"):
        captured = _capture(request, device)
    manager = PassManager(passes, dump_dir=request.dump_dir, verify=request.verify)
    graphs = []
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
            optimizer=_optimizer_name(request, captured),
        )
        plan = msgspec.structs.replace(
            plan,
            graphs=_captured_identities(plan, captured),
            notes=(*plan.notes, *captured.notes, *_graph_breaks(captured)),
        )
    with progress("validate"):
        validate(plan)
    texts = {entry.name: print_graph(graph) for entry, graph in zip(plan.graphs, graphs, strict=True)}
    return Planned(plan, texts, tuple(manager.records), captured)


def _capture(request: PlanRequest, device: Device) -> Captured:
    from .frontend.capture import capture
    from .frontend.model_file import load_model_file
    from .frontend.without_weights import Weightless

    with Weightless().building():
        spec = load_model_file(request.model)
    return capture(
        spec,
        train=request.train,
        optimizer=request.optimizer,
        dtype=request.dtype,
        device="cpu" if device.kind == "cpu" else "cuda",
        dynamic=True if request.dynamic else None,
    )


def _with_saved_roles(graph: Graph) -> Graph:
    """A backward graph in which parameters and inputs of the model that it reads have the role ``saved`` too.

    The forward hands them on among its saved values, and the planner pairs the two lists.
    """
    if graph.phase != "backward":
        return graph
    handed = ("parameter", "buffer", "input")
    nodes = (replace(node, role="saved") if node.op == "input" and node.role in handed else node for node in graph.nodes)
    return graph.with_nodes(tuple(nodes))


def _optimizer_name(request: PlanRequest, captured: Captured) -> str:
    return request.optimizer or ("adamw" if captured.state.optimizer else "")


def _state(captured: Captured):  # type: ignore[no-untyped-def]
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
    return tuple(f"graph break at {item.file}:{item.line}: {item.reason}" for item in captured.graph_breaks)
