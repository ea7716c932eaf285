"""What is to be placed, what a placement costs, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ...errors import PlacementError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Weights:
    """What one unit of each term counts: a (token, expert) pair that changes device (``hops``) or node (``node``, on
    top), a token on the busiest device of a layer (``load``), an expert copied to another device (``migration``)."""

    hops: float = 1.0
    node: float = 1.0
    load: float = 1.0
    migration: float = 0.0


@dataclass(frozen=True)
class Problem:
    """Experts of ``loads.shape[0]`` layers to lay in ``slots`` physical slots a layer, an equal number on each rank.

    Args:
        loads: [layers, experts] tokens of each expert.
        transitions: [layers - 1, experts, experts] tokens counted at expert i of a layer and j of the next.
        ranks: devices, consecutive ones on the same node.
        groups: consecutive experts form groups; with ``grouped`` all copies of a group's experts lie on one node, and
            each node has the same number of groups.
        current: [layers, slots] the placement in use, if there is one.

    Raises:
        PlacementError: the numbers do not divide as they must.
    """

    loads: Floats
    transitions: Floats
    ranks: int
    nodes: int = 1
    slots: int = 0
    groups: int = 1
    grouped: bool = False
    current: Ints | None = None
    weights: Weights = Weights()

    def __post_init__(self) -> None:
        if self.slots == 0:
            object.__setattr__(self, "slots", self.experts)
        _check(self)

    @property
    def layers(self) -> int:
        return int(self.loads.shape[0])

    @property
    def experts(self) -> int:
        return int(self.loads.shape[1])

    @property
    def per_rank(self) -> int:
        """Slots of one device."""
        return self.slots // self.ranks

    @property
    def ranks_per_node(self) -> int:
        return self.ranks // self.nodes

    @property
    def replicated(self) -> bool:
        return self.slots > self.experts

    @cached_property
    def device_of_slot(self) -> Ints:
        return np.arange(self.slots, dtype=np.int64) // self.per_rank

    @cached_property
    def node_of_rank(self) -> Ints:
        return np.arange(self.ranks, dtype=np.int64) // self.ranks_per_node

    @cached_property
    def has_transitions(self) -> bool:
        return bool(self.transitions.any())

    @cached_property
    def weight_of_hops(self) -> tuple[float, float]:
        """Of a device hop and, on top, of a node hop; 0 where there is nothing to weigh."""
        if not self.has_transitions:
            return 0.0, 0.0
        return self.weights.hops, self.weights.node if self.nodes > 1 else 0.0

    def held(self, slots: Ints) -> Ints:
        """[layers, ranks, experts] copies of each expert on each device."""
        layers = slots.shape[0]
        counts = np.zeros((layers, self.ranks, self.experts), np.int64)
        np.add.at(counts, (np.arange(layers)[:, None], self.device_of_slot[None, :], slots), 1)
        return counts

    @cached_property
    def current_held(self) -> Ints | None:
        return None if self.current is None else self.held(self.current)


def _check(problem: Problem) -> None:
    def refuse(message: str, remedy: str) -> None:
        raise PlacementError(message, remedy=remedy)

    experts, ranks, nodes, slots, groups = (
        problem.experts, problem.ranks, problem.nodes, problem.slots, problem.groups,
    )  # fmt: skip
    if slots % ranks:
        what = "experts" if slots == experts else "slots"
        multiple = -(-slots // ranks) * ranks
        refuse(
            f"{slots} {what} do not divide among {ranks} ranks",
            f"with --slots {multiple} some experts get a copy"
            + (f"; if ids up to {multiple - 1} exist, say --experts {multiple}" if slots == experts else ""),
        )
    if slots < experts:
        refuse(f"{slots} slots cannot hold {experts} experts", "every expert needs a slot in each layer")
    if ranks % nodes:
        refuse(f"{ranks} ranks do not divide among {nodes} nodes", "every node has the same number of ranks")
    if experts % groups:
        refuse(f"{experts} experts do not divide into {groups} groups", "every group has the same number of experts")
    if problem.grouped and groups % nodes:
        refuse(
            f"{groups} groups do not divide among {nodes} nodes",
            "with --policy hierarchical every node has the same number of groups",
        )
    current = problem.current
    if current is not None:
        if current.shape != (problem.layers, slots):
            refuse(
                f"the current placement has {current.shape[0]} layers of {current.shape[1]} slots, "
                f"not {problem.layers} of {slots}",
                "give the placement of the same model, or leave --current out",
            )
        if current.min() < 0 or current.max() >= experts:
            refuse(f"the current placement names an expert outside 0 to {experts - 1}", "give one of the same model")


@dataclass(frozen=True)
class Costs:
    """What a placement costs. ``device`` and ``node``: hops; ``busiest``: [layers] load of the busiest device;
    ``mean``: [layers] mean load of a device; ``migrated``: slots whose expert must be copied from elsewhere."""

    device: float
    node: float
    busiest: Floats
    mean: Floats
    migrated: int

    @property
    def max_over_mean(self) -> Floats:
        """[layers], 1 where a layer has no load."""
        return np.divide(self.busiest, self.mean, out=np.ones_like(self.busiest), where=self.mean > 0)

    def objective(self, weights: Weights) -> float:
        return float(
            weights.hops * self.device
            + weights.node * self.node
            + weights.load * self.busiest.sum()
            + weights.migration * self.migrated
        )


def costs(problem: Problem, slots: Ints) -> Costs:
    """What a placement, [layers, slots] of experts in device order, costs.

    A pair of experts of consecutive layers is a hop where no copy of one shares a device with a copy of the other. An
    expert's load is split equally among its copies.
    """
    held = problem.held(slots)
    copies = held.sum(axis=1)
    load = np.einsum("lre,le->lr", held, problem.loads / np.maximum(copies, 1))
    device = node = 0.0
    if problem.has_transitions:
        device = _hops(problem.transitions, held > 0)
        if problem.nodes > 1:
            by_node = held.reshape(problem.layers, problem.nodes, problem.ranks_per_node, problem.experts)
            node = _hops(problem.transitions, by_node.sum(axis=2) > 0)
    migrated = 0
    if problem.current_held is not None:
        migrated = int(np.maximum(held - problem.current_held, 0).sum())
    return Costs(device, node, load.max(axis=1), load.mean(axis=1), migrated)


def _hops(transitions: Floats, present: Flags) -> float:
    """``present``: [layers, places, experts]."""
    total = 0.0
    here = present.astype(np.float32)
    for number, counts in enumerate(transitions):
        apart = (here[number].T @ here[number + 1]) == 0
        total += float(np.einsum("ij,ij->", counts, apart))
    return total


@dataclass(frozen=True)
class Result:
    """A placement [layers, slots] with its costs. ``bound``: no placement has a smaller objective. ``status``:
    ``optimal`` or ``feasible``. ``seconds``: of the search and of the bound, without compiling."""

    slots: Ints
    costs: Costs
    objective: float
    bound: float
    seconds: float

    @property
    def gap(self) -> float:
        """Distance of the objective from the bound, as a share of the objective."""
        if self.objective <= 0:
            return 0.0
        share = max(0.0, (self.objective - self.bound) / self.objective)
        return share if share > 1e-9 else 0.0

    @property
    def status(self) -> str:
        return "optimal" if self.gap == 0.0 else "feasible"
