"""The capture of a model that ``effcc plan`` plans, with the passes that look at its joint graphs on the way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from .cost_model.devices import Device
from .errors import OptionError
from .plan_request import PlanRequest, check_options
from .summary import device_named

if TYPE_CHECKING:
    import torch

    from .budget_planning import BudgetPlanner
    from .cascade_fusion import CascadeFusion
    from .cascade_watch import CascadeWatch
    from .frontend.capture import Captured
    from .frontend.model_file import ModelSpec
    from .passes.raising.analysis import GraphAnalysis


def capture_model(request: PlanRequest) -> Captured:
    """The capture that ``plan_model`` plans, to be planned for several devices of one kind. Raises what it raises."""
    check_options(request)
    device = device_named(request.device)
    with joint_passes(None, fusion_for(device, False) if request.fuse else None):
        return capture_for(request, device, load_spec(request.model))


def cascade_analyses(model_file: str, *, train: bool) -> list[GraphAnalysis]:
    """The groups of each captured graph of a model file that one kernel could compute, and why others stay; a repeated
    layer is one graph. Raises ModelFileError, CaptureError."""
    from .cascade_watch import CascadeWatch
    from .frontend.capture import capture
    from .passes.raising.analysis import analyse
    from .passes.raising.choose import Choice, Rates

    watch = CascadeWatch()
    spec = load_spec(model_file)
    with watch.watching():
        capture(spec, train=train)
    choice = Choice(Rates.of(device_named("cpu")))
    return [analyse(graph, graph.name, choice) for graph in watch.graphs]


def spec_of_module(
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


def load_spec(model_file: str) -> ModelSpec:
    from .frontend.model_file import load_model_file
    from .frontend.without_weights import Weightless

    with Weightless().building():
        return load_model_file(model_file)


def capture_for(
    request: PlanRequest, device: Device, spec: ModelSpec, planner: BudgetPlanner | None = None
) -> Captured:
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


def fusion_for(device: Device, short_of_memory: bool, looks_ahead: bool = False) -> CascadeFusion | None:
    """None for a GPU that kernels are not made for. ``looks_ahead``: whether to find out if more would be fused where
    memory is short."""
    from .cascade_fusion import CascadeFusion, choice_for
    from .codegen.triton_tiles.target import CAPABILITIES, Target

    if device.kind != "cpu" and device.name not in CAPABILITIES:
        return None
    target = None if device.kind == "cpu" else Target.of_device(device)
    return CascadeFusion(
        choice_for(device, short_of_memory),
        compiles=False,
        target=target,
        short_of_memory=short_of_memory,
        looks_ahead=looks_ahead,
    )


def joint_passes(watch: CascadeWatch | None, fusion: CascadeFusion | None) -> AbstractContextManager[Any]:
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


def cascade_watch() -> CascadeWatch:
    from .cascade_watch import CascadeWatch

    return CascadeWatch()
