"""Parameters of a test of which some run by default and all with ``-m slow`` besides."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def some_by_default(values: Iterable[Any], default: Collection[Any]) -> list[Any]:
    """``values``, those outside of ``default`` marked as slow; a tuple holds the values of several parameters. Raises
    for a default that is no value."""
    values = list(values)
    assert set(default) <= set(values), f"{sorted(set(default) - set(values))} are no values"
    slow = pytest.mark.slow
    return [
        value if value in default else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=slow)
        for value in values
    ]
