"""Compile a graph under a memory budget: plan, compile, look at what was compiled, and try again where it is over."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import torch_internals
from .activation_planner import MOST_ATTEMPTS, ActivationPlanner, OverBudgetError
from .graph_compiler import Compilation, cost_device
from .held_elsewhere import held_elsewhere, note_graph, real_inputs
from .runtime.reports import GraphReport, forget
from .summary import device_named


def compile_within_budget(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], compilation: Compilation
) -> Callable[..., Any]:
    """Compile ``gm`` so that its step stays within the option ``memory_budget``.

    Raises BudgetError where that is not possible, with the least budget that is and what holds it.
    """
    budget = budget_in_bytes(compilation.options.memory_budget, example_inputs)
    options = dataclasses.replace(compilation.options, memory_budget=budget)
    name = compilation.options.device or cost_device(example_inputs, GraphReport("", ""))
    device = device_named(name)
    inputs = real_inputs(gm)
    elsewhere = held_elsewhere(inputs, device)
    planner = ActivationPlanner(budget, lambda: device, compilation.roles, elsewhere, options.swap)
    if elsewhere.optimizer_step > budget:
        # Refused whatever is kept; the least that the graph itself can do with says what budget would work.
        planner.exhausted = planner.frugal = True
    if options.swap:
        from .runtime.host_tier import set_directory

        set_directory(options.swap_dir)
    for attempt in range(MOST_ATTEMPTS):
        current = Compilation(options, compilation.number, compilation.roles, compilation.given_plan)
        current.activation = planner
        planner.exhausted = planner.exhausted or attempt + 1 == MOST_ATTEMPTS
        settings = {"allow_buffer_reuse": False} if planner.frugal else {}
        before = torch_internals.copy_graph(gm)
        try:
            with torch_internals.joint_partitioner(planner.partition), torch_internals.inductor_settings(settings):
                made = current.run(before, example_inputs)
            if planner.choice is not None:
                note_graph(inputs, planner.choice.saved_bytes)
            return made
        except Exception as error:
            if not isinstance(torch_internals.compile_error_cause(error), OverBudgetError):
                raise
            forget(list(current.planner.members))
    raise AssertionError("the last attempt either fits or names the floor")


def budget_in_bytes(given: int | str | None, example_inputs: Sequence[Any]) -> int:
    """The option's value; ``"auto"`` is what is free on the device, and what this process holds there already."""
    if isinstance(given, int):
        return given
    devices = [value.device for value in example_inputs if isinstance(value, torch.Tensor)]
    device = next((device for device in devices if device.type == "cuda"), None)
    if device is not None:
        return int(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    import psutil

    own = {value.untyped_storage()._cdata: value.untyped_storage().nbytes() for value in _tensors(example_inputs)}
    return int(psutil.virtual_memory().available + sum(own.values()))


def _tensors(values: Sequence[Any]) -> list[torch.Tensor]:
    return [value for value in values if isinstance(value, torch.Tensor)]
