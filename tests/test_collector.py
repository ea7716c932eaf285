"""The collector's settings come back, also after an error, and garbage that was frozen can be collected again."""

from __future__ import annotations

import gc

import pytest
from effcc.collector import collecting_seldom


def test_settings_come_back() -> None:
    before = gc.get_threshold()
    with pytest.raises(ValueError, match="inside"), collecting_seldom():
        assert gc.get_threshold()[0] >= 100_000
        with collecting_seldom():
            assert gc.get_freeze_count() > 0
        assert gc.get_freeze_count() > 0, "the outer one is still on"
        raise ValueError("inside")
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0


def test_a_collector_that_is_off_stays_off() -> None:
    before = gc.get_threshold()
    gc.set_threshold(0)
    try:
        with collecting_seldom():
            assert gc.get_threshold()[0] == 0
    finally:
        gc.set_threshold(*before)
