"""What tile programs cost: counted by hand for small ones, and the order in which tiles of attention lie."""

from __future__ import annotations

from dataclasses import replace

import pytest
from effcc.cost_model.calibrate import load_device
from effcc.cost_model.tile_cost import TileRates, programs_seconds
from effcc.ir.tile_parser import parse_program

SIZES = {"m": 512, "n": 512, "d": 32}
#: Nothing but products takes time.
PRODUCTS = TileRates(1, 16, 1e9, 0.0, (), ((1e4, 1e30), (1e9, 1e30)), 0.0)


def program(rows: int, columns: int, skip: str = "") -> str:
    return f"""\
program scores in f32
input K[n,d]: f32 unit d
input Q[m,d]: f32 unit d
output R[m]: f32 unit m
grid m step {rows} {{
  state A[m] = 0
  for n step {columns} {{
    {skip}
    load T[d,n] = K[n,d]
    dot S[m,n] = sum[d] Q[m,d] * T[d,n]
    reduce A[m] sum= sum[n] S[m,n]
  }}
  store R[m] = A[m]
}}
"""


def seconds(text: str, rates: TileRates) -> float:
    return programs_seconds([parse_program(text)], SIZES, rates)


def test_products_are_counted_whatever_the_tile_is() -> None:
    for rows, columns in ((512, 512), (64, 128), (100, 70)):
        assert seconds(program(rows, columns), PRODUCTS) == pytest.approx(2 * 512 * 512 * 32 / 1e9)


@pytest.mark.parametrize("rows", [32, 64, 128])
def test_rows_of_a_mask_end_where_its_last_row_does(rows: int) -> None:
    """A tile of rows up to r walks the first r columns: the mean over tiles is half of all, and half a tile."""
    found = seconds(program(rows, 512, "skip unless n <= m"), PRODUCTS)
    assert found / (2 * 512 * 512 * 32 / 1e9) == pytest.approx((512 + rows) / 1024, rel=0.03)


def test_threads_without_a_block_wait() -> None:
    whole = seconds(program(128, 512), PRODUCTS)
    assert seconds(program(128, 512), replace(PRODUCTS, threads=3)) == pytest.approx(whole * 2 / 4)
    assert seconds(program(512, 512), replace(PRODUCTS, threads=3)) == pytest.approx(whole)


def test_operands_are_read_again_for_every_tile_of_rows() -> None:
    """Keys of 64 KiB: once from memory, then from the cache that holds them and what is read beside."""
    rates = TileRates(1, 16, 1e30, 0.0, (), ((1e3, 1e30), (1e4, 1e30), (1e5, 1e9), (1e9, 1e9)), 0.0)
    one, eight = (seconds(program(rows, 512), rates) for rows in (512, 64))
    keys = 512 * 32 * 4
    assert eight - one < 8 * keys / 1e9
    slow = replace(rates, ladder=((1e3, 1e9), (1e9, 1e9)))
    one, eight = (seconds(program(rows, 512), slow) for rows in (512, 64))
    assert eight - one >= 7 * keys / 1e9 * 0.99


def test_a_device_that_was_not_measured_has_no_prices() -> None:
    assert TileRates.of(load_device("cpu")) is None
