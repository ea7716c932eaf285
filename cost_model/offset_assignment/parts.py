"""Parts of a problem that share no time, and are solved apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .tables import Ints, Tables


@dataclass
class Part:
    """Buffers that share time with no others. ``offsets`` and ``height`` (without padding) are the
    best known, made by ``solver``."""

    members: Ints
    tables: Tables
    offsets: Ints
    height: int
    solver: str


def split(tables: Tables) -> list[Ints]:
    """Members of each part: between two parts there is a time at which nothing is live."""
    order = tables.by_lower
    reached = np.maximum.accumulate(tables.upper[order])
    cuts = np.flatnonzero(tables.lower[order][1:] >= reached[:-1]) + 1
    return np.split(order, cuts)
