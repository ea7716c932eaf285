"""Looks at the graphs of a capture as ``torch.compile`` would fuse their cascades: before Inductor's own passes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch.fx as fx

from . import torch_internals
from .errors import EffccError
from .frontend.fx_import import from_fx
from .inspection.candidates import cascade_verdicts
from .ir.graph import Graph
from .ir.plan import CascadeVerdict
from .logs import logger


@dataclass
class CascadeWatch:
    """``graphs`` are those that went by; ``skipped`` says of others why the IR cannot carry them."""

    graphs: list[Graph] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, joint and inference graphs are kept, bodies of repeated layers included."""
        with torch_internals.joint_pass(self.keep, "effcc cascade watch"):
            yield

    def keep(self, graph: fx.Graph) -> None:
        """Note a graph that is met for the first time."""
        module: Any = graph.owning_module
        if not torch_internals.first_look(graph, "effcc_watched"):
            return
        try:
            self.graphs.append(from_fx(module, f"joint_{len(self.graphs)}", "joint"))
        except EffccError as error:
            self.skipped.append(error.message)

    def verdicts(self) -> list[CascadeVerdict]:
        """What could be fused, and why the rest stays. Takes about a second a layer."""
        found, skipped = cascade_verdicts(self.graphs)
        for line in (*self.skipped, *skipped):
            logger("cascades").info("%s", line)
        return found
