"""The changes made to torch's tracing so that repeated modules are traced once. Each is inert unless a frame is being
compiled for which ``repeated_modules`` is active in this thread, and then does what torch does, for less or with more
care.

- ``UnspecializedNNModuleVariable.call_function``: the hook that turns a call into a shared subgraph.
- ``build_input_fingerprint``, ``is_reusable``, ``save_reuse_entry``: when a trace may be used again (``region_reuse``).
- ``InvokeSubgraphHOP.gen_schema``: torch traces the whole subgraph again at every call under autograd, to see whether
  it mutates its inputs; the answer does not change from call to call and is kept.
- ``inline_single_use_invoke_subgraph``: regions that are to be inlined are inlined first (``inlined_regions``).
- What makes capture itself cheaper: ``capture_speed``.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import types
from collections.abc import Callable
from typing import Any

import torch

from . import capture_speed, region_reuse, repeated_modules
from .inlined_regions import Traced
from .module_groups import ModuleGroup
from .repeated_modules import MAXIMUM_VARIANTS, CompileState

#: Functions that modules may call without holding a convolution module (see ``module_groups.is_layout_sensitive``).
_LAYOUT_SENSITIVE = frozenset(
    {torch.conv2d, torch.conv3d, torch.conv_transpose2d, torch.conv_transpose3d, torch.convolution}
)

#: Torch's functions that reuse stands on; without any of them it is left off.
_REUSE_FUNCTIONS = (
    "build_input_fingerprint",
    "find_reuse_match",
    "is_reusable",
    "save_reuse_entry",
    "stamp_out_subgraph",
)

_installed = threading.Lock()
_unavailable: str | None = None
_done = False


def install() -> str | None:
    """Put the changes in place, once in a process. Returns why not where this torch has no subgraph reuse."""
    global _done, _unavailable
    with _installed:
        if _done:
            return _unavailable
        _done = True
        capture_speed.install(_compiling_for_us, _is_our_compiler)
        try:
            from torch._dynamo.variables import invoke_subgraph as reuse
            from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable
            from torch._higher_order_ops.invoke_subgraph import InvokeSubgraphHOP

            for name in (
                "build_input_fingerprint",
                "find_reuse_match",
                "is_reusable",
                "save_reuse_entry",
                "stamp_out_subgraph",
            ):
                getattr(reuse, name)
        except (ImportError, AttributeError) as error:
            _unavailable = f"torch {torch.__version__} has no subgraph reuse ({error})"
            return _unavailable
        UnspecializedNNModuleVariable.call_function = _call_function(UnspecializedNNModuleVariable.call_function)
        reuse.is_reusable = _is_reusable(reuse.is_reusable)
        reuse.build_input_fingerprint = _build_fingerprint(reuse.build_input_fingerprint)
        reuse.save_reuse_entry = _save_reuse_entry(reuse.save_reuse_entry)
        InvokeSubgraphHOP.gen_schema = _gen_schema(InvokeSubgraphHOP.gen_schema)
        with contextlib.suppress(ImportError, AttributeError):
            _inline_ours_first()
        return None


def _compiling_for_us() -> bool:
    """Whether this thread is compiling a frame for one of our backends."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        tx = InstructionTranslator.current_tx()
    except AttributeError:  # no frame is being traced
        return False
    return _is_our_compiler(tx.output.compiler_fn)


def _is_our_compiler(compiler: Any) -> bool:
    return repeated_modules.is_ours(_backend_and_options(compiler)[0])


def _current_compile_id() -> object:
    from torch._guards import CompileContext

    return CompileContext.current_compile_id()


def _state(tx: Any) -> CompileState | None:
    return repeated_modules.state_of_frame(*_backend_and_options(tx.output.compiler_fn))


def _backend_and_options(compiler: Any) -> tuple[Any, Any]:
    """The function that the user named as backend and the ``options`` that it will get, from what Dynamo holds."""
    from torch._dynamo.eval_frame import innermost_backend

    options: Any = None
    while True:
        compiler = innermost_backend(compiler)
        if isinstance(compiler, functools.partial):
            given, inner = compiler.keywords, compiler.func
        elif hasattr(compiler, "compiler_fn"):  # torch.compile's wrapper
            given, inner = getattr(compiler, "kwargs", {}), compiler.compiler_fn
        else:
            return compiler, options
        options = given.get("options") if options is None else options
        compiler = inner


# --- the hook ---------------------------------------------------------------------------------------------------------


def _call_function(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        state = _state(tx)
        if state is None or state.inside or self.source is None:
            return original(self, tx, args, kwargs)
        state.begin_attempt(tx.output)
        group = _shareable_group(state, self, tx, args, kwargs)
        if group is None:
            return original(self, tx, args, kwargs)
        return _call_as_region(state, group, self, tx, args, kwargs)

    return call_function


def _shareable_group(state: CompileState, module: Any, tx: Any, args: Any, kwargs: Any) -> ModuleGroup | None:
    if tx.output.export or tx.output.current_tracer.parent is not None or module.is_state_mutated:
        return None
    value = module.value
    if id(value) not in state.groups.seen:
        state.groups.add(_outermost_module(tx, module.source, value))
        state.groups.seen.add(id(value))
    group = state.groups.by_module.get(id(value))
    if group is None or group.key in state.rejected:
        return None
    if state.inlined and _numbers_may_vary(tx):
        state.reject(group, module.source.name, "sizes or numbers may vary, which a shared body takes as arguments")
        return None
    if state.inlined and _makes_inputs([*args, *kwargs.values()]):
        return None
    if torch._C._len_torch_function_stack() or any(
        _is_model_tensor(state, tx, arg) for arg in (*args, *kwargs.values())
    ):
        return None
    return group


def _numbers_may_vary(tx: Any) -> bool:
    """Whether sizes of the frame, and with them numbers like a dropout rate, are symbols, or may become symbols because
    they were others when the frame was compiled before. How these enter a body differs from how they enter a graph."""
    config = torch._dynamo.config
    compiled_before = bool(getattr(_current_compile_id(), "frame_compile_id", 0))
    if not config.assume_static_by_default or (config.automatic_dynamic_shapes and compiled_before):
        return True
    return bool(tx.output.shape_env.backed_var_to_val)


def _makes_inputs(arguments: list[Any]) -> bool:
    """Whether some argument has not been looked at yet. It becomes an input of the graph when a call is shared, else
    when the module uses it, after inputs that the module uses before: this call is traced by itself."""
    from torch._dynamo.variables.base import VariableTracker
    from torch._dynamo.variables.lazy import LazyVariableTracker

    found = []

    def look(variable: Any) -> None:
        if isinstance(variable, LazyVariableTracker) and not variable.is_realized():
            found.append(not isinstance(variable.peek_value(), bool | int | float | str | types.NoneType))

    VariableTracker.visit(look, arguments)
    return any(found)


def _outermost_module(tx: Any, source: Any, value: torch.nn.Module) -> torch.nn.Module:
    """The module nearest to the root of ``source`` (``L['self'].model.layers[3]`` -> ``L['self']``)."""
    chain = []
    while source is not None:
        chain.append(source)
        source = getattr(source, "base", None)
    for candidate in reversed(chain):
        try:
            resolved = tx.output.resolve_source_value(candidate)
        except Exception:
            continue  # a step on the way that cannot be evaluated by itself
        if isinstance(resolved, torch.nn.Module):
            return resolved
    return value


def _is_model_tensor(state: CompileState, tx: Any, variable: Any) -> bool:
    """An argument that is itself a parameter would be mistaken for an activation when the trace is reused."""
    source = getattr(variable, "source", None)
    if source is None:
        return False
    try:
        return id(tx.output.resolve_source_value(source)) in state.groups.tensors
    except Exception:
        return True


def _global_mode() -> tuple[Any, ...]:
    """What a trace depends on besides its arguments and guards, as Dynamo simulates it at this point of the frame."""
    autocast = tuple(
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")
    )
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.is_autocast_cache_enabled(),
        *autocast,
    )


@functools.cache
def _region_variable() -> Any:
    from torch._dynamo.variables.invoke_subgraph import InvokeSubgraphHigherOrderVariable

    class RegionVariable(InvokeSubgraphHigherOrderVariable):
        """invoke_subgraph for bodies that are pure functions of their inputs; all else is refused while tracing."""

        supports_input_mutation = False
        allow_side_effects = False

    return RegionVariable(torch.ops.higher_order.invoke_subgraph)


def _call_as_region(state: CompileState, group: ModuleGroup, module: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    from torch._dynamo import exc
    from torch._dynamo.variables.functions import UserFunctionVariable
    from torch._dynamo.variables.nn_module import record_nn_module_stack

    function = UserFunctionVariable(state.function(group, _global_mode()))
    name = module.source.name
    inputs = len(tx.output.root_tracer.graph.find_nodes(op="placeholder"))
    state.inside = True
    try:
        with (
            record_nn_module_stack(str(id(module.value)), module.get_nn_module_stack_source(), tx, module.value),
            # A float attribute (a dropout rate) as a symbolic input would be read with .item() inside the body.
            torch._dynamo.config.patch(specialize_float=True),
        ):
            result = _region_variable().call_function(tx, [function, module, *args], kwargs)
            reason = _why_not_shareable(state, group, function, tx, inputs)
    except (exc.RestartAnalysis, exc.SkipFrame):
        raise
    except Exception as error:  # whatever torch cannot put into a subgraph is inlined instead, and reported
        reason = _first_line(error)
    finally:
        state.inside = False
    if reason is not None:
        state.reject(group, name, reason)
        # This kind of restart also clears the log of graph breaks, which the inlined calls would not match.
        raise exc.UnspecializeRestartAnalysis(restart_reason=f"effcc inlines {group.class_name}: {reason}")
    state.calls[group.key] = state.calls.get(group.key, 0) + 1
    report = state.report
    report.calls[group.class_name] = report.calls.get(group.class_name, 0) + 1
    report.traces[group.class_name] = len(_reuse_entries(tx, function))
    return result


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    generic = "This higher order operator doesn't work unless"
    lines = [line for line in lines if not line.startswith(generic)] or lines
    return lines[0] if lines else type(error).__name__


def _reuse_entries(tx: Any, function: Any) -> list[Any]:
    cache = tx.output.tracing_context.hop_dispatch_set_cache.get_cache(torch.ops.higher_order.invoke_subgraph)
    return list(cache.subgraph_reuse_cache.get(function.get_function().__code__, ()))


def _why_not_shareable(state: CompileState, group: ModuleGroup, function: Any, tx: Any, inputs: int) -> str | None:
    """Reasons that show after a trace. None if it may be used again for the siblings. ``inputs``: how many the graph
    had before."""
    entries = _reuse_entries(tx, function)
    if not entries:
        return "its outputs or arguments are not plain tensors and constants"
    if len(entries) > MAXIMUM_VARIANTS:
        return f"its members differ in more than {MAXIMUM_VARIANTS} ways"
    for _, entry in entries:
        if not getattr(entry, "_effcc_checked", False):
            entry._effcc_checked = True
            reason = _entry_hazard(group, entry, tx)
            if reason is None and state.inlined:
                reason = _inlining_hazard(entry, tx, inputs)
            if reason is not None:
                return reason
            path, _ = list(tx.nn_module_stack.values())[-1]
            state.bodies.setdefault(entry.body_name, Traced(path, len(tx.nn_module_stack) + 1))
    return None


def _entry_hazard(group: ModuleGroup, entry: Any, tx: Any) -> str | None:
    from torch._dynamo.variables.invoke_subgraph import LiftedCapturedSource, LiftedSyntheticObject

    if reason := getattr(entry, "_effcc_hazard", None):
        return str(reason)
    own = entry.arg_sources[0]
    for origin in entry.subgraph_input_mapping:
        if isinstance(origin, LiftedSyntheticObject):
            return "it uses an object that is made while tracing"
        if isinstance(origin, LiftedCapturedSource) and not _is_below(origin.source, own):
            value = tx.output.resolve_source_value(origin.source)
            if id(value) not in group.shared:
                return f"it uses {origin.source.name}, which is not its own"
    return _body_hazard(entry.body_gmod)


def _is_below(source: Any, base: Any) -> bool:
    while source is not None:
        if source == base:
            return True
        source = getattr(source, "base", None)
    return False


def _body_hazard(body: torch.fx.GraphModule) -> str | None:
    for node in body.graph.nodes:
        if node.target in _LAYOUT_SENSITIVE:
            return "it contains a convolution, whose layout is chosen with its neighbours"
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return f"it contains the higher-order operator {node.target.name()}"
        if node.op == "call_method" and node.target in ("item", "tolist"):
            return "it reads a number from a tensor"
        if "unbacked_bindings" in node.meta:
            return "it has sizes that depend on data"
    return None


def _inlining_hazard(entry: Any, tx: Any, inputs: int) -> str | None:
    """What keeps a body from being written out for the siblings as their own traces would have been."""
    if any(node.op in ("get_attr", "call_module") for node in entry.body_gmod.graph.nodes):
        return "it holds objects of its graph"
    for node in tx.output.root_tracer.graph.find_nodes(op="placeholder")[:inputs]:
        source = getattr(node.meta.get("grapharg"), "source", None)
        if source is not None and _is_below(source, entry.arg_sources[0]):
            return f"{source.name} was used before, so that the order of the siblings' inputs is not known"
    return None


# --- reuse ------------------------------------------------------------------------------------------------------------


def _is_reusable(original: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(original)
    def is_reusable(tx: Any, condition: Any, fingerprint: Any, cached_entry: Any) -> bool:
        state = _state(tx)
        if state is None or not state.inside:
            return original(tx, condition, fingerprint, cached_entry)
        return region_reuse.is_reusable(tx, condition, fingerprint, cached_entry)

    return is_reusable


def _build_fingerprint(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def build_fingerprint(tx: Any, args: Any, kwargs: Any) -> Any:
        state = _state(tx)
        found = region_reuse.fingerprint_of(args, kwargs) if state is not None and state.inside else None
        return found if found is not None else original(tx, args, kwargs)

    return build_fingerprint


def _save_reuse_entry(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def save_reuse_entry(tx: Any, fn_var: Any, fingerprint: Any, *args: Any, **kwargs: Any) -> None:
        original(tx, fn_var, fingerprint, *args, **kwargs)
        state = _state(tx)
        if state is not None and state.inside:
            for _, entry in _reuse_entries(tx, fn_var):
                if not hasattr(entry, "_effcc_arguments"):
                    entry._effcc_arguments = region_reuse.describe_arguments(fingerprint)
                    _name_symbols(tx, entry, kwargs["p_args"] if "p_args" in kwargs else args[3])

    return save_reuse_entry


def _name_symbols(tx: Any, entry: Any, p_args: Any) -> None:
    """Lifted sizes are looked up by the symbol that they are bound to, which may since have got a value (``s1=8``)."""
    from torch._dynamo.variables.invoke_subgraph import LiftedBoundSymbol

    bound = tx.output.current_tracer.bound_symbols
    own = entry.arg_sources[0]
    for origin, proxy in zip(entry.subgraph_input_mapping, p_args[2:], strict=True):
        if not isinstance(origin, LiftedBoundSymbol):
            continue
        grapharg = proxy.node.meta.get("grapharg")
        if origin.expr not in bound:
            example = grapharg.example if grapharg is not None else proxy.node.meta.get("example_value")
            origin.expr = example.node._expr
        if grapharg is not None and _is_below(grapharg.source, own):
            entry._effcc_hazard = f"its {grapharg.source.name} is a number that varies"


# --- inlining ---------------------------------------------------------------------------------------------------------


def _inline_ours_first() -> None:
    """Torch inlines bodies that are called once, with what is known of their nodes as it is."""
    from torch._higher_order_ops.passes import inline_invoke_subgraph as passes

    def after_ours(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def inline(gm: Any) -> Any:
            repeated_modules.inline_repeated(gm)
            return original(gm)

        return inline

    passes.inline_single_use_invoke_subgraph = after_ours(passes.inline_single_use_invoke_subgraph)
    passes.inline_invoke_subgraph = after_ours(passes.inline_invoke_subgraph)


# --- cost per call ----------------------------------------------------------------------------------------------------


def _gen_schema(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def gen_schema(self: Any, subgraph: Any, identifier: Any, *operands: Any) -> Any:
        from torch._higher_order_ops.invoke_subgraph import get_invoke_subgraph_cache

        cache = get_invoke_subgraph_cache() if repeated_modules.is_active() else None
        if cache is None:
            return original(self, subgraph, identifier, *operands)
        known = cache.__dict__.setdefault("_effcc_schemas", {})
        key = (id(subgraph), identifier, tuple(type(operand) for operand in operands))
        if key not in known:
            known[key] = (subgraph, original(self, subgraph, identifier, *operands))
        return known[key][1]

    return gen_schema
