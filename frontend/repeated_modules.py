"""Repeated modules are traced once.

While Dynamo traces a frame for one of our backends, a call of a module that has equal siblings in its container
(``model.layers[3](hidden)``) becomes an ``invoke_subgraph`` of a subgraph traced at the first sibling, with the
sibling's own parameters as arguments. Torch's own machinery (``torch.compiler.nested_compile_region``) does the
tracing; this module decides *which* calls, and takes a class of calls back when they turn out not to be shareable.

    rewrite: hidden = layers[0](hidden)            hidden = invoke_subgraph(@layer, layers[0].w, hidden)
             hidden = layers[1](hidden)   ->       hidden = invoke_subgraph(@layer, layers[1].w, hidden)

What is never shared, and inlined as Dynamo always does: calls that write to anything outside (buffers, caches,
lists), that return or alias one of their inputs, that contain convolutions over images or other higher-order operators
(checkpointing inside), that break the graph, that read attributes which differ in more than a few ways. The analysis
of the frame then starts
again with that group of modules left out, so the result is what it would have been without this module.

Under a memory budget each layer may save something else: the modules are traced once all the same, and the backend
writes their calls out again before anything else is done with the graph (``inline_repeated``).

Use: ``@trace_repeated_modules_once`` on a backend function, for all frames compiled by it; or
``with repeated_regions() as report:`` around a capture, for all frames compiled by this thread.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ..errors import PlanError
from ..ir.plan_file import load_plan
from .inlined_regions import Traced, inline_regions
from .module_groups import ModuleGroup, ModuleGroups

Backend = TypeVar("Backend", bound=Callable[..., Any])

#: More different traces than this for one group, and its members have too little in common.
MAXIMUM_VARIANTS = 4

_MARK = "_effcc_traces_repeated_modules_once"
_KEPT_REPORTS = 256


@dataclass(frozen=True)
class Rejection:
    """A group of modules that was inlined after all."""

    module: str
    class_name: str
    reason: str


@dataclass
class RegionReport:
    """What happened to repeated modules in one compilation (or in all of one ``repeated_regions()``)."""

    calls: dict[str, int] = field(default_factory=dict)
    traces: dict[str, int] = field(default_factory=dict)
    rejections: list[Rejection] = field(default_factory=list)


@dataclass
class CompileState:
    """Decisions for one frame; they outlive the restarts of its analysis. ``inlined``: calls are written out again."""

    inlined: bool = False
    report: RegionReport = field(default_factory=RegionReport)
    rejected: set[Hashable] = field(default_factory=set)
    groups: ModuleGroups = field(default_factory=ModuleGroups)
    functions: dict[Hashable, types.FunctionType] = field(default_factory=dict)
    calls: dict[Hashable, int] = field(default_factory=dict)
    #: The bodies by the names that they have in Dynamo's graph.
    bodies: dict[str, Traced] = field(default_factory=dict)
    inside: bool = False
    #: Of what Dynamo holds while it analyses the frame: the state outlives it, and must not keep a model alive.
    attempt: weakref.ref[Any] | None = None

    def begin_attempt(self, output_graph: object) -> None:
        """Counts start anew with each analysis of the frame; what was rejected stays rejected."""
        if self.attempt is None or self.attempt() is not output_graph:
            self.attempt = weakref.ref(output_graph)
            self.inside = False
            self.groups = ModuleGroups()
            self.functions, self.calls, self.bodies = {}, {}, {}
            self.report.calls.clear()
            self.report.traces.clear()

    def reject(self, group: ModuleGroup, module: str, reason: str) -> None:
        self.rejected.add(group.key)
        self.report.rejections.append(Rejection(module, group.class_name, reason))

    def function(self, group: ModuleGroup, mode: Hashable) -> types.FunctionType:
        """A function that calls its first argument; one for each group and global mode: reuse is keyed on its code."""
        key = (group.key, mode)
        if key not in self.functions:
            # Code objects compare by content, so the name must tell them apart.
            name = f"call_{group.class_name.rpartition('.')[2]}_{len(self.functions)}"
            code = _call_module.__code__.replace(co_name=name, co_qualname=name)
            self.functions[key] = types.FunctionType(code, _call_module.__globals__, name)
        return self.functions[key]


def _call_module(module: Any, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


class _Active(threading.local):
    """Per thread: the nesting of ``repeated_regions()``, and the states of the frames being compiled."""

    def __init__(self) -> None:
        self.depth = 0
        self.inlined = 0
        self.suspended = 0
        self.states: OrderedDict[object, CompileState] = OrderedDict()


_active = _Active()


def trace_repeated_modules_once(backend: Backend) -> Backend:
    """Mark a backend function: frames that Dynamo traces for it call repeated modules as shared subgraphs."""
    from . import torch_patches

    torch_patches.install()
    setattr(backend, _MARK, True)
    return backend


@contextlib.contextmanager
def repeated_regions(model: torch.nn.Module | None = None) -> Iterator[RegionReport]:
    """Trace repeated modules once in every frame that this thread compiles inside the block, for whatever backend.

    model: not needed (the modules are found from the values that a frame calls); given, a model without any repeated
    module costs nothing. Yields the report, which is filled while frames are compiled.
    """
    from . import torch_patches

    report = RegionReport()
    if model is not None:
        groups = ModuleGroups()
        groups.add(model)
        if not groups.by_module:
            yield report
            return
    torch_patches.install()
    outer, _active.states = _active.states, OrderedDict()
    _active.depth += 1
    try:
        yield report
    finally:
        _active.depth -= 1
        for state in _active.states.values():
            _merge(report, state.report)
        _active.states = outer


@contextlib.contextmanager
def without_repeated_regions() -> Iterator[None]:
    """Inline everything in the frames that this thread compiles inside the block."""
    _active.suspended += 1
    try:
        yield
    finally:
        _active.suspended -= 1


@contextlib.contextmanager
def inlined_regions() -> Iterator[None]:
    """In frames that this thread compiles inside the block, calls are written out again (``inline_repeated``)."""
    _active.inlined += 1
    try:
        yield
    finally:
        _active.inlined -= 1


def inline_repeated(gm: torch.fx.GraphModule) -> None:
    """Write out the calls of repeated modules, in place, where the frame that is being compiled wants that: a backend
    does so first of all. ``gm`` is then the graph of a frame in which no module was shared."""
    state = _active.states.get(current_compilation())
    if state is not None and state.inlined:
        inline_regions(gm, state.bodies, _call_module.__code__.co_filename)


def current_compilation() -> object:
    """What stands for the compilation of a frame that this thread is at, through all restarts of its analysis. (Its id
    does not: ids start anew after ``torch._dynamo.reset()``.)"""
    return torch._guards.CompileContext.try_get()


def report_of_frame() -> RegionReport:
    """The report of the compilation by a marked backend that this thread is at."""
    state = _active.states.get(current_compilation())
    return state.report if state is not None else RegionReport()


def state_of_frame(backend: object, options: object = None) -> CompileState | None:
    """The state of the frame that is being compiled if its repeated modules are to be traced once, else None.

    backend, options: what ``torch.compile`` was given; ``repeated_modules=False`` in the options of a marked backend
    inlines everything.
    """
    if _active.suspended or not is_ours(backend):
        return None
    way = _way(options)
    if way == "traced" and not _active.depth:
        return None
    compilation = current_compilation()
    state = _active.states.get(compilation)
    if state is None:
        state = _active.states[compilation] = CompileState(inlined=bool(_active.inlined) or way == "inlined")
        while len(_active.states) > _KEPT_REPORTS:
            _active.states.popitem(last=False)
    return state


def is_ours(backend: object) -> bool:
    """Whether frames compiled by ``backend`` on this thread are this package's business at all."""
    return bool(_active.depth) or bool(getattr(backend, _MARK, False))


def _way(options: object) -> str:
    """What the ``options`` of a backend say: each repeated module is "traced", or their calls are "shared", or shared
    while tracing and then "inlined". Options are a mapping or an object; wrong values are the backend's to refuse."""

    def given(name: str, default: object) -> object:
        return options.get(name, default) if isinstance(options, Mapping) else getattr(options, name, default)

    if given("repeated_modules", True) is False:
        return "traced"
    if given("memory_budget", None) is not None:
        return "inlined"
    path = given("plan", None)
    try:
        planned = isinstance(path, str | os.PathLike) and _has_budget(os.fspath(path), os.stat(path).st_mtime_ns)
    except (OSError, PlanError):  # a plan that cannot be read is the backend's to refuse, too
        planned = False
    return "inlined" if planned else "shared"


@functools.lru_cache(maxsize=16)
def _has_budget(path: str, _changed: int) -> bool:
    """Whether a plan was made under a memory budget. Raises PlanError."""
    return load_plan(path, validate=False).plan.budget is not None


def is_active() -> bool:
    """True while a frame is compiled in which some module call became a shared subgraph."""
    state = _active.states.get(current_compilation())
    return state is not None and bool(state.calls)


def _merge(report: RegionReport, other: RegionReport) -> None:
    for name, count in other.calls.items():
        report.calls[name] = report.calls.get(name, 0) + count
    for name, count in other.traces.items():
        report.traces[name] = report.traces.get(name, 0) + count
    report.rejections += other.rejections
