"""``torch.compile(model, backend="effcc")``: from Dynamo's graph to a compiled one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from . import torch_internals
from .budget_loop import compile_within_budget
from .candidate_timing import compile_faster
from .cost_model.devices import load_device
from .frontend.repeated_modules import inline_repeated, trace_repeated_modules_once
from .graph_compiler import Compilation, input_role
from .logs import logger, set_up_once
from .options import Options, parse_options
from .plan_matching import decided_by, matching_plan
from .runtime.cache_directory import code_directory

_numbers = itertools.count()
_log = logger("compile")


@trace_repeated_modules_once
def effcc(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | Options | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph, forward and backward. Registered as the backend ``effcc``.

    options: see ``effcc.options.Options``. mode: torch.compile's, for instance ``reduce-overhead``.
    Raises OptionError for unknown options, DeviceError for an unknown device, PlanError for a plan that does not fit
    the model.
    """
    set_up_once()
    inline_repeated(gm)
    roles = [input_role(node) for node in gm.graph.find_nodes(op="placeholder")]
    settings = parse_options(options)
    if settings.device is not None:
        load_device(settings.device)
    plan = matching_plan(settings.plan, gm, roles) if settings.plan is not None else None
    settings = decided_by(plan, settings)
    compilation = Compilation(settings, next(_numbers), roles, plan)
    again = " again (effcc.explain() says why)" if torch_internals.is_recompilation() else ""
    _log.info("graph %d of %d nodes is compiled%s", compilation.number, len(gm.graph.nodes), again)
    with (
        torch_internals.graph_settings(),
        torch_internals.cache_directory(code_directory(settings.chosen_cache())),
        torch_internals.inductor_settings(torch_internals.mode_options(mode)),
    ):
        if settings.memory_budget is not None:
            return compile_within_budget(gm, example_inputs, compilation)
        if settings.measure_candidates and settings.cascades and plan is None:
            return compile_faster(gm, example_inputs, compilation)
        return compilation.run(gm, example_inputs)
