"""Collectives against their lower bounds and against rounds carried out one by one."""

from __future__ import annotations

import itertools
import math

import pytest
from effcc.cost_model.collectives import (
    ALGORITHMS,
    collective_cost,
    copy_seconds,
    fit_alpha_beta,
    rounds_and_bytes,
    shared_ends,
)
from effcc.cost_model.devices import load_device
from effcc.errors import DeviceError, OptionError
from fresh_seed import fresh_random

MIB = 2.0**20


def ring_all_reduce(ranks: int, size: float) -> tuple[int, float]:
    """Carried out: chunks go round, first summed, then copied, until every rank has every sum."""
    chunk = size / ranks
    have = [[{(rank, piece)} for piece in range(ranks)] for rank in range(ranks)]
    rounds, sent = 0, 0.0
    for step in range(2 * (ranks - 1)):
        moves = []
        for rank in range(ranks):
            piece = (rank - step) % ranks
            moves.append(((rank + 1) % ranks, piece, set(have[rank][piece])))
        for target, piece, what in moves:
            have[target][piece] |= what
        rounds, sent = rounds + 1, sent + chunk
    assert all(len(have[rank][piece]) == ranks for rank in range(ranks) for piece in range(ranks))
    return rounds, sent


@pytest.mark.parametrize("ranks", [2, 3, 4, 7, 8])
def test_a_ring_is_its_rounds_carried_out(ranks: int) -> None:
    assert rounds_and_bytes("all_reduce", "ring", 1000.0, ranks) == pytest.approx(ring_all_reduce(ranks, 1000.0))


@pytest.mark.parametrize("ranks", [2, 4, 8, 16, 64])
def test_recursive_doubling_is_its_rounds_carried_out(ranks: int) -> None:
    """Each round doubles what a rank has: 1, 2, 4 ... shares of the result are sent."""
    share, rounds, sent = 1.0 / ranks, 0, 0.0
    have = 1
    while have < ranks:
        rounds, sent, have = rounds + 1, sent + have * share, 2 * have
    assert rounds_and_bytes("all_gather", "halving_doubling", 1.0, ranks) == pytest.approx((rounds, sent))


def test_nothing_is_below_what_must_move() -> None:
    """Every rank must send (p - 1) / p of the buffer once, twice to reduce and to spread it (Patarasuk and Yuan, 2009);
    news of one rank reaches all in log2 p messages."""
    random = fresh_random()
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
        for name in ALGORITHMS[kind]:
            ranks, size = random.randrange(2, 200), random.uniform(1, 1e9)
            rounds, sent = rounds_and_bytes(kind, name, size, ranks)
            least = (ranks - 1) / ranks * size * (2 if kind == "all_reduce" else 1)
            if name in ("halving_doubling", "bruck") and ranks & (ranks - 1):
                least *= 0.5
            assert sent >= least * (1 - 1e-9), (kind, name, ranks)
            assert rounds >= math.floor(math.log2(ranks)), (kind, name, ranks)


def test_small_messages_go_by_few_rounds_and_large_ones_by_few_bytes() -> None:
    h100 = load_device("h100")
    small = collective_cost("all_reduce", 1024, 8, h100)
    large = collective_cost("all_reduce", 1024 * MIB, 8, h100)
    assert small.algorithm != "ring" and small.latency > 0.9 * small.seconds
    bus = 2 * 7 / 8 * 1024 * MIB / large.seconds
    assert 0.9 < bus / h100.link("node").bandwidth.value <= 1.0
    assert small.seconds < collective_cost("all_reduce", 1024, 8, h100, algorithm="ring").seconds


def test_groups_over_nodes_use_every_network_link() -> None:
    """Two levels: the network carries an eighth for each of eight ranks, so it beats one flat ring over the network."""
    h100 = load_device("h100")
    flat = rounds_and_bytes("all_reduce", "ring", 1024 * MIB, 64)[1] / h100.link("cluster").bandwidth.value
    made = collective_cost("all_reduce", 1024 * MIB, 64, h100)
    assert made.seconds < flat / 3
    assert made.algorithm.count("+") == 2
    assert made.seconds > collective_cost("all_reduce", 1024 * MIB, 8, h100).seconds


def test_costs_grow_with_size_ranks_and_company() -> None:
    a100 = load_device("a100-80g")
    for kind in ALGORITHMS:
        sizes = [collective_cost(kind, size, 16, a100).seconds for size in (1e3, 1e5, 1e7, 1e9)]
        assert sizes == sorted(sizes) and sizes[0] > 0
        alone, shared = (collective_cost(kind, 1e9, 8, a100, transfers=n).seconds for n in (1, 2))
        assert 1.8 * alone < shared <= 2 * alone
    assert collective_cost("all_reduce", 1e6, 1, a100).seconds == 0


def test_what_cannot_be_is_refused() -> None:
    h100, cpu = load_device("h100"), load_device("cpu")
    with pytest.raises(OptionError, match="unknown collective"):
        collective_cost("gossip", 1, 2, h100)
    with pytest.raises(OptionError, match="no algorithm"):
        collective_cost("broadcast", 1, 2, h100, algorithm="ring")
    with pytest.raises(OptionError, match="at least"):
        collective_cost("broadcast", 1, 0, h100)
    if not cpu.links:
        with pytest.raises(DeviceError, match="no link"):
            collective_cost("broadcast", 1, 4, cpu)
    with pytest.raises(OptionError, match="no copies"):
        copy_seconds(1, h100, "scratchpad")


def test_copies_take_the_slower_of_host_and_disk() -> None:
    h100 = load_device("h100")
    host, disk = (h100.tiers[name] for name in ("host", "disk"))
    assert copy_seconds(1e9, h100, "host") == pytest.approx(host.latency.value + 1e9 / host.bandwidth.value)
    assert copy_seconds(1e9, h100, "disk") >= 1e9 / min(host.bandwidth.value, disk.bandwidth.value)
    assert copy_seconds(1e9, h100, "host", transfers=3) == pytest.approx(3 * copy_seconds(1e9, h100, "host"), rel=0.01)


def test_shared_links_end_as_small_steps_of_time_do() -> None:
    random = fresh_random()
    for _ in range(20):
        count = random.randrange(1, 6)
        starts = [random.uniform(0, 3) for _ in range(count)]
        sizes = [random.uniform(0.1, 3) for _ in range(count)]
        ends, left, now, step = [0.0] * count, list(sizes), 0.0, 1e-3
        while any(size > 0 for size in left):
            active = [i for i in range(count) if left[i] > 0 and starts[i] <= now]
            for i in active:
                left[i] -= step / len(active)
                ends[i] = now + step
            now += step
        assert shared_ends(starts, sizes, 1.0) == pytest.approx(ends, abs=0.02)


def test_a_link_is_found_again_from_its_messages() -> None:
    sizes = [2.0**k for k in range(10, 28, 3)]
    seconds = [5e-6 + size / 25e9 for size in sizes]
    assert fit_alpha_beta(sizes, seconds) == pytest.approx((5e-6, 25e9))
    jitter = fresh_random()
    noisy = [second * jitter.uniform(0.95, 1.05) for second in seconds for _ in range(20)]
    alpha, beta = fit_alpha_beta(list(itertools.chain.from_iterable([size] * 20 for size in sizes)), noisy)
    assert alpha == pytest.approx(5e-6, rel=0.1) and beta == pytest.approx(25e9, rel=0.1)
    with pytest.raises(OptionError, match="two sizes"):
        fit_alpha_beta([1.0, 1.0], [1.0, 2.0])
    with pytest.raises(OptionError, match="do not grow"):
        fit_alpha_beta([1.0, 1e9], [1.0, 0.5])
