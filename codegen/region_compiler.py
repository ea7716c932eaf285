"""Compile the segments of a graph, each distinct one once; what cannot be compiled runs as eager ops, with a reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.fx as fx
from torch._dynamo.exc import SkipFrame

from .. import torch_internals
from ..errors import CompileError
from ..logs import logger
from .empty_reductions import fill_empty_statistics
from .kernel_batch import Collector, collecting, describe
from .known_faults import known_fault
from .library_kernels import GemmChoice, measure_products, use_library_kernels
from .segments import EAGER, Segment, copy_module, cut

#: A kernel in a generated wrapper: ``async_compile.cpp_pybinding(...)``, ``async_compile.triton(...)``.
_KERNEL = re.compile(r"^\w+ = async_compile\.(?!wait)", re.MULTILINE)

_log = logger("compile")


@dataclass(frozen=True)
class Fallback:
    """An op, or a run of ops, that does not go through the region compiler."""

    op: str
    reason: str
    source: str


@dataclass
class CompiledSegment:
    """Callable code of a segment: ``run(boxed args) -> outputs``."""

    run: Callable[[list[Any]], Any]
    source: str
    kernels: int
    output_strides: list[tuple[int, ...] | None]
    library: dict[str, str] = field(default_factory=dict)
    #: Fake tensors that it was compiled for, and the positions of those that stay at their address.
    inputs: list[Any] = field(default_factory=list)
    static_inputs: list[int] = field(default_factory=list)


@dataclass
class CompiledSegments:
    segments: list[Segment]
    code: dict[str, CompiledSegment]
    fallbacks: list[Fallback]
    #: C++ kernels still being compiled; ``collector.finish()`` waits for them.
    collector: Collector
    #: Identity -> the segment as eager ops, for one whose kernels do not compile.
    eager: dict[str, CompiledSegment] = field(default_factory=dict)

    @property
    def functions(self) -> dict[str, str]:
        """Identity -> name of its function in the host module."""
        identities = dict.fromkeys(segment.identity for segment in self.segments)
        return {identity: f"_region_{index}" for index, identity in enumerate(identities)}

    def first(self, identity: str) -> Segment:
        return next(segment for segment in self.segments if segment.identity == identity)


def compile_segments(
    gm: fx.GraphModule, kwargs: dict[str, Any], *, gemm: GemmChoice | None, strict: bool
) -> CompiledSegments:
    """Cut ``gm`` and compile every distinct segment. ``strict`` raises instead of falling back to eager ops.

    An op that Inductor cannot lower is put into a segment of its own and the rest is tried again, so that one such op
    costs one fallback; a failure that names no op makes its whole segment eager.
    """
    eager_ops: set[str] = set()
    whole: set[str] = set()
    found: list[Fallback] = []
    if gemm is not None and not kwargs.get("is_backward"):
        measure_products(gm, gemm)
    graph_donated = torch_internals.donated_inputs() if kwargs.get("is_backward") else []
    while True:
        segments = cut(gm, eager_ops)
        donated = donated_by_identity(gm, segments, graph_donated)
        code: dict[str, CompiledSegment] = {}
        eager: dict[str, CompiledSegment] = {}
        collector = Collector()
        retry = False
        fallbacks = [*found]
        distinct = len({segment.identity for segment in segments})
        for segment in segments:
            if segment.identity in code:
                continue
            # A copy: what compiles a segment rewrites its graph in place.
            eager[segment.identity] = eager_segment(copy_module(segment.module))
            faults = faults_of(segment)
            if segment.kind == EAGER or segment.identity in whole or faults:
                code[segment.identity] = eager[segment.identity]
                fallbacks += faults
                continue
            collector.region = segment.identity
            _log.info("region %d of %d, %d ops", len(code) + 1, distinct, len(segment.ops))
            try:
                code[segment.identity] = compile_segment(segment, kwargs, gemm, donated[segment.identity], collector)
                collector.flush()
            except SkipFrame:
                raise
            except Exception as error:
                if strict:
                    raise CompileError(
                        f"a region of {len(segment.ops)} ops does not compile: {describe(error)}",
                        where=source_of(segment),
                        remedy="Leave the option fallback at 'eager' to run it op by op.",
                    ) from error
                target = torch_internals.lowering_error_target(error)
                reason = describe(error)
                if target and target in segment.ops and target not in eager_ops and segment.kind != "call":
                    eager_ops.add(target)
                    found.append(Fallback(target, reason, source_of(segment, target)))
                    retry = True
                    break
                whole.add(segment.identity)
                found.append(Fallback(f"{len(segment.ops)} ops", reason, source_of(segment)))
                retry = True
                break
        if not retry:
            collector.flush(last=True)
            return CompiledSegments(segments, code, fallbacks, collector, eager)
        if eager_ops:
            # A finer cut renumbers the segments, so whole-segment decisions of the coarser one no longer apply.
            whole = {identity for identity in whole if identity.startswith("call:")}


def faults_of(segment: Segment) -> list[Fallback]:
    """A fallback for each op of ``segment`` that Inductor is known to compute wrongly."""
    reasons = [(str(node.target), known_fault(node)) for node in segment.module.graph.nodes]
    return [Fallback(target, reason, source_of(segment, target)) for target, reason in reasons if reason is not None]


def cut_again(gm: fx.GraphModule, code: Mapping[str, CompiledSegment], collector: Collector) -> CompiledSegments:
    """The segments of a graph whose ``code`` (by identity) an earlier process compiled."""
    segments = cut(gm)
    eager = {segment.identity: eager_segment(copy_module(segment.module)) for segment in segments}
    return CompiledSegments(segments, dict(code), [], collector, eager)


def compile_segment(
    segment: Segment, kwargs: dict[str, Any], gemm: GemmChoice | None, donated: Sequence[int], collector: Collector
) -> CompiledSegment:
    fill_empty_statistics(segment.module)
    library = use_library_kernels(segment.module, gemm) if gemm is not None else {}
    settings = dict(kwargs)
    statics = set(settings.pop("static_input_idxs", ()) or ())
    settings["static_input_idxs"] = [
        index for index, node in enumerate(segment.inputs) if isinstance(node, fx.Node) and input_index(node) in statics
    ]
    mark_donated(segment.module, donated)
    inputs = segment.fake_inputs()
    with (
        torch_internals.collect_output_strides() as strides,
        torch_internals.donating(donated),
        collecting(collector),
    ):
        compiled = torch_internals.compile_region(segment.module, inputs, **settings)
    source = getattr(compiled, "source_code", "") or ""
    known = list(strides) if len(strides) == len(segment.outputs) else [None] * len(segment.outputs)
    kernels = len(_KERNEL.findall(source))
    return CompiledSegment(compiled, source, kernels, known, library, inputs, settings["static_input_idxs"])


def mark_donated(module: fx.GraphModule, donated: Sequence[int]) -> None:
    """Say in the names of inputs which are donated. Inductor's code cache goes by the graph's text: without this it
    would hand a region that overwrites its inputs to one that must not."""
    placeholders = module.graph.find_nodes(op="placeholder")
    for index in donated:
        node = placeholders[index]
        node._rename(f"{node.name}_donated")
        node.target = node.name
    module.recompile()


def donated_by_identity(
    gm: fx.GraphModule, segments: Sequence[Segment], graph_donated: Sequence[int]
) -> dict[str, list[int]]:
    """Per distinct segment, the inputs whose memory it may reuse: graph inputs that are donated, read for the last time
    there, once, in every one of its calls."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    (output,) = gm.graph.find_nodes(op="output")
    free = {placeholders[position] for position in graph_donated} - set(output.all_input_nodes)
    last = {
        node: position
        for position, segment in enumerate(segments)
        for node in segment.inputs
        if isinstance(node, fx.Node)
    }
    table: dict[str, list[int]] = {}
    for position, segment in enumerate(segments):
        # Inductor would take the positions for those of a body's inputs, too, and overwrite what is still needed.
        inputs = [] if torch_internals.has_bodies(segment.module) else segment.inputs
        mine = {
            index
            for index, node in enumerate(inputs)
            if isinstance(node, fx.Node) and node in free and last[node] == position and segment.inputs.count(node) == 1
        }
        before = table.get(segment.identity)
        table[segment.identity] = sorted(mine if before is None else mine & set(before))
    return table


def input_index(node: fx.Node) -> int:
    """Position of a graph input among the inputs, -1 for a computed value."""
    if node.op != "placeholder":
        return -1
    return node.graph.find_nodes(op="placeholder").index(node)


def eager_segment(module: fx.GraphModule) -> CompiledSegment:
    module.recompile()

    def run(args: list[Any]) -> Any:
        local = list(args)
        args.clear()
        return module(*local)

    outputs: Any = module.graph.output_node().args[0]
    return CompiledSegment(run, module.code, 0, [None] * len(outputs))


def source_of(segment: Segment, target: str = "") -> str:
    """``file:line`` of the user's model for the first op (named ``target``, if given) that knows it."""
    for node in segment.module.graph.nodes:
        if target and str(node.target) != target:
            continue
        trace = node.meta.get("stack_trace")
        if trace:
            frames = [line.strip() for line in str(trace).splitlines() if line.strip().startswith("File ")]
            if frames:
                return frames[-1]
    return ""
