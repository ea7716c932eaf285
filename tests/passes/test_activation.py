"""Activation planning against brute force on random small joint graphs."""

from __future__ import annotations

import itertools
from dataclasses import replace
from statistics import mean
from typing import Any

import msgspec
import pytest
import torch
from effcc import torch_internals
from effcc.budget_planning import BudgetPlanner
from effcc.cost_model.devices import Figure, load_device
from effcc.passes.activation.candidates import evaluate
from effcc.passes.activation.cut import PricedCuts
from effcc.passes.activation.floor_program import program_bound
from effcc.passes.activation.master import Master
from effcc.passes.activation.options import _needed_in
from effcc.passes.activation.search import ActivationSearch
from effcc.passes.activation.simulate import Entry, Simulator
from fresh_seed import fresh_random
from random_joints import every_choice, random_joint


def test_a_priced_cut_is_the_best_of_all_choices() -> None:
    rng = fresh_random()
    for _ in range(60):
        simulator = Simulator(random_joint(rng))
        cuts = PricedCuts(simulator)
        choices = list(every_choice(simulator))
        values = simulator.problem.values
        for price in (0.0, 0.01, 0.1, 1.0):
            found = cuts.best(None, price)
            worth = evaluate(simulator, found.saved)
            cost = worth.seconds + price * sum(values[v].bytes for v in worth.saved)
            best = min(c.seconds + price * sum(values[v].bytes for v in c.saved) for c in choices)
            assert cost == pytest.approx(best, rel=1e-6, abs=1e-5), f"price {price}"


def test_a_master_problem_forgets_the_budgets_it_was_solved_for() -> None:
    rng = fresh_random()
    compared = 0
    for _ in range(12):
        search = ActivationSearch(random_joint(rng))
        options, moments = search.offers[0]
        low, high = search.steps[-1].peak, search.plain.peak
        kept = Master(search.blocks, options, moments)
        for budget in (high, low // 2, None, (low + high) // 2, high):
            fresh = Master(search.blocks, options, moments).solve(budget)
            assert kept.solve(budget) == fresh, f"budget {budget}"
            compared += fresh is not None
    assert compared >= 12


def test_bounds_hold_and_choices_are_near_the_best() -> None:
    rng = fresh_random()
    excess: list[float] = []
    floors: list[float] = []
    for number in range(60):
        problem = random_joint(rng)
        search = ActivationSearch(problem)
        choices = list(every_choice(search.simulator))
        least = min(c.peak for c in choices)
        assert search.floor_bound <= least
        assert search.quick_floor_bound <= least
        assert search.least.peak >= least
        if number % 6 == 0:
            assert search.floor_bound <= search.prove_floor() <= least
            assert search.least.peak >= search.smallest.peak >= least
        floors.append(search.least.peak / least)
        highest = max(c.peak for c in choices)
        for share in (0.1, 0.4, 0.7):
            limit = int(least + share * (highest - least))
            best = min((c.seconds for c in choices if c.peak <= limit), default=0.0)
            assert search.bound(limit) <= best + 1e-5, "the bound on the time holds"
            found = search.within(limit)
            if found is None:
                assert search.least.peak > limit
                continue
            assert found.peak <= limit
            assert found.seconds >= best - 1e-6
            excess.append((found.seconds - best) / (problem.seconds + best))
    assert mean(floors) < 1.05
    assert mean(excess) < 0.06


def test_the_floor_is_proven_where_layers_are_computed_from_layers_before() -> None:
    """Random sizes, few of them, so that results are written over operands; integers against parts of values."""
    rng = fresh_random()
    better = 0
    for _ in range(25):
        problem = random_joint(rng, ops=7, inlined=rng.choice((0.2, 0.6)))
        values = tuple(replace(value, bytes=rng.choice((8, 16, 32))) for value in problem.values)
        search = ActivationSearch(replace(problem, values=values, constant=values[0].bytes))
        least = min(c.peak for c in every_choice(search.simulator))
        parts = program_bound(search.simulator, search.blocks, search.least)
        whole = program_bound(search.simulator, search.blocks, search.least, seconds=1.0)
        assert parts <= whole <= least
        better += whole > search.floor_bound
    assert better, "no program was better than the look at one op at a time"


def test_what_runs_again_belongs_to_the_backward_that_asked_for_it() -> None:
    """In one walk over the entries, as a look ahead from each of them finds it."""
    rng = fresh_random()
    for _ in range(50):
        ops = [Entry(number, False, False) for number in range(rng.randint(0, 5))]
        ops += [Entry(rng.randint(5, 20), True, rng.random() < 0.6) for _ in range(rng.randint(0, 30))]
        owner = {number: rng.randint(0, 4) for number in range(21)}
        found = _needed_in(ops, owner)
        for position, entry in enumerate(ops):
            if entry.backward:
                asked = next((owner[each.op] for each in ops[position:] if not each.again), 0)
                assert found[position] == asked


def test_what_the_caller_holds_is_kept_at_no_cost() -> None:
    rng = fresh_random()
    for _ in range(40):
        simulator = Simulator(random_joint(rng, ops=7))
        run = simulator.run(frozenset())
        again = {v for index in run.recomputed for v in simulator.problem.ops[index].writes}
        assert not again & simulator.handed_out
        for cut in PricedCuts(simulator).frontier():
            assert not cut.saved & simulator.handed_out


def test_a_smaller_budget_has_no_larger_peak_and_no_shorter_time() -> None:
    rng = fresh_random()
    for _ in range(20):
        search = ActivationSearch(random_joint(rng, ops=10))
        top = search.steps[0].peak
        found = [search.within(limit) for limit in range(top, search.least.peak - 1, -max(1, top // 120))]
        chosen = [candidate for candidate in found if candidate is not None]
        peaks = [candidate.peak for candidate in chosen]
        assert peaks == sorted(peaks, reverse=True)
        times = [candidate.seconds for candidate in chosen]
        assert times == sorted(times)


def searched(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> ActivationSearch:
    """The search for a model's training step on a CPU of round figures; nothing is compiled."""
    figures = {"statement": 1e-10, "mask_write": 5e-9, "mask_read": 1e-9, "exp": 2e-10, "tanh": 1e-9, "rand": 6e-9}
    added = {name: Figure(value=value, source="test") for name, value in figures.items()}
    planner = BudgetPlanner(msgspec.structs.replace(load_device("cpu"), added=added))

    class Seen(Exception):
        pass

    def partition(gm: torch.fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        planner.partition(gm, joint_inputs, **kwargs)
        raise Seen

    torch._dynamo.reset()
    compiled = torch.compile(model, backend="effcc", options={"cascades": False, "repeated_modules": False})
    with torch_internals.joint_partitioner(partition), pytest.raises(Exception, match="Seen"):
        compiled(**inputs)
    (graph,) = planner.graphs
    assert graph is not None
    return graph.search


def test_of_a_real_model_a_smaller_budget_has_no_shorter_time() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=512, n_positions=128, n_embd=64, n_layer=2, n_head=8, use_cache=False, attn_implementation="eager",
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    tokens = torch.randint(0, 512, (2, 128))
    search = searched(model, {"input_ids": tokens, "labels": tokens})
    top, low = search.steps[0].peak, search.steps[-1].peak
    limits = [top - (top - low) * number // 60 for number in range(-1, 61)]
    found = [search.within(limit) for limit in limits]
    chosen = [candidate for candidate in found if candidate is not None]
    assert len(chosen) == len(limits) and all(c.peak <= limit for c, limit in zip(chosen, limits, strict=True))
    for more, less in itertools.pairwise(chosen):
        assert less.seconds >= more.seconds - 1e-9, f"{less.peak} bytes beside {more.peak}"
    assert len({candidate.key for candidate in chosen}) > 8, "budgets make a difference"
    assert all(search.bound(limit) <= c.seconds + 1e-9 for c, limit in zip(chosen, limits, strict=True))


def test_ops_that_may_not_run_again_are_never_run_again() -> None:
    rng = fresh_random()
    for _ in range(40):
        search = ActivationSearch(random_joint(rng, ops=8, banned=0.4))
        banned = {op.index for op in search.problem.ops if op.banned}
        for candidate in (*search.steps, search.least):
            assert not candidate.simulation.recomputed & banned


def test_what_the_backward_reads_is_kept_or_made_before_it_is_read() -> None:
    rng = fresh_random()
    for _ in range(60):
        simulator = Simulator(random_joint(rng, ops=8))
        saved = frozenset(v for v in simulator.made_forward if rng.random() < 0.5)
        run = simulator.run(saved)
        at_hand = set(run.saved) | simulator.given
        for entry in run.entries:
            if entry.backward:
                op = simulator.problem.ops[entry.op]
                for v in op.reads:
                    made_by = simulator.problem.values[v].op
                    assert v in at_hand or simulator.problem.ops[made_by].inlined
                at_hand.update(op.writes)
        assert run.peak >= max(run.memory[i] for i in range(len(run.memory)))
