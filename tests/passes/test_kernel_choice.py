"""How a group's kernel is generated, chosen with what is fused: the cheapest variant, where prices tell it apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from effcc.cost_model.devices import load_device
from effcc.cost_model.tile_cost import KernelVariant
from effcc.inspection.schedule import chosen_words
from effcc.passes.raising.choose import Choice, Chosen, Rates, choose
from effcc.passes.raising.group import Group
from effcc.passes.raising.raise_graph import Raised, raise_graph
from msgspec.structs import replace as replace_decision
from raised_graphs import record

CPU = Choice(Rates.of(load_device("cpu")))


@pytest.fixture(scope="module")
def raised() -> Raised:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) / 8, -1) @ v

    (run,) = record(attention, [torch.randn(1, 1, 2200, 64) for _ in range(3)])
    return raise_graph(run.graph)


def chosen_with(raised: Raised, *others: float) -> Chosen:
    def variants(group: Group) -> tuple[KernelVariant, ...]:
        found = [KernelVariant(f"tile {number}", price, (("rows", number),)) for number, price in enumerate(others)]
        return (KernelVariant("the rule's", 1.0), *found)

    return choose(raised, replace(CPU, variants=variants))


def test_the_cheapest_variant_is_what_the_kernel_is_made_with(raised: Raised) -> None:
    chosen = chosen_with(raised, 0.9, 0.7, 2.0)
    (group,) = chosen.groups
    assert group.fused.schedule == {"rows": 1}
    (decision,) = [each for each in chosen.decisions if each.kind == "kernel"]
    assert decision.chosen == "tile 1"
    assert [each.value for each in decision.alternatives] == [1.0, 0.9, 0.7, 2.0]
    assert decision.bound == 0.7
    (together,) = [each for each in chosen.decisions if each.chosen == "together"]
    (plain,) = [each for each in choose(raised, CPU).decisions if each.chosen == "together"]
    seconds = {each.what: each.value for each in together.alternatives}
    before = {each.what: each.value for each in plain.alternatives}
    assert seconds["as written"] == pytest.approx(before["as written"])
    assert seconds["together"] == pytest.approx(before["together"] * 0.7), "seconds, with nothing added for doubt"
    assert together.bound == pytest.approx(seconds["together"])


def test_what_prices_do_not_tell_apart_stays_with_the_rule(raised: Raised) -> None:
    (group,) = chosen_with(raised, 0.96, 1.3).groups
    assert group.fused.schedule == {}


def test_each_variant_says_how_near_it_is_told_apart_and_whether_it_was_timed(raised: Raised) -> None:
    """A price that is good to a quarter is no reason; a time that is 4 % shorter is."""

    def variants(group: Group) -> tuple[KernelVariant, ...]:
        return (
            KernelVariant("the rule's", 1.0, measured=True, alike=0.0),
            KernelVariant("priced", 0.8, (("rows", 1),), alike=0.25),
            KernelVariant("timed", 0.96, (("rows", 2),), measured=True, alike=0.0),
        )

    chosen = choose(raised, replace(CPU, variants=variants))
    (group,) = chosen.groups
    assert group.fused.schedule == {"rows": 2}
    (decision,) = [each for each in chosen.decisions if each.kind == "kernel"]
    assert [(each.what, each.measured) for each in decision.alternatives] == [
        ("the rule's", True), ("priced", False), ("timed", True),
    ]  # fmt: skip
    assert chosen_words(replace_decision(decision, alternatives=decision.alternatives[::2])) == "timed (measured)"
    assert chosen_words(decision) == "timed (prices this near are not told apart)"


def test_what_is_fused_for_memory_is_told_in_seconds_and_in_words(raised: Raised) -> None:
    """Kernels so slow that only the scores, which are then never stored, speak for them."""
    slow = replace(CPU, rates=replace(CPU.rates, fused=CPU.rates.fused / 4))
    chosen = choose(raised, slow)
    one, together = (each for each in chosen.decisions if each.kind == "fusion")
    seconds = {each.what: each.value for each in one.alternatives}
    assert one.chosen == "one kernel" and seconds["one kernel"] > seconds["as written"]
    whole = {each.what: each.value for each in together.alternatives}
    assert whole == {
        "as written": seconds["as written"],
        "what saves most first": seconds["one kernel"],
        "together": seconds["one kernel"],
    }
    assert (
        together.subject
        == "1 components as one model, 1 of them fused for the memory that it saves though it is slower"
    )
    assert chosen_words(together) == "together (slower, for the memory that it saves)"
    assert together.bound == pytest.approx(whole["together"])
