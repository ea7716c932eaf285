"""``effcc.compile``, ``effcc.explain`` and ``effcc.train_step``."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch

from . import torch_internals
from .activation_words import rows_in_words, sentence
from .errors import OptionError
from .formatting import bytes_text, seconds_text
from .ir.plan import Plan
from .options import Options, parse_bytes, parse_options
from .planning import Planned
from .runtime.reports import GraphReport, reports
from .suggestions import suggestions
from .summary import summarize

if TYPE_CHECKING:
    from .runtime.train_step import TrainStep

_Model = TypeVar("_Model", bound=Callable[..., Any])


@overload
def compile(
    model: _Model,
    /,
    *,
    options: Mapping[str, Any] | Options | None = None,
    mode: str | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    **named: Any,
) -> _Model: ...
@overload
def compile(
    *,
    options: Mapping[str, Any] | Options | None = None,
    mode: str | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    **named: Any,
) -> Callable[[_Model], _Model]: ...
def compile(
    model: Any = None,
    /,
    *,
    options: Mapping[str, Any] | Options | None = None,
    mode: str | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    **named: Any,
) -> Any:
    """``torch.compile(model, backend="effcc", ...)``, with effcc's options as keywords and checked at once.

    Args:
        model: a module or function; without it, the result is a decorator.
        options: effcc's options together; ``named`` ones come on top: ``effcc.compile(model, memory_budget="8GiB")``.
        mode: torch.compile's, such as ``"reduce-overhead"``; torch takes either a mode or options.
        dynamic, fullgraph: as in ``torch.compile``.

    Raises:
        OptionError: an option that does not exist, a wrong value, or a mode and options together.
    """
    if model is None:
        return lambda each: compile(each, options=options, mode=mode, dynamic=dynamic, fullgraph=fullgraph, **named)
    chosen = _chosen(options) | named
    parse_options(chosen)
    if chosen and mode not in (None, "default"):
        raise OptionError(
            f"mode={mode!r} and options {', '.join(chosen)} are given together",
            where="effcc.compile",
            remedy="torch.compile takes either a mode or options",
        )
    return torch.compile(
        model, backend="effcc", options=chosen or None, mode=mode, dynamic=dynamic, fullgraph=fullgraph
    )


def train_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[..., torch.Tensor],
    *,
    memory_budget: int | str | None = None,
    swap: bool = True,
    swap_dir: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    clip_grad_norm: float | None = None,
    clip_grad_value: float | None = None,
    accumulate: int = 1,
) -> TrainStep:
    """A training step for a model that does not fit: ``loss = step(inputs, *targets)``.

    Parameters, gradients and optimizer state are in memory only while they are used: in between they are in files (of
    ``swap_dir``), for a GPU in pinned host memory. The optimizer is applied to each parameter as soon as its gradient
    is there. The results are those of the ordinary loop, bit for bit on the CPU.

    Args:
        model: may be on the meta device, with a ``checkpoint``. It runs as it is, eagerly or with compiled modules;
            blocks (modules of a ``ModuleList`` or ``Sequential``) are computed again in the backward where the budget
            asks for it.
        optimizer: made of the model's parameters; one that treats each of them by itself.
        loss_fn: ``loss_fn(outputs, *targets)`` of what the model returns.
        memory_budget: most bytes to hold during a step, parameters, gradients, optimizer state, saved values and inputs
            counted; ``"auto"``: what is free now; None: everything stays.
        swap: whether anything may leave memory.
        swap_dir: directory of the swap file, which has no name there; default: the system's temporary directory.
        checkpoint: path of a state dict (``torch.save``, safetensors, or a folder of those) that the parameters are
            read from, one at a time.
        clip_grad_norm, clip_grad_value: as ``torch.nn.utils.clip_grad_norm_`` and ``clip_grad_value_``.
        accumulate: calls of the step to an update; their gradients are added.

    Raises:
        OptionError: a value that makes no sense. TrainStepError: an optimizer or a model that cannot be used this way.
        SwapError: no room for the files. BudgetError, from the step's first call: the least budget that works.
    """
    from .runtime.train_step import TrainStep

    where = "effcc.train_step"
    if memory_budget == "auto":
        from .budget_loop import budget_in_bytes

        memory_budget = budget_in_bytes(memory_budget, list(model.parameters()))
    elif memory_budget is not None:
        memory_budget = parse_bytes(memory_budget)
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise OptionError(f"accumulate must be a whole number from 1 on, not {accumulate!r}", where=where)
    for name, value in (("clip_grad_norm", clip_grad_norm), ("clip_grad_value", clip_grad_value)):
        if value is not None and not value > 0:
            raise OptionError(f"{name} must be more than 0, not {value!r}", where=where)
    if clip_grad_norm is not None and clip_grad_value is not None:
        raise OptionError("clip_grad_norm and clip_grad_value are given together", where=where, remedy="Give one.")
    return TrainStep(
        model,
        optimizer,
        loss_fn,
        memory_budget=memory_budget,
        swap=swap,
        swap_dir=swap_dir,
        checkpoint=checkpoint,
        clip_grad_norm=clip_grad_norm,
        clip_grad_value=clip_grad_value,
        accumulate=accumulate,
    )


def _chosen(options: Mapping[str, Any] | Options | None) -> dict[str, Any]:
    """The options that differ from their defaults, as torch wants them."""
    if options is None:
        return {}
    if isinstance(options, Options):
        default = Options()
        values = {item.name: getattr(options, item.name) for item in fields(Options)}
        return {name: value for name, value in values.items() if value != getattr(default, name)}
    return dict(options)


@dataclass(frozen=True, repr=False)
class Explanation:
    """What effcc did, or plans to do, in words: ``lines`` under ``title``s. ``str`` of it is the whole text."""

    sections: tuple[tuple[str, tuple[str, ...]], ...]
    graphs: tuple[GraphReport, ...] = ()

    def __getitem__(self, title: str) -> tuple[str, ...]:
        """The lines under a title."""
        return dict(self.sections)[title]

    def __str__(self) -> str:
        return "\n".join(line for title, lines in self.sections for line in (title, *(f"  {each}" for each in lines)))

    def __repr__(self) -> str:
        return f"<Explanation of {len(self.graphs)} graphs: {', '.join(title for title, _ in self.sections)}>"

    def _repr_html_(self) -> str:
        parts = []
        for title, lines in self.sections:
            items = "".join(f"<li>{escape(line)}</li>" for line in lines)
            parts.append(f"<h4>{escape(title)}</h4><ul>{items}</ul>")
        return "".join(parts)


def explain(what: Any = None, /, *args: Any, **kwargs: Any) -> Explanation:
    """Why something is slow, does not fit, or was not compiled, in words with source lines.

    Args:
        what: a plan (``effcc.plan``'s result, or the path of a ``plan.effcc``): what holds its peak, where its time
            goes. A module or function (compiled or not): it is called once with ``args`` and ``kwargs``, and what
            happened to it is explained. Nothing: what this process has compiled so far.

    Raises:
        PlanError: the file is no plan. What the model itself raises.
    """
    if isinstance(what, str | Path):
        from .ir.plan_file import load_plan

        return _of_plan(load_plan(what).plan)
    if isinstance(what, Planned):
        return _of_plan(what.plan)
    if isinstance(what, Plan):
        return _of_plan(what)
    if what is None:
        return _of_process(reports(), torch_internals.compilations(), torch_internals.graph_breaks())
    if not callable(what):
        raise OptionError(
            f"effcc.explain cannot explain {type(what).__name__}",
            remedy="give a model, a plan, the path of one, or nothing",
        )
    return _of_call(what, args, kwargs)


def _of_call(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Explanation:
    already = isinstance(model, torch._dynamo.OptimizedModule) or hasattr(model, "_torchdynamo_orig_callable")
    before = list(reports())
    # The oldest reports and compilations are forgotten, so none is told by its place.
    earlier = max((each.at for each in torch_internals.compilations()), default=0)
    broken = torch_internals.graph_breaks()
    (model if already else torch.compile(model, backend="effcc"))(*args, **kwargs)
    breaks = Counter(torch_internals.graph_breaks()) - Counter(broken)
    made = [each for each in reports() if not any(each is old for old in before)] or reports()
    recent = [each for each in torch_internals.compilations() if each.at > earlier]
    return _of_process(made, recent, breaks)


def _of_process(
    graphs: Sequence[GraphReport],
    compilations: Sequence[torch_internals.CompilationRecord],
    breaks: Mapping[str, int],
) -> Explanation:
    sections = [("Graphs", tuple(_graph_line(graph) for graph in graphs) or ("nothing has been compiled",))]
    sections += [(f"Choices in {graph.name}", lines) for graph in graphs if (lines := _choices(graph))]
    fused = [f"{c.source}: {c.name}, {bytes_text(c.bytes_written)} of traffic now {bytes_text(c.bytes_fused)}"
             for graph in graphs for c in graph.cascades]  # fmt: skip
    refused = [f"not fused: {line}" for graph in graphs for line in graph.not_fused]
    if lines := tuple(dict.fromkeys([*fused, *refused])):
        sections.append(("Cascades", lines))
    rows = [f"{row.op}: {row.reason} ({row.source})" for graph in graphs for row in graph.fallbacks]
    sections.append(("Fallbacks", tuple(dict.fromkeys(rows)) or ("none: every op was compiled",)))
    broken = [f"{count} x {_reason(reason)}" for reason, count in breaks.items()]
    # Dynamo names what it goes on with after a break by the line.
    resumed = [each.where for each in compilations if each.where.startswith("torch_dynamo_resume_in_")]
    broken += [f"goes on in {where.removeprefix('torch_dynamo_resume_in_')}" for where in dict.fromkeys(resumed)]
    sections.append(("Graph breaks", tuple(broken) or ("none",)))
    again = [f"{each.where}: {_first_line(each.reason)}" for each in compilations if each.reason]
    sections.append(("Compiled again", tuple(again) or ("nothing",)))
    return Explanation(tuple(sections), tuple(graphs))


def _graph_line(graph: GraphReport) -> str:
    line = repr(graph).strip("<>").removeprefix("GraphReport ")
    if graph.measured_seconds is not None:
        line += f", {seconds_text(graph.measured_seconds)} a run"
    return f"{line}; compiled in {seconds_text(graph.compile_seconds + graph.wait_seconds)}"


def _choices(graph: GraphReport) -> tuple[str, ...]:
    """What is kept, recomputed and swapped, where a budget was given."""
    if graph.activation is None:
        return ()
    rows = [row for row in graph.activation.rows if row.fate != "keep"]
    return (sentence(graph.activation), *rows_in_words(rows[:12]))


def _of_plan(plan: Plan) -> Explanation:
    summary = summarize(plan)
    held = [
        f"{bytes_text(h.bytes)} {f'{h.count} x ' if h.count > 1 else ''}{h.role}: {h.what}"
        for h in summary.holders[:10]
    ]
    steps = [
        f"{seconds_text(g.seconds)} {f'{g.count} x ' if g.count > 1 else ''}{g.kind} {g.name} ({g.phase}), "
        f"bound by {g.bound}{f', {g.place}' if g.place else ''}"
        for g in summary.groups[:10]
    ]
    fallbacks = tuple(f"{op}: {reason} ({source})" for op, reason, source in plan.fallbacks)
    sections: list[tuple[str, tuple[str, ...]]] = [
        ("Verdict", summary.words),
        ("What would change the most", tuple(suggestions(plan, summary)) or ("nothing stands out",)),
        ("What holds the peak", tuple(held) or ("nothing",)),
        ("Where the time goes", tuple(steps) or ("no steps",)),
        ("Fallbacks", fallbacks or ("none: every op runs the planned way",)),
    ]
    if plan.notes:
        sections.append(("Notes", plan.notes))
    return Explanation(tuple(sections))


def _reason(text: str) -> str:
    """A graph break's headline and Dynamo's explanation of it."""
    explained = [line.strip() for line in text.splitlines() if line.strip().startswith("Explanation:")]
    return " ".join([_first_line(text), *(line.removeprefix("Explanation:").strip() for line in explained)])


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
