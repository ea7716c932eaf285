"""A calibration keeps to its time: shares of it, rows that are cut where products are slow, and the account."""

from __future__ import annotations

import time
from types import SimpleNamespace

import msgspec
import pytest
import torch
from effcc.cost_model import product_probes
from effcc.cost_model.cpu_kernels import FEWEST_WARM, in_turn
from effcc.cost_model.devices import GemmMeasurement
from effcc.cost_model.measuring_time import Account, agreed, agreed_together, fair_shares
from effcc.cost_model.product_probes import FEWEST, LEAST_ROWS, MOST_CUT, Shape, interleaved, measured
from fresh_seed import fresh_random


class Clock:
    """Time that passes only where something is said to take time."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        patch.setattr(product_probes, "time", SimpleNamespace(perf_counter=lambda: self.now))


def test_shares_are_fair() -> None:
    draw = fresh_random()
    for _ in range(200):
        wanted = [10 ** draw.uniform(-3, 3) for _ in range(draw.randint(1, 30))]
        budget = 10 ** draw.uniform(-3, 3)
        shares = fair_shares(wanted, budget)
        assert sum(shares) == pytest.approx(budget)
        if sum(wanted) > budget:
            most = max(shares)
            for want, share in zip(wanted, shares, strict=True):
                assert share == pytest.approx(want if want <= most else most) and share <= want
        else:
            assert [share / want for share, want in zip(shares, wanted, strict=True)] == pytest.approx(
                [budget / sum(wanted)] * len(wanted)
            )


SHAPES = [
    Shape(layout, 1, m, k, n)
    for m, k, n in ((1, 512, 512), (64, 512, 512), (1024, 256, 512), (2048, 1024, 1024))
    for layout in product_probes.LAYOUTS
]


@pytest.mark.parametrize(("rate", "whole"), [(1e12, True), (1e9, False), (1e8, False)])
def test_slow_products_are_measured_on_fewer_rows(rate: float, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layout is ten times as slow as the others, and the first product says nothing of it."""
    clock, seconds = Clock(monkeypatch), 2.0

    def measure(dtype: str, shape: Shape, share: float) -> list[GemmMeasurement]:
        reached = rate / 10 if shape.layout == "input_gradient" else rate
        clock.now += max(share, (FEWEST + FEWEST_WARM) * shape.flop / reached)
        sizes = {"m": shape.m, "k": shape.k, "n": shape.n}
        return [GemmMeasurement(library="blas", dtype=dtype, layout=shape.layout, rate=reached, **sizes)]

    found = measured("bf16", SHAPES, seconds, rate, measure)
    rest = iter(SHAPES)
    for each in found:  # in order, with the same other sizes and no more rows
        assert any(
            (each.layout, each.k, each.n) == (shape.layout, shape.k, shape.n) and each.m <= shape.m for shape in rest
        )
        assert each.m == 1 or each.m >= LEAST_ROWS
    assert ([each.m for each in found] == [shape.m for shape in SHAPES]) == whole
    least = sum((FEWEST + FEWEST_WARM) * shape.within(0.0).flop / rate * 4 for shape in SHAPES)
    assert 0.9 * seconds < clock.now < 1.6 * seconds + least
    # No shape is measured twice.
    assert len({(each.layout, each.m, each.k, each.n) for each in found}) == len(found)


def test_few_rows_are_measured_of_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten shapes that would take a thousand times too long three are measured, in ten thirds of the time each."""
    clock, took = Clock(monkeypatch), []

    def measure(dtype: str, shape: Shape, share: float) -> list[GemmMeasurement]:
        took.append(share)
        clock.now += share
        sizes = {"m": shape.m, "k": shape.k, "n": shape.n}
        return [GemmMeasurement(library="blas", dtype=dtype, layout=shape.layout, rate=1e6, **sizes)]

    shapes = [Shape("forward", 1, 1 << 20, 8, 8 + number) for number in range(10)]
    assert len(measured("bf16", shapes, 3.0, 1e6, measure)) == MOST_CUT == 3
    assert took == pytest.approx([1.0] * 3)


def test_fewer_rows_have_the_same_other_sizes() -> None:
    shape = Shape("forward", 1, 1000, 64, 32)
    assert shape.within(shape.flop) == shape
    assert shape.within(shape.flop / 2) == Shape("forward", 1, 256, 64, 32)
    assert shape.within(0.0) == Shape("forward", 1, LEAST_ROWS, 64, 32)
    assert Shape("batched", 16, 64, 8, 8).within(2 * 4 * 64 * 64) == Shape("batched", 4, 64, 8, 8)
    assert Shape("batched", 16, 64, 8, 8).within(2 * 32 * 64) == Shape("batched", 2, 16, 8, 8)


def test_a_slow_candidate_gets_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    calls: list[float] = []

    def run(takes: float) -> None:
        clock.now += takes
        calls.append(takes)

    assert interleaved({"a": lambda: run(5.0)}, 1.0, warm=False) == {"a": 5.0} and len(calls) == 1
    calls.clear()
    assert interleaved({"a": lambda: run(0.4), "b": lambda: run(0.2)}, 1.0)["b"] == pytest.approx(0.2)
    assert len(calls) == 2 * (1 + FEWEST)
    calls.clear()
    interleaved({"a": lambda: run(0.01)}, 1.0, warm=False)
    assert 99 <= len(calls) <= 101


def test_what_takes_long_is_warmed_up_once() -> None:
    calls: list[float] = []

    def run(x: torch.Tensor) -> torch.Tensor:
        calls.append(float(x))
        return x + 1

    sets = [(torch.tensor(float(number)),) for number in range(5)]
    in_turn(run, sets, 0.0)
    assert calls == [0.0]
    calls.clear()
    turn = in_turn(run, sets)
    assert len(calls) == 1 + len(sets) + 1  # the results that are held, and one more
    turn()
    assert calls[1:] == [0.0, 1.0, 2.0, 3.0, 4.0, 0.0, 1.0]  # in turn, after the first that tells the size


def test_the_account_tells_measuring_from_compiling() -> None:
    account = Account(1.0)
    with account.part("a", compiled=True):
        time.sleep(0.02)
    with account.part("b"):
        time.sleep(0.01)
    assert 0.02 <= account.compiled < 1 and 0.01 <= account.measured < 1
    assert account.left == pytest.approx(1.0 - account.measured)
    assert [part.name for part in account.parts] == ["a", "b"] and all(part.processor >= 0 for part in account.parts)


def test_what_ran_beside_one_pass_is_not_counted() -> None:
    first = {"both": 1.0, "disturbed": 3.0, "later": 1.0, "one": 5.0}
    second = {"both": 1.08, "disturbed": 1.0, "later": 2.0, "other": 7.0}
    expected = {"both": 1.04, "disturbed": 1.0, "later": 1.0, "one": 5.0, "other": 7.0}
    assert agreed(first, second) == agreed(second, first) == pytest.approx(expected)


def test_what_is_compared_comes_from_one_pass() -> None:
    quiet, disturbed, near = {"add": 1.0, "exp": 2.0}, {"add": 4.0, "exp": 1.5}, {"add": 1.1, "exp": 2.1}
    assert agreed_together(quiet, disturbed) == agreed_together(disturbed, quiet) == quiet
    assert agreed_together(quiet, near) == pytest.approx({"add": 1.05, "exp": 2.05})


def test_the_second_pass_measures_the_same_products() -> None:
    entries = [
        GemmMeasurement(library="blas", dtype=dtype, layout=layout, m=8, k=16, n=24, rate=1e9, batch=batch)
        for dtype in ("f32", "bf16")
        for layout, batch in ((*((layout, 1) for layout in product_probes.LAYOUTS), ("batched", 3)))
    ]
    found = list(product_probes.measured_again(entries, 0.05))
    keys = {msgspec.structs.replace(each, rate=0.0) for each in found if each.library == "blas"}
    assert keys == {msgspec.structs.replace(each, rate=0.0) for each in entries}
    assert all(each.rate > 1e5 for each in found)
