"""Cascades in ``torch.compile``: the groups that ``passes.raising`` chooses become one op each, in the joint or
inference graph, before anything else rewrites it."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from . import torch_internals
from .codegen.cascade_kernel import CascadeKernel, begin
from .codegen.cascade_op import prepare
from .codegen.fused_kernel import FusedKernel
from .codegen.tiles.errors import NotLowerable
from .errors import CompileError, EffccError
from .frontend.fx_import import from_fx
from .ir.graph import Graph
from .passes.raising.choose import Choice, Refused, choose
from .passes.raising.group import Group
from .passes.raising.prefilter import may_fuse
from .passes.raising.raise_graph import raise_graph
from .runtime.reports import CascadeReport


class RefusedKernelError(CompileError):
    """The C++ compiler does not take a kernel that is in the graph already."""


@dataclass
class CascadeFusion:
    """Callable as a pass over FX graphs. ``reports`` and ``refused`` collect what was done in all graphs of a step."""

    choice: Choice = field(default_factory=Choice)
    reports: list[CascadeReport] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    #: Being compiled in the background.
    kernels: list[CascadeKernel] = field(default_factory=list)

    def finish(self) -> None:
        """Wait for the kernels. Raises ``RefusedKernelError``."""
        try:
            for kernel in self.kernels:
                kernel.finish()
        except CompileError as error:
            raise RefusedKernelError(error.message, remedy="Compile with options={'cascades': False}.") from error

    def __call__(self, graph: fx.Graph) -> None:
        gm: Any = graph.owning_module
        if not torch_internals.first_look(graph, "effcc_fused"):
            return
        try:
            imported = from_fx(gm, "joint", "joint")
            if on_cpu(gm) and may_fuse(imported, self.choice):
                self.fuse(graph, imported)
        except EffccError as error:
            self.refused.append(Refused("", f"the graph is not analysed: {error.message}"))
        except Exception as error:  # a fault of the analysis costs the fusion, not the compilation
            self.refused.append(Refused("", f"the analysis failed: {type(error).__name__}: {error}"))

    def fuse(self, graph: fx.Graph, imported: Graph) -> None:
        chosen = choose(raise_graph(imported), self.choice)
        self.refused += chosen.refused
        kernels: dict[str, tuple[str, FusedKernel]] = {}
        for group in chosen.groups:
            try:
                kernels[group.name] = prepare(group.fused, group.rewriting)
            except NotLowerable as error:
                self.refused.append(Refused(group.name, f"no kernel: {error.message}", group.location))
        without = [group.name for group in chosen.groups if group.name not in kernels]
        taken = supported(chosen.groups, without, graph)
        if not taken:
            return
        with torch_internals.region_settings():
            made = [kernels[group.name][1].kernel for group in taken]
            begin(made)
            self.kernels += made
        values = {node.name: node for node in graph.nodes}
        try:
            for group in taken:
                insert(graph, group, kernels[group.name][0], values)
        finally:  # each replacement by itself leaves a right graph, once it is in order
            torch_internals.stable_topological_sort(graph)
            graph.eliminate_dead_code()
            graph.lint()
        self.reports += [report_of(group, kernels[group.name][1]) for group in taken]


def report_of(group: Group, kernel: FusedKernel) -> CascadeReport:
    location = group.location
    return CascadeReport(
        group.name,
        f"{location.file}:{location.line}" if location.file else "",
        group.traffic.written,
        group.traffic.fused,
        tuple(str(certificate) for certificate in group.rewriting.certificates),
        kernel.kernel.source,
    )


def on_cpu(gm: fx.GraphModule) -> bool:
    values = [node.meta.get("val") for node in gm.graph.find_nodes(op="placeholder")]
    return all(value.device.type == "cpu" for value in values if isinstance(value, torch.Tensor))


def supported(groups: Sequence[Group], without_kernel: Collection[str], graph: fx.Graph) -> list[Group]:
    """The groups that have kernels and operands; a component's groups all or none, for one that stays as it was written
    needs the wide tensors that the others do without."""
    names = {node.name for node in graph.nodes}
    left = list(groups)
    while True:
        made = names | {name for group in left for name in group.results}
        failed = {g.component for g in left if g.name in without_kernel or not made.issuperset(g.operands)}
        if not failed:
            return left
        left = [group for group in left if group.component not in failed]


def insert(graph: fx.Graph, group: Group, text: str, values: dict[str, fx.Node]) -> None:
    """One call of ``effcc.cascade``; its results take the place of the nodes in ``values`` that have their names."""
    model = values[group.nodes[-1]]
    operands = [values[name] for name in group.operands]
    call = add(graph, model, torch.ops.effcc.cascade.default, text, operands)
    for index, name in enumerate(group.results):
        part = add(graph, model, operator.getitem, call, index)
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


def add(graph: fx.Graph, model: fx.Node, target: Any, *args: Any) -> fx.Node:
    """An op at the end of the graph, with the metadata of ``model`` and its own value."""
    with graph.inserting_before(graph.output_node()):
        node = graph.call_function(target, args)
    node.meta.update({key: value for key, value in model.meta.items() if key not in ("val", "tensor_meta")})
    given = fx.node.map_arg(args, lambda operand: operand.meta["val"])
    gm: Any = graph.owning_module
    with torch_internals.fake_mode_of(gm):
        node.meta["val"] = target(*given)
    return node


def take_the_place(old: fx.Node, new: fx.Node) -> None:
    found, wanted = new.meta["val"], old.meta["val"]
    same = (found.shape, found.stride(), found.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
    assert same, f"{old} is {wanted}, its replacement {found}"
    old.replace_all_uses_with(new)
    new.meta["val"] = wanted
