"""Cascades in ``torch.compile``: the groups that ``passes.raising`` chooses become one op each, in the joint or
inference graph, before anything else rewrites it."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx

from . import torch_internals
from .cascade_decisions import Analysed, Decisions, Fused, decide, in_reach
from .codegen.cascade_kernel import CascadeKernel, begin
from .codegen.cascade_op import give_up_kernel, gpu_source, kernel_of
from .codegen.chunked_cascade import ChunkedCascade
from .codegen.gpu_kernel_variants import GpuKernelVariants
from .codegen.kernel_variants import KernelVariants, rule_seconds
from .codegen.triton_tiles.target import CAPABILITIES, Target
from .codegen.variant_timing import TimedVariants
from .cost_model.devices import Device, device_titled, load_device
from .cost_model.tile_cost import TileRates
from .errors import CompileError, EffccError
from .frontend.fx_import import from_fx
from .ir.plan import Decision
from .passes.raising.choose import Choice, Rates
from .runtime.reports import CascadeReport
from .shared_gradients import Spread, spread_sums

#: Of a wide tensor, where a cascade is done in chunks: what stays in the caches of a present processor.
CHUNK_BYTES = 16 << 20
#: Whose rates are taken for a GPU that has no device file.
UNKNOWN_GPU = "a100-80g"


@dataclass
class CascadeFusion:
    """Callable as a pass over FX graphs. ``reports`` and ``refused`` collect what was done in all graphs of a step.
    ``compiles``: whether the graphs are to be run here, and need their kernels."""

    choice: Choice = field(default_factory=Choice)
    compiles: bool = True
    #: The GPU that a graph without a device of its own is planned for; whether memory is what it is short of; and
    #: whether more would be fused if it were, which is found out only where ``looks_ahead`` asks for it.
    target: Target | None = None
    short_of_memory: bool = False
    looks_ahead: bool = False
    more_if_short: bool = False
    #: Where times of kernels are kept, if variants whose prices are alike are to be timed.
    measured: Path | None = None
    reports: list[CascadeReport] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    #: What was chosen among what.
    decisions: list[Decision] = field(default_factory=list)
    #: Being compiled in the background, by the text of their ops.
    kernels: dict[str, CascadeKernel | ChunkedCascade] = field(default_factory=dict)

    def finish(self, strict: bool) -> None:
        """Wait for the kernels. Cascades whose kernels do not compile run as eager ops; if ``strict``, they raise
        ``CompileError``."""
        for text, kernel in self.kernels.items():
            try:
                kernel.finish()
            except CompileError as error:
                if strict:
                    raise
                give_up_kernel(text)
                self.reports[:] = [each for each in self.reports if each.kernel != kernel.source]
                self.refused.append(f"runs as eager ops, Einsum by Einsum: {error.message}")
        self.kernels.clear()

    def __call__(self, graph: fx.Graph) -> None:
        gm: Any = graph.owning_module
        if not torch_internals.first_look(graph, "effcc_fused"):
            return
        try:
            place = placed_on(gm)
            if place is not None:
                self.fuse(graph, *self.decided(gm, place))
        except EffccError as error:
            self.refused.append(f"the graph is not analysed: {error.message}")
        except Exception as error:  # a fault of the analysis costs the fusion, not the compilation
            self.refused.append(f"the analysis failed: {type(error).__name__}: {error}")

    def decided(self, gm: fx.GraphModule, place: torch.device) -> tuple[Decisions, Target | None]:
        """What to fuse, and the GPU that it is for. A sum over several layers is spread over them where each one's part
        then becomes part of a kernel, and left whole elsewhere."""
        choice, target = self.choice, self.target
        if place.type == "cuda":
            target = Target.of_cuda(place.index or 0)
            name = device_titled(torch.cuda.get_device_name(place)) or UNKNOWN_GPU
            choice = replace(choice_for(load_device(name), self.short_of_memory), gain=choice.gain)
        if self.measured is not None and isinstance(choice.variants, KernelVariants | GpuKernelVariants):
            choice = replace(choice, variants=TimedVariants(choice.variants, self.measured))
        spread = spread_sums(gm.graph)
        if spread:
            terms = [[term.name for term in each.sums] for each in spread]
            near = in_reach(from_fx(gm, "joint", "joint"), choice, terms)
            _undo(gm, [each for each, may in zip(spread, near, strict=True) if not may])
            spread = [each for each, may in zip(spread, near, strict=True) if may]
        analysed = Analysed(from_fx(gm, "joint", "joint"))
        decisions = decide(analysed, choice, target)
        made = {name for each in decisions.fused for name in (*each.results, *(rest.value for rest in each.rests))}
        in_vain = [each for each in spread if not each.is_in(made)]
        if in_vain:
            _undo(gm, in_vain)
            analysed = Analysed(from_fx(gm, "joint", "joint"))
            decisions = decide(analysed, choice, target)
        if self.looks_ahead and not self.short_of_memory:
            otherwise = decide(analysed, for_memory(choice), target)
            self.more_if_short |= otherwise.fused != decisions.fused
        return decisions, target

    def fuse(self, graph: fx.Graph, decisions: Decisions, target: Target | None = None) -> None:
        self.refused += decisions.refused
        self.decisions += decisions.schedule
        if not decisions.fused:
            return
        if target is not None:
            sources = [gpu_source(each.text, target) for each in decisions.fused]
        else:
            kernels = [kernel_of(each.text).kernel for each in decisions.fused]
            sources = [kernel.source for kernel in kernels]
        if self.compiles and target is None:
            with torch_internals.region_settings():
                begin([kernel for kernel in kernels if isinstance(kernel, CascadeKernel)])
            self.kernels.update((each.text, kernel) for each, kernel in zip(decisions.fused, kernels, strict=True))
        values = {node.name: node for node in graph.nodes}
        try:
            for each in decisions.fused:
                insert(graph, each, values)
        finally:  # each replacement by itself leaves a right graph, once it is in order
            torch_internals.stable_topological_sort(graph)
            graph.eliminate_dead_code()
            graph.lint()
        for each, source in zip(decisions.fused, sources, strict=True):
            self.reports.append(
                CascadeReport(each.name, each.source, each.bytes_written, each.bytes_fused, each.certificates, source)
            )


def _undo(gm: fx.GraphModule, spread: Sequence[Spread]) -> None:
    for each in spread:
        each.undo()
    if spread:
        gm.graph.eliminate_dead_code()


def choice_for(device: Device, short_of_memory: bool) -> Choice:
    """What is fused for a device."""
    choice = Choice(
        Rates.of(device), variants=variants_for(device), price=functools.partial(rule_seconds, device=device)
    )
    if device.kind == "cpu":
        choice = replace(choice, chunk_bytes=CHUNK_BYTES)
    return for_memory(choice) if short_of_memory else choice


def for_memory(choice: Choice) -> Choice:
    """Where memory is short, a kernel that is somewhat slower may be the cheapest way to do without a wide tensor."""
    return replace(choice, memory_ratio=choice.memory_ratio / 2)


def variants_for(device: Device) -> KernelVariants | GpuKernelVariants | None:
    """The ways to generate a kernel for a device that prices are known for; None leaves them to the generator's
    rules."""
    if device.kind == "cpu":
        rates = TileRates.of(device)
        return KernelVariants(rates) if rates is not None else None
    return GpuKernelVariants.of(device, Target.of_device(device)) if device.name in CAPABILITIES else None


def placed_on(gm: fx.GraphModule) -> torch.device | None:
    """The CPU, or the one GPU that a graph's inputs lie on; None if kernels are made for none of them, or for no one.
    Single numbers may lie on the CPU."""
    values = [node.meta.get("val") for node in gm.graph.find_nodes(op="placeholder")]
    places = {value.device for value in values if isinstance(value, torch.Tensor) and (value.dim() or not value.is_cpu)}
    place = places.pop() if len(places) == 1 else torch.device("cpu")
    return None if places or place.type not in ("cpu", "cuda") else place


def insert(graph: fx.Graph, group: Fused, values: dict[str, fx.Node]) -> None:
    """One call of ``effcc.cascade``; its results take the place of the nodes in ``values`` that have their names."""
    model = values[group.model]
    early = for_gradient_one(graph, group, values) if group.early else {}
    operands = [early.get(name, values[name]) for name in group.operands]
    call = add(graph, model, torch.ops.effcc.cascade.default, group.text, operands)
    for index, name in enumerate(group.results):
        part = add(graph, model, operator.getitem, call, index)
        if group.early and name in group.early.results:
            part = add(graph, values[name], torch.ops.aten.mul.Tensor, part, values[group.early.tangent])
        if name in values:
            take_the_place(values[name], part)
        values[name] = part
    for rest in group.rests:
        old = values[rest.value]
        wanted = old.meta["val"]
        total = add(graph, model, torch.ops.aten.sum.dim_IntList, values[rest.result], list(range(rest.count)))
        if total.meta["val"].dtype != wanted.dtype:
            total = add(graph, model, torch.ops.prims.convert_element_type.default, total, wanted.dtype)
        if total.meta["val"].shape != wanted.shape:
            total = add(graph, model, torch.ops.aten.reshape.default, total, list(wanted.shape))
        take_the_place(old, total)
        values[rest.value] = total


def for_gradient_one(graph: fx.Graph, group: Fused, values: dict[str, fx.Node]) -> dict[str, fx.Node]:
    """The operands that depend on the scalar gradient, as they are if it is 1: their ops once more."""
    assert group.early is not None
    model, tangent = values[group.model], values[group.early.tangent]
    kind = tangent.meta["val"]
    one = add(graph, model, torch.ops.aten.full.default, [], 1, dtype=kind.dtype, device=kind.device, pin_memory=False)
    needed = ancestors([values[name] for name in group.early.operands])
    made = {tangent: one}
    for node in [node for node in graph.nodes if node in needed]:
        if node is not tangent and any(operand in made for operand in node.all_input_nodes):
            with graph.inserting_before(graph.output_node()):
                made[node] = graph.node_copy(node, lambda operand: made.get(operand, operand))
            made[node].meta = {**metadata(model), "val": node.meta["val"]}
    return {name: made[values[name]] for name in group.early.operands}


def ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes and all that they are computed from."""
    waiting, seen = list(nodes), set(nodes)
    while waiting:
        new = set(waiting.pop().all_input_nodes) - seen
        seen |= new
        waiting += new
    return seen


def metadata(model: fx.Node) -> dict[str, Any]:
    return {key: value for key, value in model.meta.items() if key not in ("val", "tensor_meta")}


def add(graph: fx.Graph, model: fx.Node, target: Any, *args: Any, **named: Any) -> fx.Node:
    """An op at the end of the graph, with the metadata of ``model`` and its own value."""
    with graph.inserting_before(graph.output_node()):
        node = graph.call_function(target, args, named)
    node.meta.update(metadata(model))
    given = fx.node.map_arg(args, lambda operand: operand.meta["val"])
    gm: Any = graph.owning_module
    with torch_internals.fake_mode_of(gm):
        node.meta["val"] = target(*given, **named)
    return node


def take_the_place(old: fx.Node, new: fx.Node) -> None:
    found, wanted = new.meta["val"], old.meta["val"]
    same = (found.shape, found.stride(), found.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
    assert same, f"{old} is {wanted}, its replacement {found}"
    old.replace_all_uses_with(new)
    new.meta["val"] = wanted
