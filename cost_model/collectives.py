"""Time of collectives and copies: latency and bandwidth of each link, by algorithm.

A message of n bytes takes ``alpha + n / beta`` on a link (Hockney, Parallel Computing 20, 1994). A collective over p
ranks is rounds of such messages; the rounds and bytes of each algorithm are those of Thakur, Rabenseifner and Gropp
(Optimization of collective communication operations in MPICH, 2005) and of NCCL's rings and trees. Groups that span
nodes run in two levels: within the node, then between equal ranks of all nodes, each over its own network link.
Transfers that share a link share its bandwidth evenly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import OptionError
from .devices import Device, Link

#: What each kind moves: ``bytes`` is the size of the full buffer, on the rank that holds all of it.
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send")
#: Algorithms of each kind on one level.
ALGORITHMS: dict[str, tuple[str, ...]] = {
    "all_reduce": ("ring", "halving_doubling", "tree"),
    "all_gather": ("ring", "halving_doubling"),
    "reduce_scatter": ("ring", "halving_doubling"),
    "all_to_all": ("pairwise", "bruck"),
    "broadcast": ("chain", "tree"),
    "send": ("direct",),
}
#: Pieces that pipelined chains and trees cut a message into at most, and the least bytes of one (NCCL's slices).
_PIECES, _PIECE_BYTES = 256, 1 << 19


@dataclass(frozen=True)
class CollectiveCost:
    """Seconds of a collective, how it is done, and the share of them that is latency."""

    seconds: float
    algorithm: str
    latency: float


def collective_cost(
    kind: str, size: float, ranks: int, device: Device, *, algorithm: str | None = None, transfers: int = 1
) -> CollectiveCost:
    """Cost of a collective over ``ranks`` devices, filled node by node, on a buffer of ``size`` bytes.

    ``transfers`` collectives go over the same links at the time, this one included. Without an ``algorithm`` the
    cheapest is taken. Raises OptionError for an unknown kind or algorithm, DeviceError where there is no such link.
    """
    if kind not in ALGORITHMS:
        raise OptionError(f"unknown collective {kind!r}", remedy=f"known: {', '.join(KINDS)}")
    if size < 0 or ranks < 1 or transfers < 1:
        raise OptionError("a collective has at least 0 bytes, one rank and one transfer", remedy="correct the numbers")
    if ranks == 1 or size == 0:
        return CollectiveCost(0.0, "none", 0.0)
    node = next((link for link in device.links if link.scope == "node"), None)
    if kind == "send":
        link = node if node is not None and ranks <= node.devices else device.link("cluster")
        return _level(kind, size, 2, link, algorithm, transfers)
    inside = min(ranks, node.devices) if node is not None else 1
    if inside == ranks and node is not None:
        return _level(kind, size, ranks, node, algorithm, transfers)
    network = device.link("cluster")
    flat = _level(kind, size, ranks, network, algorithm, transfers)
    if node is None or ranks % inside:
        return flat
    levels = _two_levels(kind, size, inside, ranks // inside, node, network, algorithm, transfers)
    return min(flat, levels, key=lambda cost: cost.seconds)


def _two_levels(
    kind: str, size: float, inside: int, nodes: int, node: Link, network: Link, algorithm: str | None, transfers: int
) -> CollectiveCost:
    """Within nodes and between them; between nodes each rank carries its share over its own link."""
    share = size / inside
    parts = {
        "all_reduce": [
            ("reduce_scatter", size, inside, node),
            ("all_reduce", share, nodes, network),
            ("all_gather", size, inside, node),
        ],
        "all_gather": [("all_gather", share, nodes, network), ("all_gather", size, inside, node)],
        "reduce_scatter": [("reduce_scatter", size, inside, node), ("reduce_scatter", share, nodes, network)],
        # each rank first hands what goes to rank i of any node to its neighbour i
        "all_to_all": [("all_to_all", size, inside, node), ("all_to_all", size, nodes, network)],
        "broadcast": [("broadcast", size, nodes, network), ("broadcast", size, inside, node)],
    }[kind]
    costs = []
    for part, part_size, part_ranks, link in parts:
        chosen = algorithm if algorithm in ALGORITHMS[part] else None
        costs.append(_level(part, part_size, part_ranks, link, chosen, transfers))
    names = "+".join(f"{cost.algorithm}({ranks})" for cost, (_, _, ranks, _) in zip(costs, parts, strict=True))
    return CollectiveCost(sum(cost.seconds for cost in costs), names, sum(cost.latency for cost in costs))


def _level(kind: str, size: float, ranks: int, link: Link, algorithm: str | None, transfers: int) -> CollectiveCost:
    if algorithm is not None and algorithm not in ALGORITHMS[kind]:
        raise OptionError(
            f"{kind} has no algorithm {algorithm!r}", remedy=f"known for it: {', '.join(ALGORITHMS[kind])}"
        )
    if ranks == 1:
        return CollectiveCost(0.0, "none", 0.0)
    alpha, beta = link.latency.value, link.bandwidth.value / transfers
    costs = []
    for name in (algorithm,) if algorithm is not None else ALGORITHMS[kind]:
        rounds, moved = rounds_and_bytes(kind, name, size, ranks)
        costs.append(CollectiveCost(rounds * alpha + moved / beta, name, rounds * alpha))
    return min(costs, key=lambda cost: cost.seconds)


def rounds_and_bytes(kind: str, algorithm: str, size: float, ranks: int) -> tuple[float, float]:
    """Messages that follow each other, and the bytes that the busiest rank sends, of one level."""
    rest = (ranks - 1) / ranks * size
    levels = math.ceil(math.log2(ranks))
    if algorithm == "ring":
        return (2 * (ranks - 1), 2 * rest) if kind == "all_reduce" else (ranks - 1, rest)
    if algorithm == "halving_doubling":
        # ranks beyond the last power of two fold their data into a neighbour's first, and get the result last
        extra = 0 if ranks == 2 ** int(math.log2(ranks)) else 1
        inner = 2 ** int(math.log2(ranks))
        once = (inner - 1) / inner * size
        doubled = 2 if kind == "all_reduce" else 1
        return doubled * math.log2(inner) + 2 * extra, doubled * once + 2 * extra * size
    if algorithm == "tree":
        # pipelined: the pieces follow each other through the levels; two trees share the link's both directions
        pieces = _pieces(size)
        ways = 2 if kind == "all_reduce" else 1
        return ways * levels + pieces - 1, ways * size + (levels - 1) * size / pieces
    if algorithm == "chain":
        pieces = _pieces(size)
        return ranks - 1 + pieces - 1, size + (ranks - 2) * size / pieces
    if algorithm == "pairwise":
        return ranks - 1, rest
    if algorithm == "bruck":
        return levels, levels * size / 2
    return 1, size


def _pieces(size: float) -> int:
    return int(max(1, min(_PIECES, size // _PIECE_BYTES)))


def copy_seconds(size: float, device: Device, tier: str, transfers: int = 1) -> float:
    """Seconds of one copy between the device and its ``host`` or ``disk`` tier, when that many copies go the same way.

    A copy to disk passes the host: it takes the slower of the two, since they are pipelined.
    """
    if tier not in ("host", "disk"):
        raise OptionError(f"no copies to tier {tier!r}", remedy="host or disk")
    names = ("host",) if tier == "host" else ("host", "disk")
    latency = sum(device.tiers[name].latency.value for name in names)
    return latency + max(size * transfers / device.tiers[name].bandwidth.value for name in names)


def shared_ends(starts: Sequence[float], sizes: Sequence[float], bandwidth: float) -> list[float]:
    """When transfers end that share one link evenly while they overlap (processor sharing); seconds and bytes."""
    left = dict(enumerate(map(float, sizes)))
    ends = [0.0] * len(sizes)
    now = 0.0
    while left:
        active = [i for i in left if starts[i] <= now]
        coming = [starts[i] for i in left if starts[i] > now]
        if not active:
            now = min(coming)
            continue
        rate = bandwidth / len(active)
        least = min(active, key=lambda i: (left[i], i))
        step = left[least] / rate
        until = min([now + step, *coming])
        finishes = until >= now + step
        for i in active:
            left[i] -= (until - now) * rate
        now = until
        if finishes:
            ends[least] = now
            del left[least]
    return ends


def fit_alpha_beta(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Latency (seconds) and bandwidth (bytes a second) of a link from measured messages, least squares of the relative
    error, neither below zero. Raises OptionError for fewer than two sizes."""
    import numpy as np

    if len(sizes) != len(seconds) or len(set(sizes)) < 2 or min(seconds) <= 0:
        raise OptionError("a link is fitted to messages of two sizes or more", remedy="measure more sizes")
    time = np.asarray(seconds, np.float64)
    table = np.stack([np.ones(len(time)), np.asarray(sizes, np.float64)], axis=1) / time[:, None]
    (alpha, inverse), *_ = np.linalg.lstsq(table, np.ones(len(time)), rcond=None)
    if alpha < 0:
        alpha, inverse = 0.0, float(table[:, 1].sum() / (table[:, 1] ** 2).sum())
    if inverse <= 0:
        raise OptionError("the measured times do not grow with the size", remedy="measure larger messages")
    return float(alpha), float(1 / inverse)
