"""Ways to generate a kernel that prices do not tell apart are timed once, and remembered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from effcc.codegen import variant_timing
from effcc.codegen.kernel_variants import KernelVariants
from effcc.codegen.variant_timing import MOST, TimedVariants, close_ones, with_times
from effcc.cost_model.gemm_measurement import machine_name, read_measurements
from effcc.cost_model.tile_cost import KernelVariant, TileRates
from effcc.passes.raising.choose import choose
from effcc.passes.raising.group import Group
from effcc.passes.raising.raise_graph import raise_graph
from raised_graphs import EVERYTHING, record

RATES = TileRates(2, 16, 1e11, 4e-10, (("exp", 6e-11),), ((6e4, 9e10), (1e6, 3e10), (1e8, 6e9)), 1e-6)


def priced(*seconds: float) -> tuple[KernelVariant, ...]:
    return tuple(KernelVariant(f"way {n}", value, (("rows", n),) if n else ()) for n, value in enumerate(seconds))


def test_only_what_prices_do_not_tell_apart_is_timed() -> None:
    rule, second, third, _ = found = priced(1.0, 1.05, 0.96, 2.0)
    assert close_ones(found, 0.12) == [rule, third, second]
    assert close_ones(priced(1.0, 1.2, 1.3), 0.12) == [], "the rule's is the cheapest by far"
    assert close_ones(priced(1.0, 0.5), 0.12) == [], "another is"
    rule, second, third = found = priced(1.0, 0.5, 0.52)
    assert close_ones(found, 0.12) == [rule, second, third], "the rule's time is the measure of the others"
    assert len(close_ones(priced(*[1.0] * 9), 0.12)) == MOST
    found = (rule, replace(second, seconds=1.2, alike=0.25), replace(third, seconds=1.2))
    assert close_ones(found, 0.12) == list(found[:2]), "each by what is told apart of it"


def test_times_and_prices_are_in_one_measure() -> None:
    rule, second, _ = found = priced(1.0, 1.05, 2.0)
    made = with_times(found, {rule: 3.0, second: 2.5})
    assert [each.seconds for each in made] == [3.0, 2.5, 6.0]
    assert [each.what for each in made] == ["way 0", "way 1", "way 2"]
    assert [each.measured for each in made] == [True, True, False]
    assert [each.alike for each in made] == [0.0, 0.0, found[2].alike], "a time needs no doubt, a price does"
    assert [each.schedule for each in made] == [each.schedule for each in found]


@pytest.fixture
def group() -> Group:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) / 8, -1) @ v

    (run,) = record(attention, [torch.randn(1, 2, 256, 16) for _ in range(3)])
    (found,) = choose(raise_graph(run.graph), EVERYTHING).groups
    return found


def test_a_kernel_is_timed_once(group: Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variant_timing, "ERROR", 1e9)
    monkeypatch.setattr(variant_timing, "BUSY", 0.0)  # other tests may hold the processor
    monkeypatch.setattr(variant_timing, "MOST", 2)  # two are compiled
    variants = TimedVariants(KernelVariants(RATES), tmp_path)
    found = variants(group)
    timed = [each for each in found if each.measured]
    assert len(timed) == 2 and timed[0] is found[0]
    assert all(0 < each.seconds < 10 for each in timed)
    (stored,) = read_measurements(tmp_path / "kernels.json")[machine_name()].values()
    assert sorted(stored.values()) == sorted(each.seconds for each in timed)
    monkeypatch.setattr(TimedVariants, "timed", lambda *_: pytest.fail("it was timed again"))
    assert TimedVariants(KernelVariants(RATES), tmp_path)(group) == found


def test_without_quiet_the_prices_stay(group: Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variant_timing, "ERROR", 1e9)
    monkeypatch.setattr(TimedVariants, "timed", lambda *_: {})
    assert TimedVariants(KernelVariants(RATES), tmp_path)(group) == KernelVariants(RATES)(group)
    assert not list(tmp_path.iterdir())


def test_what_may_not_fit_twice_is_not_timed(group: Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variant_timing, "ERROR", 1e9)
    monkeypatch.setattr(variant_timing, "LARGEST", 1000)
    monkeypatch.setattr(TimedVariants, "timed", lambda *_: pytest.fail("it was timed"))
    assert TimedVariants(KernelVariants(RATES), tmp_path)(group) == KernelVariants(RATES)(group)
