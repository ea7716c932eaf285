"""Compile a graph under a memory budget: plan, compile, look at what was compiled, and try again where it is over."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import torch_internals
from .activation_planner import MOST_ATTEMPTS, ActivationPlanner, NothingFitsError, OverBudgetError
from .errors import BudgetError
from .graph_compiler import Compilation, cost_device
from .held_elsewhere import held_elsewhere, note_graph, real_inputs
from .runtime.reports import GraphReport, add_report, forget
from .summary import device_named


def compile_within_budget(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], compilation: Compilation
) -> Callable[..., Any]:
    """Compile ``gm`` so that its step stays within the option ``memory_budget``.

    Cascades are fused where that is faster. Where more could be fused for the memory that it saves, and something is
    computed again without, the step is compiled both ways, and the one that is predicted to be faster is taken.

    Raises BudgetError where no way fits, with the least budget that does and what holds it.
    """
    budget = budget_in_bytes(compilation.options.memory_budget, example_inputs)
    options = dataclasses.replace(compilation.options, memory_budget=budget)
    name = compilation.options.device or cost_device(example_inputs, GraphReport("", ""))
    device = device_named(name, options.gemm)
    inputs = real_inputs(gm)
    elsewhere = held_elsewhere(inputs, device)
    if options.swap:
        from .runtime.host_tier import set_directory

        set_directory(options.swap_dir)

    def compiled(short_of_memory: bool) -> _Made | None:
        planner = ActivationPlanner(budget, lambda: device, compilation.roles, elsewhere, options.swap)
        if elsewhere.optimizer_step > budget:
            # Refused whatever is kept; the least that the graph itself can do with says what budget would work.
            planner.exhausted = planner.frugal = True

        def begin() -> Compilation:
            begun = Compilation(
                options,
                compilation.number,
                compilation.roles,
                compilation.given_plan,
                activation=planner,
                short_of_memory=short_of_memory,
            )
            planner.otherwise = lambda: begun.fusion.more_if_short
            return begun

        return _attempts(gm, example_inputs, planner, begin)

    made = compiled(short_of_memory=not options.cascades or elsewhere.optimizer_step > budget)
    if made is None or (made.computed_again and made.owner.fusion.more_if_short):
        made = _faster(made, lambda: compiled(short_of_memory=True))
    forget(list(made.owner.planner.members))
    for member in made.owner.planner.members.values():
        add_report(member.result.report)
    if made.planner.choice is not None:
        note_graph(inputs, made.planner.choice.saved_bytes)
    return made.run


@dataclass(frozen=True)
class _Made:
    """A step that fits."""

    run: Callable[..., Any]
    owner: Compilation
    planner: ActivationPlanner

    @property
    def computed_again(self) -> bool:
        return self.planner.choice is not None and self.planner.choice.rule == "planned"

    @property
    def seconds(self) -> float:
        plan = self.owner.planner.plan_or_none()
        return plan.seconds if plan is not None else math.inf


def _attempts(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    planner: ActivationPlanner,
    begin: Callable[[], Compilation],
) -> _Made | None:
    """None where nothing fits, but more could be fused; raises BudgetError where nothing fits."""
    for attempt in range(MOST_ATTEMPTS):
        current = begin()
        planner.exhausted = planner.exhausted or attempt + 1 == MOST_ATTEMPTS
        settings = {"allow_buffer_reuse": False} if planner.frugal else {}
        before = torch_internals.copy_graph(gm)
        try:
            with torch_internals.joint_partitioner(planner.partition), torch_internals.inductor_settings(settings):
                return _Made(current.run(before, example_inputs), current, planner)
        except Exception as error:
            cause = torch_internals.compile_error_cause(error)
            forget(list(current.planner.members))
            if isinstance(cause, NothingFitsError | BudgetError) and current.fusion.more_if_short:
                return None
            if not isinstance(cause, OverBudgetError):
                raise
    raise AssertionError("the last attempt either fits or names the floor")


def _faster(made: _Made | None, compile_otherwise: Callable[[], _Made | None]) -> _Made:
    """What is predicted to be faster: what was made, if anything, or what is compiled otherwise, if that fits."""
    try:
        other = compile_otherwise()
    except Exception as error:
        if made is None or not isinstance(torch_internals.compile_error_cause(error), BudgetError):
            raise
        return made
    assert other is not None, "where memory is short already, nothing more is fused"
    return other if made is None or other.seconds < made.seconds else made


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
