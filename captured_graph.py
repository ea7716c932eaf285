"""One captured ATen graph on its way through the IR: imported, rewritten by the passes, and turned back into FX."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import torch_internals
from .codegen.fx_export import to_fx
from .errors import EffccError
from .frontend.fx_import import from_fx, tensor_constants
from .ir.graph import Graph
from .ir.types import ScalarType
from .options import Options
from .passes.manager import PassManager
from .passes.pipeline import parse_pipeline

#: What every captured graph goes through before its regions are compiled.
PIPELINE = "normalize,saved-layouts,regions"
#: The same where memory is short: nothing is saved twice.
BUDGET_PIPELINE = "normalize,regions"


@dataclass(frozen=True)
class Rewritten:
    """What is compiled (``module``), and the graph in the IR; ``notes`` say why the two may differ."""

    module: torch.fx.GraphModule
    graph: Graph | None
    notes: tuple[str, ...] = ()


@dataclass
class CapturedGraph:
    """``roles`` are those of the inputs, ``saved`` counts the last outputs that are kept for the backward, ``forward``
    is the captured forward of a backward."""

    module: torch.fx.GraphModule
    name: str
    phase: str
    roles: Sequence[str] | None
    saved: int
    forward: torch.fx.GraphModule | None
    options: Options

    @functools.cached_property
    def rewritten(self) -> Rewritten:
        """The graph after our passes. One that the IR cannot carry faithfully stays as it is, with a note."""
        gm = self.module
        graph = None
        try:
            graph = self.imported()
            passes = parse_pipeline(PIPELINE if self.options.memory_budget is None else BUDGET_PIPELINE)
            graph = PassManager(passes, dump_dir=self.options.dump_dir, verify=self.options.verify).run(graph)
            if why := not_carried(graph):
                return Rewritten(gm, graph, (f"compiled as captured, passes only analysed it: {why}",))
            rewritten = to_fx(graph, torch_internals.fake_mode_of(gm), constants=tensor_constants(gm))
        except EffccError as error:
            return Rewritten(gm, graph, (f"compiled as captured: {error.message}",))
        rewritten.meta.update(gm.meta)
        keep_output_facts(gm, rewritten)
        return Rewritten(rewritten, graph)

    def imported(self) -> Graph:
        if self.phase == "backward":
            return from_fx(self.module, self.name, self.phase, forward=self.forward)
        return from_fx(self.module, self.name, self.phase, roles=self.roles, saved=self.saved)


def not_carried(graph: Graph) -> str:
    """Why the IR is not turned back into FX for this graph, ``""`` if it is: sizes that are symbols belong to the
    capture's own shape environment, and bodies of higher-order ops to their operators."""
    for body in (graph, *graph.subgraphs.values()):
        for node in body.nodes:
            if isinstance(node.type, ScalarType) or node.role == "symbol":
                return f"%{node.name} is a size"
            if node.op.startswith(("higher_order.", "torch.", "method.")):
                return f"%{node.name} is {node.op}"
    return ""


def keep_output_facts(old: torch.fx.GraphModule, new: torch.fx.GraphModule) -> None:
    (source,) = old.graph.find_nodes(op="output")
    (target,) = new.graph.find_nodes(op="output")
    target.meta.update(source.meta)
