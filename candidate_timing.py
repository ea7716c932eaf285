"""The option ``measure_candidates``: schedules of a graph that the cost model cannot tell apart are run, and the faster
one is kept.

Twice: ways to generate a kernel (``codegen.variant_timing``) while it is chosen what is fused; then the graph with its
cascades fused and as it is written. Where predicted times differ by more than the model errs, the prediction decides
and nothing is run. What was measured is remembered in the cache directory.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import torch

from . import torch_internals
from .codegen.region_store import source_digest
from .cost_model.gemm_measurement import machine_name
from .errors import EffccError
from .graph_compiler import Compilation
from .held_elsewhere import real_inputs
from .ir.plan import Alternative, Decision
from .logs import logger
from .runtime.cache_directory import usable_directory
from .runtime.reports import add_report, forget

#: Predicted times whose quotient is below this are not told apart: the model's worst error on steps.
APART = 1.25
#: Runs of each candidate after one to warm up, in turns.
ROUNDS = 5

_log = logger("compile")


class Timed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Median seconds of each candidate, by name."""

    seconds: dict[str, float]


def compile_faster(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], compilation: Compilation
) -> Callable[..., Any]:
    """Compile ``gm`` with its cascades, and, where that may not be faster, without; returns what is faster."""
    plain_options = replace(compilation.options, cascades=False)
    before = torch_internals.copy_graph(gm)
    # Cascades that the prediction speaks against, but not clearly, are candidates too.
    compilation.fusion.choice = replace(compilation.fusion.choice, gain=1 / APART)
    compilation.fusion.measured = usable_directory(compilation.options.cache_path())
    fused = compilation.run(torch_internals.copy_graph(gm), example_inputs)
    if not compilation.fusion.reports:
        return fused
    plain = Compilation(plain_options, compilation.number, compilation.roles, compilation.given_plan)
    made = {"fused": fused, "as written": plain.run(before, example_inputs)}
    owner = {"fused": compilation, "as written": plain}
    predicted = {name: _predicted(each) for name, each in owner.items()}
    chosen, seconds = _decided(predicted), dict[str, float]()
    if chosen is None:
        seconds = _known(gm, compilation) or _measured(made, gm)
        _remember(gm, compilation, seconds)
        chosen = min(seconds, key=seconds.__getitem__) if seconds else min(predicted, key=predicted.__getitem__)
    values = seconds or predicted
    owner[chosen].decisions.append(
        Decision(
            kind="candidates",
            subject=f"{len(compilation.fusion.reports)} cascades of graph {compilation.number}",
            chosen=chosen,
            alternatives=tuple(
                Alternative(what=name, value=value, measured=bool(seconds)) for name, value in values.items()
            ),
        )
    )
    _log.info("graph %d runs %s: %s", compilation.number, chosen, {n: f"{1e3 * v:.3g} ms" for n, v in values.items()})
    forget([name for each in owner.values() for name in each.planner.members])
    for member in owner[chosen].planner.members.values():
        add_report(member.result.report)
    return made[chosen]


def _predicted(compilation: Compilation) -> float:
    plan = compilation.planner.plan_or_none()
    return plan.seconds if plan is not None else 0.0


def _decided(predicted: dict[str, float]) -> str | None:
    """The candidate that the prediction alone speaks for; None where it does not tell them apart."""
    best, other = sorted(predicted, key=predicted.__getitem__)
    return best if predicted[best] > 0 and predicted[other] > APART * predicted[best] else None


def _measured(made: dict[str, Callable[..., Any]], gm: torch.fx.GraphModule) -> dict[str, float]:
    """Median seconds of each candidate, forward and backward, on copies of the inputs; none where an input is not
    known or a candidate does not run on its own."""
    from torch.utils._python_dispatch import _disable_current_modes

    given = real_inputs(gm)
    if any(value is None for value in given):
        return {}
    steps = {name: _step(run, given) for name, run in made.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    try:
        with _disable_current_modes(), torch.random.fork_rng(devices=_cuda_devices(given)), torch.enable_grad():
            for number in range(ROUNDS + 1):
                for name, step in steps.items():
                    begin = time.perf_counter()
                    step()
                    if number:
                        seconds[name].append(time.perf_counter() - begin)
    except RuntimeError as error:  # it needs more than its inputs: an autograd context, a process group
        _log.info("candidates were not measured: %s", error)
        return {}
    return {name: statistics.median(times) for name, times in seconds.items()}


def _step(run: Callable[..., Any], given: Sequence[Any]) -> Callable[[], None]:
    def copied(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach().clone(memory_format=torch.preserve_format).requires_grad_(value.requires_grad)

    inputs = [copied(value) for value in given]
    wanted = [value for value in inputs if isinstance(value, torch.Tensor) and value.requires_grad]

    def step() -> None:
        made = run(*inputs)
        results = [each for each in made if isinstance(each, torch.Tensor) and each.requires_grad]
        if wanted and results:
            tangents = [torch.ones_like(each) for each in results]
            torch.autograd.grad(results, wanted, tangents, allow_unused=True)
        if any(isinstance(value, torch.Tensor) and value.is_cuda for value in inputs):
            torch.cuda.synchronize()

    return step


def _cuda_devices(given: Sequence[Any]) -> list[torch.device]:
    found = [value.device for value in given if isinstance(value, torch.Tensor) and value.is_cuda]
    return list(dict.fromkeys(found))


def _path(gm: torch.fx.GraphModule, compilation: Compilation) -> Any:
    """Where what was measured of this graph on this machine is kept."""
    shapes = [str(node.meta.get("example_value")) for node in gm.graph.find_nodes(op="placeholder")]
    text = "\n".join((gm.print_readable(print_output=False), *shapes, machine_name(), source_digest()))
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    return usable_directory(compilation.options.cache_path()) / f"candidates-{digest}.json"


def _known(gm: torch.fx.GraphModule, compilation: Compilation) -> dict[str, float] | None:
    try:
        return msgspec.json.decode(_path(gm, compilation).read_bytes(), type=Timed).seconds or None
    except (OSError, msgspec.DecodeError):
        return None


def _remember(gm: torch.fx.GraphModule, compilation: Compilation, seconds: dict[str, float]) -> None:
    from .ir.plan_file import write_atomically

    if not seconds:
        return
    try:
        write_atomically(_path(gm, compilation), msgspec.json.encode(Timed(seconds)))
    except EffccError as error:
        _log.info("what was measured is not kept: %s", error.message)
