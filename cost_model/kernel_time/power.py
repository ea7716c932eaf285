"""The clock that a board's power sustains under dense arithmetic, from published rates of other boards.

Board power for each 1e12 operations a second at the boost clock (``Gpu.watts``), against what the silicon's generation
needs for them, says how far the clock stays up. What each generation needs is fitted to f32 rates of square products
that others measured (``published_rates.json``: figures of the boards, the best rate of 1024 to 10240 squared with 36
calls one after another, and where it was published).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

RATES = Path(__file__).parent / "published_rates.json"
#: Generations of silicon (nm as marketed) that are told apart; what lies between is interpolated. 12 and 16 nm are one
#: process with other metal.
NODES = (5.0, 7.0, 8.0, 14.0)
_OLD_NODES = (12.0, 16.0)
#: How sharply the clock leaves the boost clock where power begins to bind.
_SHARPNESS = 8.0


class Board(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A board's published figures and f32 rates (1e12 operations a second) that were measured on it."""

    title: str
    units: float
    lanes: float
    boost_mhz: float
    power_w: float
    process_nm: float
    lanes_to_issue: float
    teraflops: tuple[float, ...]
    source: str

    @property
    def peak(self) -> float:
        """1e12 f32 operations a second at the boost clock."""
        return 2.0 * self.units * self.lanes * self.boost_mhz * 1e-6


def boards(unseen: Collection[str] = ()) -> list[Board]:
    """The boards of the table, but for those whose names (as ``gpus.key`` spells them) are ``unseen``."""
    from .gpus import key

    table = msgspec.json.decode(RATES.read_bytes(), type=list[Board])
    return [board for board in table if key(board.title) not in unseen]


def clock_share(watts: float, process_nm: float, needed: Array, exponent: float) -> float:
    """Sustained over boost clock of a board with ``watts`` for each 1e12 operations a second at the boost clock, where
    the silicon of ``NODES`` needs ``needed``. 0.9 where the board's power or generation is not known (0)."""
    if watts <= 0 or process_nm <= 0:
        return 0.9
    node = math.log(14.0 if process_nm in _OLD_NODES else process_nm)
    need = math.exp(float(np.interp(node, np.log(NODES), np.log(needed))))
    return float((1 + (need / watts) ** (exponent * _SHARPNESS)) ** (-1 / _SHARPNESS))


def fit_power(unseen: Collection[str], optimize: Any) -> dict[str, float]:
    """What each generation needs (``watts_5`` ...), the exponent, and the share of issue slots left to multiply-adds
    where lanes take one instruction each cycle; by least squares with the priors below, ``optimize`` being scipy's.

    Needs follow a power of the feature size, from which a generation departs by a tenth.
    """
    table = boards(unseen)
    prior = np.array([math.log(0.95), 0.84, math.log(12.0), 0.85, 0.65, *[0.0] * len(NODES)])
    spread = np.array([0.03, 0.05, 0.5, 0.3, 0.15, *[0.1] * len(NODES)])

    def needs(values: Array) -> Array:
        return np.asarray(np.exp(values[2] + values[3] * np.log(np.array(NODES) / 7.0) + values[5:]))

    def residuals(values: Array) -> Array:
        found = []
        for board in table:
            clock = clock_share(board.power_w / board.peak, board.process_nm, needs(values), values[4])
            share = math.exp(values[0]) * min(1.0, values[1] / board.lanes_to_issue) * clock
            found.append((math.log(share) - math.log(float(np.median(board.teraflops)) / board.peak)) / 0.05)
        return np.concatenate([np.array(found), (values - prior) / spread])

    answer = optimize.least_squares(residuals, prior, loss="soft_l1").x
    made = {"single_issue": answer[1], "power_exponent": answer[4]}
    made |= {f"watts_{node:.0f}": need for node, need in zip(NODES, needs(answer), strict=True)}
    return {name: float(f"{value:.4g}") for name, value in made.items()}
