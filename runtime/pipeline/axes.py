"""What the axes of a mesh make of a stage's costs: kernels and memory shared, collectives added on streams.

| axis | shares | adds, on the stream of its name |
|---|---|---|
| ``tp`` | every kernel, activations, matrices | gathers and scatters of tokens around pairs of products |
| ``cp`` | every kernel, activations (the graph is that of one part) | keys around the ring, or states over the tree |
| ``fsdp`` | parameters, gradients, optimizer | parameters gathered for each pass, gradients scattered |
| ``ep`` | stacks of experts | tokens to their experts and back |
| ``dp`` | nothing | sums of gradients, once a step |

Collectives that kernels cannot hide are part of a pass's seconds; what is hidden runs beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from ...cost_model.devices import Device
from ...cost_model.parallel_training.mesh import Mesh, group_cost, neighbour_seconds
from ...errors import PipelineError
from ...ir.types import SHORT_DTYPE
from ..context_parallel.attention import SplitAttention
from .stages import Stage, node_flop
from .step_graph import StepGraph, aten, free_nodes
from .tensor_axis import Collective, TensorAxis

#: A backward does about twice a forward's work: gradients of inputs and of weights.
BACKWARD = 2.0
_VIEWS = ("view", "reshape", "transpose", "unsqueeze", "expand", "slice", "getitem", "alias", "permute", "split")
_LAYER = re.compile(r"\.\d+\.")


@dataclass
class StageCosts:
    """Seconds of a pass, with what of its collectives is exposed; ``beside``: stream -> seconds of collectives in a
    forward and a backward. ``held``: bytes of parameters, gradients and optimizer; ``gathered``: of parameters that are
    whole for a while; ``gradient``: seconds of the sums over replicas, once a step."""

    forward: float = 0.0
    backward: float = 0.0
    beside: dict[str, tuple[float, float]] = field(default_factory=dict)
    exposed: tuple[float, float] = (0.0, 0.0)
    activation: int = 0
    held: int = 0
    gathered: int = 0
    gradient: float = 0.0


class MeshCosts:
    """Costs of any stage of ``graph`` on a mesh. ``sizes``: bytes of each parameter by path; ``context``: the form of
    attention over devices, where the graph is that of one part of the sequence.

    Raises PipelineError for a model that the mesh cannot share.
    """

    def __init__(
        self, graph: StepGraph, mesh: Mesh, device: Device, sizes: Mapping[str, int], context: str = "ring"
    ) -> None:
        self.graph, self.mesh, self.device, self.sizes, self.context = graph, mesh, device, sizes, context
        self.tensor = TensorAxis(graph, mesh.tp) if mesh.tp > 1 else None
        placeholders = {node.name: node for node in graph.module.graph.nodes if node.op == "placeholder"}
        self._stacks = {
            path: placeholders[name].meta["val"].shape[0]
            for name, path in graph.parameters.items()
            if placeholders[name].meta["val"].dim() > 2
        }
        self._split = {graph.parameters[name] for name in self.tensor.split} if self.tensor is not None else set()
        self._routers = _routers(graph)
        if mesh.ep > 1:
            self._check_experts()

    def _check_experts(self) -> None:
        if not self._stacks or not self._routers:
            raise PipelineError(
                f"ep={self.mesh.ep}: the step has no experts that are chosen for tokens", remedy="plan without ep"
            )
        for path, count in self._stacks.items():
            if count % self.mesh.ep:
                raise PipelineError(
                    f"ep={self.mesh.ep} does not divide the {count} experts of {path}", remedy="choose a divisor"
                )

    @property
    def replicas(self) -> int:
        """Ranks over which gradients are summed."""
        return self.mesh.dp * self.mesh.cp

    def shares(self, path: str) -> int:
        """Ranks that share a parameter, those of ``fsdp`` not counted."""
        if path in self._stacks:
            return self.mesh.ep
        return self.mesh.tp if path in self._split else 1

    def state_bytes(self, path: str) -> int:
        """Of one rank: the parameter, its gradient and Adam's two moments, all of its own type."""
        return -(-4 * self.sizes[path] // (self.shares(path) * self.mesh.fsdp))

    def sum_seconds(self, paths: Iterable[str]) -> float:
        """Adding up gradients over the replicas."""
        found = 0.0
        for expert in (False, True):
            size = sum(self.sizes[path] / self.shares(path) for path in paths if (path in self._stacks) == expert)
            ranks = max(1, self.replicas * self.mesh.fsdp // self.mesh.ep) if expert and self.mesh.ep > 1 else None
            over = self.replicas if ranks is None else ranks
            share = size / (self.mesh.fsdp if ranks is None else 1)
            found += group_cost("all_reduce", share, over, self.mesh.tp, self.device).seconds
        return found

    def stage(self, stage: Stage) -> StageCosts:
        """Of one stage."""
        paths = {argument.name for argument in stage.arguments if argument.kind == "parameter"}
        nodes = list(computed(stage.module.graph.nodes))
        again = sum(self._attention_seconds(each) for each in map(attention_of, nodes) if each is not None)
        kernels = sum(map(self._node_seconds, nodes))
        found = StageCosts(forward=kernels, backward=BACKWARD * kernels + again)
        found.activation = int(sum(map(node_bytes, nodes)) / self.mesh.tp)
        found.held = sum(map(self.state_bytes, paths))
        found.gradient = self.sum_seconds(paths)
        for stream, (forward, backward), hidden in (
            ("tensor", self._tensor(nodes), (0.0, 0.0)),
            ("context", self._context(nodes), self._context_hidden(nodes)),
            ("experts", self._experts(nodes), (0.0, 0.0)),
            self._parameters(paths, found),
        ):
            if forward or backward:
                found.beside[stream] = (forward, backward)
                exposed = (max(0.0, forward - hidden[0]), max(0.0, backward - hidden[1]))
                found.exposed = (found.exposed[0] + exposed[0], found.exposed[1] + exposed[1])
        found.forward += found.exposed[0]
        found.backward += found.exposed[1]
        return found

    # --- kernels

    def _node_seconds(self, node: Node) -> float:
        attention = attention_of(node)
        if attention is not None:
            return self._attention_seconds(attention)
        value, device = node.meta["val"], self.device
        traffic = 0.0
        for each in (node, *node.all_input_nodes):
            stack = each.op == "placeholder" and _dims(each) > 2 and self.mesh.ep > 1
            traffic += node_bytes(each) / (self.mesh.ep if stack else 1)
        seconds = traffic / self.mesh.tp / bandwidth(device)
        if (flop := node_flop(node) / self.mesh.tp) > 4.0 * value.numel() / self.mesh.tp:
            seconds = max(seconds, flop / (device.matrix_rate(short(value.dtype)) * device.efficiency_of("gemm")))
        return seconds + device.launch.value

    def _attention_seconds(self, attention: SplitAttention) -> float:
        """Of one rank's queries and all keys, block by block: its contractions, and the scores that are written."""
        cascade, tp = attention.cascade, self.mesh.tp

        def elements(ranks: Iterable[object]) -> float:
            found = 1.0
            for rank in dict.fromkeys(map(str, ranks)):
                found *= attention.sizes.get(rank, 1)
            return found / attention.parts / tp

        flop = wide = 0.0
        for einsum in cascade.before:
            flop += 2 * elements((*einsum.kept, *einsum.reduced)) if einsum.reduction == "sum" else 0.0
            wide += elements(einsum.kept) if attention.key in einsum.kept else 0.0
        for component in cascade.monoid.components:
            flop += 2 * elements((*component.indices, attention.key)) if component.reduction == "sum" else 0.0
            wide += elements((attention.query, attention.key)) if component.reduction == "sum" else 0.0
        rate = self.device.matrix_rate(short(attention.dtype)) * self.device.efficiency_of("gemm")
        moved = 2 * wide * max(4, attention.dtype.itemsize)
        kernels = 4 * attention.parts * len(cascade.monoid.components)
        return max(flop / rate, moved / bandwidth(self.device)) + kernels * self.device.launch.value

    # --- collectives

    def _tensor(self, nodes: Iterable[Node]) -> tuple[float, float]:
        if self.tensor is None:
            return 0.0, 0.0

        def seconds(table: Mapping[str, list[Collective]]) -> float:
            wanted = (each for node in nodes for each in table.get(node.name, ()))
            return sum(group_cost(each.kind, each.size, self.mesh.tp, 1, self.device).seconds for each in wanted)

        nodes = list(nodes)
        return seconds(self.tensor.forward), seconds(self.tensor.backward)

    def _context(self, nodes: Iterable[Node]) -> tuple[float, float]:
        forward = backward = 0.0
        for attention in filter(None, map(attention_of, nodes)):
            once, back = context_seconds(attention, self.context, self.mesh, self.device)
            forward, backward = forward + once, backward + back
        return forward, backward

    def _context_hidden(self, nodes: Iterable[Node]) -> tuple[float, float]:
        """Blocks go round beside the kernels of the block before; the tree's exchanges are waited for."""
        if self.context != "ring" or self.mesh.cp == 1:
            return 0.0, 0.0
        kernels = sum(self._attention_seconds(each) for each in map(attention_of, nodes) if each is not None)
        share = (self.mesh.cp - 1) / self.mesh.cp * kernels
        return share, (BACKWARD + 1) * share

    def context_waits(self) -> float:
        """Seconds of all attentions' exchanges, of one microbatch, that kernels do not hide."""
        nodes = [node for node in self.graph.nodes if attention_of(node) is not None]
        sent, hidden = self._context(nodes), self._context_hidden(nodes)
        return sum(max(0.0, seconds - beside) for seconds, beside in zip(sent, hidden, strict=True))

    def _experts(self, nodes: Iterable[Node]) -> tuple[float, float]:
        """Tokens' states to their experts and back, of each layer; their gradients likewise."""
        if self.mesh.ep == 1:
            return 0.0, 0.0
        stride = self.mesh.stride("ep")
        sizes = (self._routers[node.name] for node in nodes if node.name in self._routers)
        once = sum(2 * group_cost("all_to_all", size, self.mesh.ep, stride, self.device).seconds for size in sizes)
        return once, once

    def _parameters(
        self, paths: Iterable[str], costs: StageCosts
    ) -> tuple[str, tuple[float, float], tuple[float, float]]:
        """Sharded parameters, gathered layer by layer ahead of the kernels in each pass, and gradients scattered."""
        if self.mesh.fsdp == 1:
            return "parameters", (0.0, 0.0), (0.0, 0.0)
        paths = list(paths)
        size = sum(self.sizes[path] / self.shares(path) for path in paths)
        layers = max(1, len({path[: found.end()] for path in paths if (found := _LAYER.search(path))}))
        stride = self.mesh.stride("fsdp")
        gather = group_cost("all_gather", size, self.mesh.fsdp, stride, self.device).seconds
        scatter = group_cost("reduce_scatter", size, self.mesh.fsdp, stride, self.device).seconds
        costs.gathered = int(2 * size / layers)
        # The first layer's parameters nothing hides, nor the last layer's gradients.
        hidden = (
            min(costs.forward, gather * (1 - 1 / layers)), min(costs.backward, (gather + scatter) * (1 - 1 / layers)),
        )  # fmt: skip
        return "parameters", (gather, gather + scatter), hidden


def context_seconds(attention: SplitAttention, form: str, mesh: Mesh, device: Device) -> tuple[float, float]:
    """Seconds of one attention's exchanges, forward and backward; what is sent is what
    ``runtime.context_parallel.exchange`` sends."""
    if mesh.cp == 1:
        return 0.0, 0.0
    element, stride = attention.dtype.itemsize, mesh.stride("cp")

    def operand(positions: Iterable[int]) -> float:
        total = 0.0
        for at in positions:
            size = 1.0
            for extent in attention.operands[at].sizes:
                size *= extent
            total += size * element / mesh.tp
        return total

    keys, queries = operand(attention.travelling), operand(attention.asking)
    if form == "ring":
        hop = neighbour_seconds(keys / mesh.cp, stride, device)
        return (mesh.cp - 1) * hop, (2 * mesh.cp - 1) * hop
    sums = maxima = 0.0
    for component in attention.cascade.monoid.components:
        size = float(max(4, element))
        for rank in component.indices:
            size *= attention.sizes[rank.name]
        sums, maxima = (sums + size, maxima) if component.reduction == "sum" else (sums, maxima + size)

    def cost(kind: str, size: float) -> float:
        return group_cost(kind, size / mesh.tp, mesh.cp, stride, device).seconds

    gathered = cost("all_gather", queries * mesh.tp)
    forward = gathered + cost("all_reduce", maxima) + cost("all_reduce", sums)
    return forward, gathered + cost("all_gather", sums) + cost("all_reduce", queries * mesh.tp)


def attention_of(node: Node) -> SplitAttention | None:
    """The attention over devices that a node calls."""
    found = getattr(node.target, "attention", None)
    return found if isinstance(found, SplitAttention) else None


def computed(nodes: Iterable[Node]) -> Iterable[Node]:
    """Ops that write a tensor, not those that look at one another way."""
    for node in nodes:
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor):
            name = str(getattr(node.target, "__name__", node.target)).split(".")[0]
            if name not in _VIEWS:
                yield node


def node_bytes(node: Node) -> float:
    value = node.meta.get("val")
    return float(value.numel() * value.element_size()) if isinstance(value, torch.Tensor) else 0.0


def bandwidth(device: Device) -> float:
    return device.bandwidth * device.efficiency_of("memory")


def short(dtype: torch.dtype) -> str:
    return SHORT_DTYPE[str(dtype).removeprefix("torch.")]


def _dims(node: Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else 0


def _routers(graph: StepGraph) -> dict[str, float]:
    """Choices of experts: the first op that reads a choice's indices' scores -> bytes of what is routed: each token's
    state once for each expert chosen."""
    free = free_nodes(graph)
    found: dict[str, float] = {}
    for node in graph.nodes:
        if node.target is not aten.topk.default or node in free:
            continue
        scores, chosen = node.args[0], node.args[1]
        source = scores
        while isinstance(source, Node) and source.target is not aten.linear.default:
            source = next((each for each in source.all_input_nodes if each not in free), None)
        if isinstance(source, Node) and isinstance(source.args[0], Node) and isinstance(chosen, int):
            found[source.name] = node_bytes(source.args[0]) * chosen
    return found
