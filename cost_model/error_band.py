"""How far a predicted step may be off: the bands of its kernels, weighed by their time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..ir.graph import Graph
from .devices import Device
from .kernel_seconds import learned_seconds
from .op_classes import kind_of
from .roofline import gemm_shape, op_cost
from .tensors import TensorTable, called


@dataclass(frozen=True)
class Band:
    """Ends of a 90 % band over the prediction, and the share of the time that the learned kernel model gave."""

    low: float
    high: float
    learned: float


@dataclass
class _Sums:
    seconds: float = 0.0
    low: float = 0.0
    high: float = 0.0
    learned: float = 0.0
    matmul_flop: int = 0

    def add(self, other: _Sums) -> None:
        self.seconds += other.seconds
        self.low += other.low
        self.high += other.high
        self.learned += other.learned
        self.matmul_flop += other.matmul_flop


def band_and_flop(
    graphs: Sequence[Graph], device: Device, bindings: Mapping[str, int], rest: tuple[float, float]
) -> tuple[Band, int]:
    """The band of a step that runs these graphs, and the FLOP of its matrix products. Kernels of the learned model have
    their own bands, which are taken to err together; all others have ``rest``."""
    whole = _Sums()
    known: dict[str, _Sums] = {}
    for graph in graphs:
        whole.add(_graph_sums(graph, device, bindings, rest, known))
    if whole.seconds <= 0:
        return Band(*rest, 0.0), whole.matmul_flop
    band = Band(whole.low / whole.seconds, whole.high / whole.seconds, whole.learned / whole.seconds)
    return band, whole.matmul_flop


def _graph_sums(
    graph: Graph, device: Device, bindings: Mapping[str, int], rest: tuple[float, float], known: dict[str, _Sums]
) -> _Sums:
    table = TensorTable(graph, bindings)
    found = _Sums()
    for node in graph.nodes:
        if node.op == "call":
            subgraph = called(node, graph)
            if subgraph is not None:
                key = f"{graph.name}/{subgraph.name}"
                if key not in known:
                    known[key] = _graph_sums(subgraph, device, bindings, rest, known)
                found.add(known[key])
            continue
        cost = op_cost(node, graph, device, table=table)
        shape = gemm_shape(node, table) if kind_of(node.op) == "gemm" else (1, 1, 1, 1)
        learned = learned_seconds(node, shape, table, device) if cost.seconds else None
        own = learned.seconds if learned else 0.0
        low, high = (learned.low, learned.high) if learned else (0.0, 0.0)
        other = cost.seconds - own
        found.add(_Sums(cost.seconds, low + other * rest[0], high + other * rest[1], own, cost.matmul_flop))
    return found
