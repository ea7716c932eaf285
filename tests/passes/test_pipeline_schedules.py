"""Pipeline schedules: against torch's own generators, published memory figures, formulas and brute force."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from effcc.errors import ScheduleError
from effcc.ir.plan_file import load_plan, save_plan
from effcc.passes.pipeline_parallel import classic, torch_csv, v_shape, vocabulary
from effcc.passes.pipeline_parallel.bounds import lower_bound
from effcc.passes.pipeline_parallel.costs import PipelineCosts, uniform_costs
from effcc.passes.pipeline_parallel.heuristics import Found, best_schedule
from effcc.passes.pipeline_parallel.list_schedule import by_kind, list_schedule, stage_caps
from effcc.passes.pipeline_parallel.optimal import solve
from effcc.passes.pipeline_parallel.plan import from_plan, to_plan
from effcc.passes.pipeline_parallel.precedence import Problem
from effcc.passes.pipeline_parallel.schedule import Pass, Schedule, live_limit
from effcc.passes.pipeline_parallel.simulate import simulate
from fresh_seed import fresh_random


def schedules(ranks: int, microbatches: int) -> list[Schedule]:
    """One of each kind."""
    found = [
        classic.gpipe(ranks, microbatches),
        classic.one_forward_one_backward(ranks, microbatches),
        classic.zero_bubble_h1(ranks, microbatches),
        v_shape.zb_v(ranks, microbatches),
    ]
    if microbatches % ranks == 0:
        found.append(classic.interleaved(ranks, microbatches))
    found += [v_shape.v_half(ranks, microbatches, kind) for kind in ("", "one-barrier", "two-barriers")]
    for kind, embedding in itertools.product(("one-barrier", "two-barriers", "interlaced"), (False, True)):
        found.append(vocabulary.vocabulary_1f1b(ranks, microbatches, kind, embedding=embedding))
    return found


def random_costs(schedule: Schedule) -> PipelineCosts:
    draw = fresh_random()

    def some(count: int) -> tuple[float, ...]:
        return tuple(draw.uniform(0.5, 1.5) for _ in range(count))

    return PipelineCosts(
        forward=some(schedule.stages),
        backward=tuple(2 * value for value in some(schedule.stages)),
        output=tuple(zip(some(schedule.ranks), some(schedule.ranks), strict=True)) if schedule.vocabulary else (),
        embedding=tuple(zip(some(schedule.ranks), some(schedule.ranks), strict=True)) if schedule.embedding else (),
        transfer=draw.uniform(0, 0.3),
        transfers=draw.choice([(), tuple(draw.uniform(0, 0.3) for _ in range(schedule.stages - 1))]),
        collective=draw.uniform(0, 0.3),
        activation=(1,) * schedule.stages,
    )


@pytest.mark.parametrize("ranks, microbatches", [(2, 1), (2, 4), (4, 3), (4, 8), (5, 10), (8, 16)])
def test_every_schedule_is_sound(ranks: int, microbatches: int) -> None:
    for schedule in schedules(ranks, microbatches):
        schedule.check()
        run = simulate(schedule, uniform_costs(schedule))
        assert max(run.live) <= max(live_limit(schedule))


def test_a_schedule_that_cannot_run_is_refused() -> None:
    good = classic.one_forward_one_backward(2, 2)
    first = (Pass("B", 0, 0), *(each for each in good.orders[0] if each != Pass("B", 0, 0)))
    with pytest.raises(ScheduleError, match="wait for each other"):
        dataclasses.replace(good, orders=(first, good.orders[1])).check()
    with pytest.raises(ScheduleError, match="no rank runs"):
        dataclasses.replace(good, orders=(good.orders[0][:-1], good.orders[1])).check()
    with pytest.raises(ScheduleError, match="belongs to rank"):
        dataclasses.replace(good, orders=(good.orders[1], good.orders[0])).check()


# --- torch.distributed.pipelining


def _torch_orders(name: str, ranks: int, chunks: int, microbatches: int) -> list[list[str]]:
    """What torch's class of that name makes, without its process group."""
    from torch.distributed.pipelining import schedules as theirs

    cls: Any = getattr(theirs, name)
    made = cls.__new__(cls)
    made._n_microbatches, made.pp_group_size, made.n_local_stages = microbatches, ranks, chunks
    made._num_stages = made.num_stages = ranks * chunks
    made.number_of_rounds = max(1, microbatches // ranks)
    made.microbatches_per_round = microbatches // made.number_of_rounds
    return [
        [str(action) for action in made._calculate_single_rank_operations(rank) if action is not None]
        for rank in range(ranks)
    ]


@pytest.mark.parametrize("ranks, microbatches", [(2, 4), (4, 8), (4, 16), (8, 16)])
def test_as_torch_makes_them(ranks: int, microbatches: int) -> None:
    for mine, name in (
        (classic.interleaved(ranks, microbatches), "ScheduleInterleaved1F1B"),
        (v_shape.zb_v(ranks, microbatches), "ScheduleZBVZeroBubble"),
    ):
        assert [[str(each) for each in order] for order in mine.orders] == _torch_orders(name, ranks, 2, microbatches)
    from torch.distributed.pipelining import schedules as theirs

    orders = classic.one_forward_one_backward(ranks, microbatches).orders
    for rank in range(ranks):
        single: Any = theirs.Schedule1F1B.__new__(theirs.Schedule1F1B)
        single._n_microbatches, single._num_stages = microbatches, ranks
        single.rank, single.pp_group_size = rank, ranks
        table = single._get_pipeline_order()
        wanted = [str(action) for action in table[rank] if action is not None and "REDUCE" not in str(action)]
        found = [str(each) for each in orders[rank]]
        if rank == ranks - 1:  # torch numbers the forwards of its last rank from 1
            found, wanted = ([word.rstrip("0123456789") for word in words] for words in (found, wanted))
        assert found == wanted


def test_torch_accepts_the_csv() -> None:
    """Torch's own checker and its lowering to sends and receives take each schedule that it has actions for."""
    from torch.distributed.pipelining import schedules as theirs

    for schedule in schedules(4, 8):
        if schedule.vocabulary:
            continue
        lines = torch_csv.to_csv(schedule).splitlines()
        actions = {rank: [theirs._Action.from_str(cell) for cell in line.split(",")] for rank, line in enumerate(lines)}
        ranks = theirs._validate_schedule(actions, 4, schedule.stages, 8)
        assert tuple(ranks[stage] for stage in range(schedule.stages)) == schedule.placement
        lowered = theirs._add_send_recv(actions, ranks.__getitem__, schedule.stages)
        sends = sum("SEND_F" in str(action) for order in lowered.values() for action in order)
        moves = sum(a != b for a, b in itertools.pairwise(schedule.placement))
        assert sends == 8 * moves


def test_csv_and_back() -> None:
    for schedule in schedules(4, 8):
        if schedule.embedding:
            with pytest.raises(ScheduleError, match="embedding passes"):
                torch_csv.to_csv(schedule)
            continue
        again = torch_csv.from_csv(torch_csv.to_csv(schedule), schedule.name, schedule.vocabulary)
        assert again == schedule
    with pytest.raises(ScheduleError, match="no action"):
        torch_csv.from_csv("0F0,0Q0\n")
    with pytest.raises(ScheduleError, match="wait for each other"):
        torch_csv.from_csv("0B0,0F0\n1F0,1B0\n")


# --- what is published about them


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_published_memory(ranks: int) -> None:
    """Live microbatches: 1F1B p, two barriers p + 2, one barrier p + 1, interlaced 1.5 p (Yeung et al., table 1);
    V-Half half of 1F1B's activations and the same on all ranks, up to a constant (Qi et al., table 1); ZB-V 1F1B's."""
    many = 4 * ranks
    assert live_limit(classic.one_forward_one_backward(ranks, many))[0] == ranks
    assert live_limit(classic.zero_bubble_h1(ranks, many)) == (ranks,) * ranks
    for kind, wanted in (("two-barriers", ranks + 2), ("one-barrier", ranks + 1), ("interlaced", 3 * ranks // 2)):
        found = vocabulary.vocabulary_1f1b(ranks, many, kind, embedding=True)
        # Two ranks are so near each other that two barriers fit into one interval.
        wanted -= ranks == 2 and kind == "two-barriers"
        assert live_limit(found)[0] == wanted
        run = simulate(found, uniform_costs(found))
        assert run.live[0] == wanted
    assert live_limit(v_shape.zb_v(ranks, many)) == (2 * ranks,) * ranks
    for kind in ("", "one-barrier", "two-barriers"):
        live = live_limit(v_shape.v_half(ranks, many, kind))
        # In half microbatches: a rank has two stages of half a rank's layers.
        assert ranks <= max(live) <= ranks + 3 and max(live) - min(live) <= 1


@pytest.mark.parametrize("ranks, microbatches", [(2, 4), (4, 8), (8, 32)])
def test_makespans_by_formula(ranks: int, microbatches: int) -> None:
    """(m + p - 1)(f + b) for GPipe and 1F1B; interleaving divides the bubble; ZB-H1 leaves a third of it for f = i = w
    (Qi et al., 2024, table 1: (p - 1)(f + i - w))."""
    for make in (classic.gpipe, classic.one_forward_one_backward):
        schedule = make(ranks, microbatches)
        found = simulate(schedule, uniform_costs(schedule, forward=1, backward=2)).seconds
        assert found == pytest.approx((microbatches + ranks - 1) * 3)
    schedule = classic.interleaved(ranks, microbatches)
    found = simulate(schedule, uniform_costs(schedule, forward=1, backward=2)).seconds
    assert found == pytest.approx(3 * microbatches + (ranks - 1) * 3 / 2)
    schedule = classic.zero_bubble_h1(ranks, microbatches)
    found = simulate(schedule, uniform_costs(schedule, forward=1, backward=2)).seconds
    assert found == pytest.approx(3 * microbatches + (ranks - 1))


# --- bounds, list schedules, CP-SAT


def _all_orders(problem: Problem) -> Iterator[Schedule]:
    """Every schedule in which passes of a kind and stage go in the order of the microbatches."""
    shell = problem.shell

    def merged(queues: list[list[Pass]]) -> Iterator[tuple[Pass, ...]]:
        if not any(queues):
            yield ()
        for index, queue in enumerate(queues):
            if queue:
                rest = [each if other != index else each[1:] for other, each in enumerate(queues)]
                yield from ((queue[0], *tail) for tail in merged(rest))

    per_rank = []
    for rank in range(shell.ranks):
        queues = [[Pass(kind, stage, k) for k in range(shell.microbatches)] for kind, stage in problem.kinds(rank)]
        per_rank.append(list(merged(queues)))
    for orders in itertools.product(*per_rank):
        candidate = dataclasses.replace(shell, orders=orders)
        try:
            candidate.check()
        except ScheduleError:
            continue
        yield candidate


@pytest.mark.parametrize("limit", [None, (1, 1), (2, 1)])
def test_cp_sat_against_brute_force(limit: tuple[int, ...] | None) -> None:
    shell = classic.one_forward_one_backward(2, 3)
    problem = Problem(shell, random_costs(shell), limit)
    best = min(
        run.seconds
        for run in (simulate(each, problem.costs) for each in _all_orders(problem))
        if limit is None or all(peak <= most for peak, most in zip(run.peak, limit, strict=True))
    )
    solved = solve(problem, [shell], time_limit=20)
    assert solved.status == "optimal"
    assert solved.found.run.seconds == pytest.approx(best, rel=1e-5)
    assert solved.found.bound <= best * (1 + 1e-9)


def test_bound_below_everything() -> None:
    for shell in schedules(3, 5):
        problem = Problem(shell, random_costs(shell))
        bound = lower_bound(problem)
        assert simulate(shell, problem.costs).seconds >= bound * (1 - 1e-12)
        if shell.vocabulary != "interlaced":
            listed = list_schedule(problem, stage_caps(shell), by_kind("STFIBEWD"))
            run = simulate(listed, problem.costs)
            assert run.seconds >= bound * (1 - 1e-12)
            assert all(a <= b for a, b in zip(stage_caps(listed), stage_caps(shell), strict=True))


@pytest.mark.parametrize("kind", ["", "one-barrier", "two-barriers"])
def test_cp_sat_is_optimal_and_keeps_memory(kind: str) -> None:
    draw = fresh_random()
    ranks, microbatches = draw.choice([(2, 5), (3, 4), (2, 8)])
    shell = (
        vocabulary.vocabulary_1f1b(ranks, microbatches, kind)
        if kind
        else classic.one_forward_one_backward(ranks, microbatches)
    )
    costs = random_costs(shell)
    limit = simulate(shell, costs).peak
    solved = solve(Problem(shell, costs, limit), [shell], time_limit=20)
    assert solved.status == "optimal" and solved.found.gap < 1e-5
    assert solved.found.run.seconds <= solved.heuristic <= simulate(shell, costs).seconds * (1 + 1e-12)
    assert all(peak <= most for peak, most in zip(solved.found.run.peak, limit, strict=True))
    solved.found.schedule.check()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1f1b", "v-half"])
@pytest.mark.parametrize("kind", ["one-barrier", "two-barriers"])
def test_large_pipelines_are_near_the_bound(name: str, kind: str) -> None:
    """8 ranks, 128 microbatches, within 2 % of what no schedule can beat."""
    shell = (
        v_shape.v_half(8, 128, kind, True)
        if name == "v-half"
        else vocabulary.vocabulary_1f1b(8, 128, kind, embedding=True)
    )
    costs = uniform_costs(shell, output=(0.25, 0.25), embedding=(0.02, 0.02), transfer=0.01, collective=0.02)
    found = best_schedule(Problem(shell, costs, simulate(shell, costs).peak), [shell])
    assert found.gap < 0.02


def test_no_room() -> None:
    shell = classic.one_forward_one_backward(2, 4)
    with pytest.raises(ScheduleError, match="memory limit"):
        best_schedule(Problem(shell, uniform_costs(shell), (0, 0)), [shell])
    with pytest.raises(ScheduleError, match="multiple"):
        classic.interleaved(4, 6)
    with pytest.raises(ScheduleError, match="values of forward"):
        simulate(shell, dataclasses.replace(uniform_costs(shell), forward=(1.0,)))


# --- plans


def test_plans_and_back(tmp_path: Path) -> None:
    """Through the file, which the independent validator checks; the simulator gives the same time for the steps
    read."""
    from effcc.cost_model.simulator import simulate as run_steps

    for schedule in schedules(4, 8):
        costs = dataclasses.replace(random_costs(schedule), activation=(1024,) * schedule.stages)
        run = simulate(schedule, costs)
        made = to_plan(Found(schedule, run, lower_bound(Problem(schedule, costs))), model="m", device="a100-80g")
        save_plan(tmp_path / "plan.effcc", made, {}, {})
        read = load_plan(tmp_path / "plan.effcc").plan
        assert from_plan(read) == schedule
        assert run_steps(read.steps).makespan == pytest.approx(read.seconds) == pytest.approx(run.seconds)
        assert 0 <= read.solvers[0].gap < 1
    with pytest.raises(ScheduleError, match="not one of a pipeline"):
        from_plan(msgspec.structs.replace(read, steps=()))
