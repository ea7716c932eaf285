"""Changes to torch that make capturing a deep model cheaper without changing what is captured. Each is inert unless
this thread is compiling a frame for one of our backends, and each is left out where this torch lacks what it stands on.

- The partitioner's minimum cut is found in compiled code (``min_cut``).
- Python's cycle collector runs less often: of the millions of live objects that it scans, hardly one is garbage.
- AOTAutograd prints its joint, forward and backward graphs only if someone listens.
- The partitioner's reordered backward generates its Python code when it is first run, as its other graphs do.
- Dynamo does not read source files for lines of a log that is off.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import logging
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

from .min_cut import fast_minimum_cut

#: Allocations between collections of the youngest generation while a frame is compiled (Python's default is 700).
ALLOCATIONS_BETWEEN_COLLECTIONS = 10_000


def install(ours: Callable[[], bool], is_our_compiler: Callable[[Any], bool]) -> None:
    """Put the changes in place. ``ours()``: this thread compiles for us; ``is_our_compiler``: of Dynamo's compiler."""
    for change in (_minimum_cut, _quiet_logs, _quiet_trace, _lazy_backward):
        with contextlib.suppress(ImportError, AttributeError):
            change(ours)
    with contextlib.suppress(ImportError, AttributeError):
        _rare_collections(is_our_compiler)


def _minimum_cut(ours: Callable[[], bool]) -> None:
    import networkx

    networkx.minimum_cut = fast_minimum_cut(networkx.minimum_cut, ours)


# --- garbage ----------------------------------------------------------------------------------------------------------


class _Collector:
    """Nested and concurrent compilations share one change of the collector's threshold."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.depth = 0
        self.before: tuple[int, int, int] = (0, 0, 0)

    @contextlib.contextmanager
    def rare(self) -> Iterator[None]:
        with self.lock:
            self.depth += 1
            if self.depth == 1:
                self.before = gc.get_threshold()
                # A threshold of 0 means that the user has switched collections off.
                if 0 < self.before[0] < ALLOCATIONS_BETWEEN_COLLECTIONS:
                    gc.set_threshold(ALLOCATIONS_BETWEEN_COLLECTIONS, *self.before[1:])
        try:
            yield
        finally:
            with self.lock:
                self.depth -= 1
                if self.depth == 0:
                    gc.set_threshold(*self.before)


_collector = _Collector()


def _rare_collections(is_our_compiler: Callable[[Any], bool]) -> None:
    from torch._dynamo import convert_frame

    original = convert_frame._compile
    signature = inspect.signature(original)
    if "compiler_fn" not in signature.parameters:
        return

    @functools.wraps(original)
    def compile_frame(*args: Any, **kwargs: Any) -> Any:
        if not is_our_compiler(signature.bind_partial(*args, **kwargs).arguments.get("compiler_fn")):
            return original(*args, **kwargs)
        with _collector.rare():
            return original(*args, **kwargs)

    convert_frame._compile = compile_frame


# --- logs -------------------------------------------------------------------------------------------------------------


def _quiet_logs(ours: Callable[[], bool]) -> None:
    from torch._functorch._aot_autograd import graph_compile
    from torch._logging._internal import trace_log

    loggers = (graph_compile.aot_joint_log, graph_compile.aot_graphs_log)

    def unheard(arguments: tuple[Any, ...]) -> bool:
        """Nobody reads the text: no trace is written, nothing logged, and no cache keeps it for a later trace."""
        if trace_log.handlers or any(logger.isEnabledFor(logging.INFO) for logger in loggers):
            return False
        return getattr(arguments[-1], "cache_info", True) is None and ours()

    plain_joint, plain_pair = graph_compile._log_joint_graph, graph_compile._log_fw_bw_graphs

    @functools.wraps(plain_joint)
    def log_joint_graph(*args: Any) -> Any:
        return None if unheard(args) else plain_joint(*args)

    @functools.wraps(plain_pair)
    def log_fw_bw_graphs(*args: Any) -> Any:
        return (None, None) if unheard(args) else plain_pair(*args)

    graph_compile._log_joint_graph = log_joint_graph
    graph_compile._log_fw_bw_graphs = log_fw_bw_graphs


def _quiet_trace(ours: Callable[[], bool]) -> None:
    """For each call that it traces Dynamo makes a line that says where it stands, for which it reads the source file
    token by token; nobody sees it unless this log is on."""
    from torch._dynamo import output_graph, symbolic_convert

    log, plain = output_graph.trace_call_log, symbolic_convert.get_funcname

    @functools.wraps(plain)
    def get_funcname(filename: str, lineno: int) -> str | None:
        return plain(filename, lineno) if log.isEnabledFor(logging.DEBUG) or not ours() else None

    symbolic_convert.get_funcname = get_funcname


# --- generated code ---------------------------------------------------------------------------------------------------


class _Standing:
    """A module seen with some of its names replaced."""

    def __init__(self, module: Any, **replaced: Any) -> None:
        self.__dict__["_module"] = module
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


def _lazy_backward(ours: Callable[[], bool]) -> None:
    """Torch's own reordering with ``torch.fx.GraphModule`` replaced by the lazy form that the partitioner uses else."""
    import torch
    from torch._functorch import partitioners
    from torch.fx._lazy_graph_module import _LazyGraphModule

    original = partitioners.reordering_to_mimic_autograd_engine
    if original.__closure__:
        return
    fx = _Standing(torch.fx, GraphModule=_LazyGraphModule)
    names = {**original.__globals__, "torch": _Standing(torch, fx=fx), "fx": fx}
    lazy = types.FunctionType(original.__code__, names, original.__name__, original.__defaults__)

    @functools.wraps(original)
    def reordering_to_mimic_autograd_engine(gm: Any) -> Any:
        return lazy(gm) if ours() else original(gm)

    partitioners.reordering_to_mimic_autograd_engine = reordering_to_mimic_autograd_engine
