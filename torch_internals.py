"""Every private torch name that the runtime and the backend use, in one place; tested on torch 2.11 to 2.13.

Nothing here decides anything: each function wraps one internal, so that a torch release that moves a name is mended in
this file alone.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch._inductor.config as inductor_config
from torch._guards import TracingContext
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

#: What stands between generated C++ and a loaded kernel: no compiler, a compiler that fails or was killed, a full disk.
COMPILER_ERRORS = (CppCompileError, InvalidCxxCompiler, OSError, ImportError)


def compile_fx(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], inner: Callable[..., Any]) -> Any:
    """Inductor's front half (joint-graph passes, decompositions, min-cut partition) around our ``inner`` compiler."""
    from torch._inductor.compile_fx import compile_fx as inductor_compile_fx

    return inductor_compile_fx(gm, list(example_inputs), inner_compile=inner)


def compile_region(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
    """Inductor's back half: one FX graph to loops, kernels and a wrapper. Raises what Inductor raises."""
    from torch._inductor.compile_fx import compile_fx_inner

    return compile_fx_inner(gm, list(example_inputs), **kwargs)


def code_key(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
    """Inductor's cache key of a graph (structure, constants, input layouts, settings, versions, machine); None when its
    code cache is off or does not take the graph."""
    from torch._inductor.codecache import FxGraphCache, FxGraphCachePickler

    if not inductor_config.fx_graph_cache or inductor_config.force_disable_caches:
        return None
    plain = FxGraphCachePickler.debug_lines
    FxGraphCachePickler.debug_lines = lambda *_: []  # a second hash of every part, for its log
    try:
        found, _ = FxGraphCache.prepare_key(gm, list(example_inputs), dict(kwargs), [], False)
    finally:
        FxGraphCachePickler.debug_lines = plain
    return found[0] if found is not None else None


class _NotCachedError(Exception):
    pass


def load_region(key: str, gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
    """A region that was compiled before, by its key in Inductor's code cache; None when it is not there. ``gm`` is any
    graph that has ops: it is not looked at."""
    from torch._inductor import compile_fx as module
    from torch._inductor.codecache import FxGraphCache

    def refuse(*_: Any, **__: Any) -> Any:
        raise _NotCachedError

    prepare, generate = FxGraphCache.prepare_key, module.fx_codegen_and_compile
    FxGraphCache.prepare_key = staticmethod(lambda *_, **__: ((key, []), {}))
    module.fx_codegen_and_compile = refuse
    try:
        return module.compile_fx_inner(gm, list(example_inputs), **kwargs)
    except Exception as error:
        if isinstance(compile_error_cause(error), _NotCachedError | OSError):
            return None
        raise
    finally:
        FxGraphCache.prepare_key, module.fx_codegen_and_compile = staticmethod(prepare), generate


def code_cache_path() -> Path:
    """The directory of Inductor's code cache, as set now."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def graph_settings() -> contextlib.AbstractContextManager[Any]:
    """How AOTAutograd is run. Its own cache would hand back code that Inductor, not effcc, compiled for the same graph;
    and the backward is compiled at once, while the forward's C++ kernels are still on their way."""
    import torch._functorch.config as functorch_config

    return functorch_config.patch(  # type: ignore[no-any-return]
        enable_autograd_cache=False, force_non_lazy_backward_lowering=True
    )


def region_settings() -> contextlib.AbstractContextManager[Any]:
    """How regions are compiled. The processor's own flags say which vector instructions it has; building and loading a
    probe for each, as Inductor does by default, takes seconds of a cold start."""
    trusted = sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")
    # A region has no joint graph; without what works on those its code is found in the cache with any budget.
    settings: dict[str, Any] = {"custom_partitioner_fn": None, "joint_custom_pre_pass": None}
    stack = contextlib.ExitStack()
    stack.enter_context(inductor_settings({"cpp.vec_isa_ok": True, **settings} if trusted else settings))
    stack.enter_context(remembered_toolchain())
    return stack


def without_code_cache() -> contextlib.AbstractContextManager[Any]:
    """Code generated inside is neither looked up nor kept."""
    return inductor_settings({"fx_graph_cache": False, "fx_graph_remote_cache": False})


@contextlib.contextmanager
def cache_directory(path: Path | None) -> Iterator[None]:
    """Inductor's code cache under ``path`` while inside; None leaves it where it is."""
    if path is None:
        yield
        return
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(path)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
        else:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


@contextlib.contextmanager
def collect_output_strides() -> Iterator[list[Any]]:
    """The strides that regions compiled inside report for their outputs; the surrounding record is left untouched."""
    context = TracingContext.try_get()
    collected: list[Any] = []
    if context is None:
        yield collected
        return
    before = context.output_strides
    context.output_strides = collected if before is not None else None
    try:
        yield collected
    finally:
        context.output_strides = before


def report_output_strides(strides: Sequence[tuple[int, ...] | None]) -> None:
    """Tell AOTAutograd the strides of a compiled graph's outputs, from which it lays out the backward's inputs."""
    context = TracingContext.try_get()
    if context is not None and context.output_strides is not None:
        context.output_strides.clear()
        context.output_strides.extend(strides)


def saved_outputs(total: int) -> int:
    """How many of the ``total`` outputs of the forward being compiled are kept for the backward."""
    context = TracingContext.try_get()
    metadata = context.fw_metadata if context is not None else None
    returned = getattr(metadata, "num_forward_returns", None)
    return max(0, total - returned) if returned is not None else 0


def donated_inputs() -> list[int]:
    """Inputs of the backward graph being compiled whose memory it may reuse, by position."""
    context = TracingContext.try_get()
    metadata = context.fw_metadata if context is not None else None
    return list(getattr(metadata, "bw_donated_idxs", None) or [])


@contextlib.contextmanager
def donating(positions: Sequence[int]) -> Iterator[None]:
    """Inside, Inductor may reuse the memory of just these inputs of the graph that it compiles."""
    context = TracingContext.try_get()
    metadata = context.fw_metadata if context is not None else None
    if metadata is None:
        yield
        return
    before = metadata.bw_donated_idxs
    metadata.bw_donated_idxs = list(positions)
    try:
        yield
    finally:
        metadata.bw_donated_idxs = before


def has_bodies(gm: torch.fx.GraphModule) -> bool:
    """Whether an op of the graph runs graphs of its own (``cond``, ``scan``)."""
    return any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in gm.graph.nodes)


def is_invoke_subgraph(node: torch.fx.Node) -> bool:
    return node.op == "call_function" and node.target is torch.ops.higher_order.invoke_subgraph


def compile_error_cause(error: BaseException) -> BaseException:
    """What went wrong, without the exceptions that Inductor wraps around it."""
    while isinstance(getattr(error, "inner_exception", None), BaseException):
        error = error.inner_exception  # type: ignore[attr-defined]
    return error


def lowering_error_target(error: BaseException) -> str:
    """Name of the op that Inductor could not lower (``aten.foo.default``), or ``""`` when the error names none."""
    for line in str(compile_error_cause(error)).splitlines():
        if line.strip().startswith("target: "):
            return line.strip()[len("target: ") :]
    return ""


def divert_cpp_kernels(current: Callable[[], Any]) -> None:
    """From now on, wrappers loaded while ``current()`` gives a collector hand their C++ kernels to it.

    The collector has ``add(argument types, source, compile one)``, and ``scopes``, which receives each wrapper's
    namespace. Installed once; other compilations are untouched.
    """
    from torch._inductor.async_compile import AsyncCompile

    if getattr(AsyncCompile, "_effcc_diverted", False):
        return
    plain_kernel, plain_wait = AsyncCompile.cpp_pybinding, AsyncCompile.wait

    @functools.wraps(plain_kernel)
    def cpp_pybinding(self: Any, argtypes: list[str], source_code: str) -> Any:
        collector = current()
        if collector is None:
            return plain_kernel(self, argtypes, source_code)
        return collector.add(argtypes, source_code, load_cpp_kernel)

    @functools.wraps(plain_wait)
    def wait(self: Any, scope: dict[str, Any]) -> None:
        plain_wait(self, scope)
        collector = current()
        if collector is not None:
            collector.scopes.append(scope)

    AsyncCompile.cpp_pybinding, AsyncCompile.wait = cpp_pybinding, wait
    AsyncCompile._effcc_diverted = True
    comment_cpp_calls()


def comment_cpp_calls() -> None:
    """From now on, wrappers say before each call of a C++ kernel which ops it computes, as they do for Triton kernels
    and library calls. (``# Topologically Sorted Source Nodes: [mul, sum_1], Original ATen: [...]``)"""
    from torch._inductor.codegen.cpp import CppScheduling
    from torch._inductor.utils import get_kernel_metadata
    from torch._inductor.virtualized import V

    plain = CppScheduling.codegen_comment

    @functools.wraps(plain)
    def codegen_comment(self: Any, node_schedule: Any, kernel_name: Any = None) -> None:
        wrapper = V.graph.wrapper_code
        wrapper.make_comment(get_kernel_metadata(node_schedule, wrapper)[0])
        plain(self, node_schedule, kernel_name)

    CppScheduling.codegen_comment = codegen_comment


def load_cpp_kernel(argument_types: list[str], source: str) -> Any:
    """One C++ kernel compiled and bound the way Inductor does it. Raises CppCompileError."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    return CppPythonBindingsCodeCache.load_pybinding(argument_types, source)


def compile_cpp_module(source: str) -> Callable[[], Any]:
    """Start compiling a Python extension module named ``effcc_kernels``; the result waits for it and loads it."""
    from torch._inductor.async_compile import AsyncCompile

    load = _cpp_module_cache().load_async(source, submit_fn=AsyncCompile.submit)

    def result() -> Any:
        module = load()
        module.bind(torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr)
        return module

    return result


@functools.cache
def _cpp_module_cache() -> Any:
    from torch._inductor.codecache import CppPythonBindingsCodeCache, clear_on_fresh_cache

    class CppModuleCache(CppPythonBindingsCodeCache):
        cache: ClassVar[dict[str, Any]] = {}
        entry_function = "effcc_kernels"

        @staticmethod
        def cache_clear() -> None:
            CppModuleCache.cache.clear()

    return clear_on_fresh_cache(CppModuleCache)


def fake_mode_of(gm: torch.fx.GraphModule) -> Any:
    """The fake tensor mode that the graph was traced with."""
    from torch._guards import detect_fake_mode

    values = [node.meta.get("val") for node in gm.graph.nodes if node.op == "placeholder"]
    return detect_fake_mode(values)


def refresh_values(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Bring the graph's fake values up to date with its inputs. A backward is traced before the strides of what the
    forward really saves are known (a convolution may save channels-last); AOTAutograd then says so in the example
    inputs alone. Views of what has moved become reshapes, as Inductor makes them."""
    from torch._inductor.compile_fx import fake_tensor_prop
    from torch._inductor.fx_passes.post_grad import view_to_reshape

    def moved(value: Any, example: Any) -> bool:
        return (
            isinstance(value, torch.Tensor)
            and isinstance(example, torch.Tensor)
            and value.layout == example.layout == torch.strided
            # As texts: comparing symbolic strides would add guards.
            and [str(step) for step in value.stride()] != [str(step) for step in example.stride()]
        )

    placeholders = gm.graph.find_nodes(op="placeholder")
    if any(moved(node.meta.get("val"), example) for node, example in zip(placeholders, example_inputs, strict=True)):
        view_to_reshape(gm)
        with torch.no_grad():
            fake_tensor_prop(gm, list(example_inputs), force_allow_non_fake_inputs=True)


def structured_trace(name: str, text: Callable[[], str]) -> None:
    """Hand a text artifact to ``TORCH_TRACE`` / tlparse."""
    from torch._logging import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)


def debug_directory() -> Path:
    """The folder of this run that ``TORCH_COMPILE_DEBUG=1`` makes torch write to."""
    from torch._dynamo.utils import get_debug_dir

    return Path(get_debug_dir())


def cudagraphs_wanted(kwargs: dict[str, Any]) -> bool:
    """Whether this compilation is to be recorded as a CUDA graph (``mode="reduce-overhead"``)."""
    return bool(kwargs.get("cudagraphs") or False)


def mode_options(mode: str | None) -> dict[str, Any]:
    """Inductor's settings of a ``torch.compile`` mode such as ``reduce-overhead``."""
    if not mode or mode == "default":
        return {}
    return dict(torch._inductor.list_mode_options(mode))


def inductor_settings(settings: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
    return inductor_config.patch(settings)  # type: ignore[no-any-return]


def memory_timeline(profile: Any) -> list[tuple[float, int]]:
    """(seconds since the first, bytes) of each allocation (positive) and release (negative), in order, from a finished
    ``torch.profiler.profile(profile_memory=True)``."""
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    begin = events[0].start_ns() if events else 0
    return [((event.start_ns() - begin) * 1e-9, event.nbytes()) for event in events]


def joint_partitioner(partition: Callable[..., Any] | None) -> contextlib.AbstractContextManager[Any]:
    """Inside, Inductor splits joint graphs by ``partition(gm, joint_inputs, *, num_fwd_outputs, ...)``, after its own
    joint-graph passes. None leaves torch's minimum cut in place."""
    if partition is None:
        return contextlib.nullcontext()
    from torch._inductor.custom_graph_pass import CustomPartitionerFn

    class Partitioner(CustomPartitionerFn):  # type: ignore[misc]
        def __call__(self, gm: torch.fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Any:
            return partition(gm, joint_inputs, **kwargs)

        def uuid(self) -> Any:
            # What is saved shows in the forward and backward graphs, which the code cache goes by.
            return b"effcc activation planning"

    return inductor_settings({"custom_partitioner_fn": Partitioner()})


def minimum_cut_partition(
    gm: torch.fx.GraphModule, joint_inputs: Any, **kwargs: Any
) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
    """Torch's own choice of what is saved: forward and backward modules. It rewrites ``gm``."""
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    return min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)


def prepare_joint(gm: torch.fx.GraphModule) -> bool:
    """What torch does to a joint graph before it splits it: no dead code, common subexpressions merged. False for a
    graph that only torch can split: it has user checkpoints, effect tokens or state that is handed to the backward."""
    from torch._functorch import config, partitioners
    from torch._functorch.compile_utils import fx_graph_cse

    gm.graph.eliminate_dead_code()
    if config.cse:
        gm.graph = fx_graph_cse(gm.graph)
    gm.recompile()
    return not any(
        partitioners.must_recompute(node)
        or partitioners.is_with_effects(node)
        or partitioners._is_backward_state(node)
        or node.meta.get("recompute") is not None
        for node in gm.graph.nodes
    )


def backward_only_nodes(gm: torch.fx.GraphModule) -> list[str]:
    """Nodes of a joint graph that torch says must run in the backward (writes into inputs, mostly)."""
    from torch._functorch import partitioners

    return [node.name for node in gm.graph.nodes if partitioners._must_be_in_backward(node)]


def split_joint(
    gm: torch.fx.GraphModule, saved: Sequence[torch.fx.Node], num_fwd_outputs: int, static_inputs: Sequence[int]
) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
    """Forward and backward of a joint graph that keeps just ``saved`` (inputs among them) for the backward, which
    computes what else it needs of the forward again, right before its first use. ``gm`` stays as it is."""
    from torch._functorch import partitioners
    from torch._functorch.compile_utils import raise_getitems

    primals = [node for node in gm.graph.find_nodes(op="placeholder") if partitioners._is_primal(node)]
    forward, backward = partitioners._extract_fwd_bwd_modules(
        gm,
        list(saved),
        saved_sym_nodes=[],
        num_fwd_outputs=num_fwd_outputs,
        static_lifetime_input_nodes=partitioners.OrderedSet(primals[index] for index in static_inputs),
    )
    backward = partitioners.reordering_to_mimic_autograd_engine(backward)
    for module in (forward, backward):
        for node in module.graph.nodes:
            node.meta = dict(node.meta)
    return raise_getitems(forward), raise_getitems(backward)


def is_primal(node: torch.fx.Node) -> bool:
    from torch._functorch import partitioners

    return bool(partitioners._is_primal(node) or partitioners._is_fwd_seed_offset(node))


def copy_graph(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The same graph in a new module, with metadata of its own; submodules are shared."""
    graph = torch.fx.Graph()
    old = gm.graph.output_node()
    copies: dict[torch.fx.Node, torch.fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, copies))
    graph.output_node().meta = dict(old.meta)
    for node in graph.nodes:
        node.meta = dict(node.meta)
    return torch.fx.GraphModule(gm, graph)


def start_cpp_library(source: str) -> Callable[[], Any]:
    """Begin to compile C++ with ``extern "C"`` functions by Inductor's builder (its flags, vector instructions, OpenMP
    and code cache), in the background. The result waits for it and gives the loaded ``ctypes`` library; it raises
    CppCompileError."""
    from torch._inductor.codecache import CppCodeCache

    load: Callable[[], Any] = CppCodeCache.load_async(source, submit_fn=_compiler_threads().submit)
    return load


@functools.cache
def _compiler_threads() -> ThreadPoolExecutor:
    """The compilers are processes of their own; threads only wait for them."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="effcc-compile")


@contextlib.contextmanager
def remembered_toolchain() -> Iterator[None]:
    """Inside, two questions about the C++ toolchain that Inductor asks in each process are answered from its cache
    directory: whether a probe of each vector instruction set loads (a child process each), and which precompiled
    header is that of torch's header (it preprocesses that to learn so). Torch, compiler and command line are in the
    keys."""
    from torch._inductor import codecache
    from torch._inductor.cpu_vec_isa import VecISA

    probe: Any = getattr(VecISA, "_probe_load", None)  # neither is in torch 2.11
    precompile: Any = getattr(codecache, "_precompile_header", None)

    def probe_load(self: Any, output_path: str) -> bool:
        marker = Path(f"{output_path}.loads")
        found = marker.exists() or bool(probe(self, output_path))
        if found:
            _note(marker, "")
        return found

    def precompile_header(header: str, hashable_cmd_line: str, **command: Any) -> str:
        from torch._inductor.cpp_builder import get_compiler_version_info, get_cpp_compiler

        parts = (header, hashable_cmd_line, torch.__version__, get_compiler_version_info(get_cpp_compiler()))
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        note = Path(codecache.get_lock_dir()).parent / "effcc" / f"header-{digest}"
        with contextlib.suppress(OSError):
            path = note.read_text()
            if any(Path(path + suffix).exists() for suffix in (".gch", ".pch")):
                return path
        path = str(precompile(header, hashable_cmd_line, **command))
        _note(note, path)
        return path

    with contextlib.ExitStack() as stack:
        for owner, name, plain, ours in (
            (VecISA, "_probe_load", probe, probe_load),
            (codecache, "_precompile_header", precompile, precompile_header),
        ):
            if plain is not None:
                setattr(owner, name, ours)
                stack.callback(setattr, owner, name, plain)
        yield


def _note(path: Path, text: str) -> None:
    with contextlib.suppress(OSError):  # a cache that cannot be written remembers nothing
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def peak_growth(run: Callable[[], Any]) -> tuple[Any, int | None]:
    """``run()``, and the most bytes that it held on the CPU above what was held before; None while a profiler is on."""
    from torch._C import _autograd, _profiler

    if not hasattr(_autograd, "_enable_profiler_legacy") or torch.autograd._profiler_enabled():
        return run(), None
    # Unlike torch.profiler's Kineto it starts at once and says nothing.
    settings = _profiler.ProfilerConfig(
        _profiler.ProfilerState.CPU, False, True, False, False, False, _profiler._ExperimentalConfig()
    )
    _autograd._enable_profiler_legacy(settings)
    try:
        result = run()
    finally:
        records = _autograd._disable_profiler_legacy()
    highest = 0
    for thread in records:
        event: Any
        running = 0
        for event in thread:
            if event.kind() == "memory_alloc":
                running += event.cpu_memory_usage()
                highest = max(highest, running)
    return result, highest


def knapsack_partition(
    gm: torch.fx.GraphModule, joint_inputs: Any, budget: float, **kwargs: Any
) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
    """Torch's choice for its relative ``activation_memory_budget``, 0 to 1. It rewrites ``gm``."""
    import torch._functorch.config as functorch_config

    with functorch_config.patch(activation_memory_budget=budget):
        return minimum_cut_partition(gm, joint_inputs, **kwargs)


def joint_pass(run: Callable[[torch.fx.Graph], None] | None, key: str) -> contextlib.AbstractContextManager[Any]:
    """Inside, Inductor calls ``run`` on every joint and inference graph, bodies of repeated layers included, before its
    own passes. ``key`` stands for it in cache keys."""
    if run is None:
        return contextlib.nullcontext()
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Pass(CustomGraphPass):  # type: ignore[misc]
        def __call__(self, graph: torch.fx.Graph) -> None:
            run(graph)

        def uuid(self) -> Any:
            return key.encode()

    return inductor_settings({"joint_custom_pre_pass": Pass()})


def first_look(graph: torch.fx.Graph, key: str) -> bool:
    """Whether a joint pass meets these ops for the first time: of a repeated layer's body, the forward and the backward
    come by once more after it was partitioned."""
    ops = [node for node in graph.nodes if node.op == "call_function"]
    fresh = not any(key in node.meta for node in ops)
    for node in ops:
        node.meta[key] = True
    return fresh


def stable_topological_sort(graph: torch.fx.Graph) -> None:
    """Values before their uses, else the order that the graph has."""
    from torch._inductor.pattern_matcher import stable_topological_sort as sort

    sort(graph)


def fake_result(op: Any, value: Any) -> Any:
    """What an op returns for a fake tensor, as a fake tensor of the same mode."""
    with value.fake_mode:
        return op(value)


def boxed(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as AOTAutograd wants a compiled graph: it takes its arguments in a list that it may empty."""

    def call(args: list[Any]) -> Any:
        return function(*args)

    call._boxed_call = True
    return call


@dataclass(frozen=True)
class CompilationRecord:
    """One frame that Dynamo compiled: the function with its file and line, why it was compiled again ("" for the first
    time), and when, in microseconds."""

    where: str
    reason: str
    at: int = 0


def compilations() -> list[CompilationRecord]:
    """What Dynamo has compiled in this process, as far as it remembers, oldest first."""
    from torch._dynamo.utils import get_compilation_metrics

    return [
        CompilationRecord(
            f"{each.co_name} at {each.co_filename}:{each.co_firstlineno}",
            each.recompile_reason or "",
            each.start_time_us or 0,
        )
        for each in get_compilation_metrics()
        if each.co_name
    ]


def is_recompilation() -> bool:
    """Whether the frame that is being compiled was compiled before."""
    from torch._guards import CompileContext

    current = CompileContext.current_compile_id()
    return current is not None and bool(current.frame_compile_id)


def graph_breaks() -> dict[str, int]:
    """Reasons of graph breaks so far, with their number."""
    from torch._dynamo.utils import counters

    return dict(counters["graph_break"])
