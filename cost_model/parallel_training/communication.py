"""What a training step sends: collectives of tensor, data, context and expert groups, and the pipeline's transfers.

Seconds are those of ``cost_model/collectives.py`` (latency and bandwidth by algorithm) over links at the share of their
bandwidth that was calibrated.
"""

from __future__ import annotations

import msgspec

from ..devices import Device, Figure
from .constants import Constants
from .mesh import group_cost, neighbour_seconds
from .setup import Training


def _scaled(device: Device, node: float, network: float) -> Device:
    """The device with links at these shares of their bandwidth."""
    share = {"node": node, "cluster": network}
    links = tuple(
        msgspec.structs.replace(
            link,
            bandwidth=Figure(value=link.bandwidth.value * share.get(link.scope, 1.0), source=link.bandwidth.source),
        )
        for link in device.links
    )
    return msgspec.structs.replace(device, links=links, gemm=())


class Communication:
    """Seconds of each group's communication in one step."""

    def __init__(self, training: Training, device: Device, constants: Constants) -> None:
        self.training = training
        self._collectives = _scaled(device, constants.node_link, constants.network)
        self._sends = _scaled(device, constants.transfer, constants.transfer)

    def _group(self, kind: str, size: float, axis: str, ranks: int | None = None) -> float:
        mesh = self.training.mesh
        count = getattr(mesh, axis) if ranks is None else ranks
        return group_cost(kind, size, count, mesh.stride(axis), self._collectives).seconds

    @property
    def _activation(self) -> float:
        """Bytes of a layer's input, whole."""
        training = self.training
        return float(training.tokens * training.shape.hidden * training.element)

    def tensor_layer(self) -> float:
        """Of one layer in one direction: its two regions' sums. With sequence parallelism each is a reduce-scatter and
        an all-gather."""
        if self.training.sequence_parallel:
            kinds = ("reduce_scatter", "all_gather")
            return 2 * sum(self._group(kind, self._activation, "tp") for kind in kinds)
        return 2 * self._group("all_reduce", self._activation, "tp")

    def tensor_gather(self) -> float:
        """Of one layer's backward with sequence parallelism: its two inputs, gathered once more for the weights'
        gradients."""
        return 2 * self._group("all_gather", self._activation, "tp") if self.training.sequence_parallel else 0.0

    def head(self) -> float:
        """Of the loss over a split vocabulary: three sums of a number a token, and the hidden state's."""
        tokens = self.training.tokens * 4.0
        return 3 * self._group("all_reduce", tokens, "tp") + self._group("all_reduce", self._activation, "tp")

    def context_layer(self) -> float:
        """Of one layer's forward: keys and values go once around the ring."""
        training = self.training
        size = 2.0 * training.tokens * training.shape.kv_width / training.mesh.tp * training.element
        return self._group("all_gather", size * training.mesh.cp, "cp")

    def expert_layer(self) -> float:
        """Of one layer's forward: each token's state goes to its experts and back."""
        training = self.training
        routed = training.tokens * training.shape.experts_per_token * training.shape.hidden * training.element
        return 2 * self._group("all_to_all", float(routed), "ep") if training.shape.experts else 0.0

    def transfer(self) -> float:
        """Of one activation to the next stage."""
        training, mesh = self.training, self.training.mesh
        if mesh.pp == 1:
            return 0.0
        shards = mesh.tp if training.sequence_parallel or training.sharded_transfers else 1
        stride = mesh.stride("pp")
        seconds = neighbour_seconds(self._activation / shards, stride, self._sends)
        if shards > 1 and not training.sequence_parallel:
            seconds += self._group("all_gather", self._activation, "tp")
        return seconds

    def gradients(self, parameters: float, gradient: int) -> float:
        """Of all gradients of a rank, once a step: summed over replicas, scattered where they are sharded."""
        training, mesh = self.training, self.training.mesh
        size = parameters * gradient
        seconds = 0.0
        share = size
        if mesh.fsdp > 1:
            seconds += self._group("reduce_scatter", size, "fsdp")
            share = size / mesh.fsdp
        replicas = mesh.dp * mesh.cp
        if replicas > 1:
            kind = "reduce_scatter" if training.zero else "all_reduce"
            seconds += group_cost(kind, share, replicas, mesh.tp, self._collectives).seconds
            if training.zero:
                updated = share / gradient * training.element
                seconds += group_cost("all_gather", updated, replicas, mesh.tp, self._collectives).seconds
        return seconds

    def gathered_parameters(self, parameters: float) -> float:
        """Of one pass over sharded parameters: each rank gathers all of its stage's."""
        return self._group("all_gather", parameters * self.training.element, "fsdp")

    def tied_embedding(self, gradient: int) -> float:
        """First and last stage sum the gradient of the table that they share."""
        training = self.training
        if not training.shape.tied or training.mesh.pp == 1:
            return 0.0
        size = float(training.shape.vocabulary * training.shape.hidden) / training.mesh.tp * gradient
        stride = training.mesh.stride("pp") * (training.mesh.pp - 1)
        return group_cost("all_reduce", size, 2, stride, self._collectives).seconds
