"""The terminal browser, driven by textual's pilot: what one view shows, the others follow."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Effcc, refused

pytest.importorskip("textual", reason="the browser's extra, effcc[tui], is not installed")

from effcc.inspection.browser import Browser
from effcc.inspection.stages import open_dump
from textual.widgets import Input, Label, OptionList


def drive(path: Path, steps: Callable[[Browser, Any], Awaitable[None]], size: tuple[int, int] = (150, 40)) -> None:
    async def run() -> None:
        app = Browser(open_dump(path))
        async with app.run_test(size=size) as pilot:
            await pilot.pause()
            await steps(app, pilot)

    asyncio.run(run())


def chosen(app: Browser, view: str) -> str:
    listing = app.query_one(f"#{view}", OptionList)
    assert listing.highlighted is not None, view
    return str(listing.get_option_at_index(listing.highlighted).prompt)


def shown(app: Browser, view: str) -> list[str]:
    listing = app.query_one(f"#{view}", OptionList)
    return [str(listing.get_option_at_index(index).prompt) for index in range(listing.option_count)]


async def highlight(app: Browser, pilot: Any, view: str, text: str) -> None:
    """Move with the keyboard to the first line with ``text``."""
    listing = app.query_one(f"#{view}", OptionList)
    listing.focus()
    await pilot.pause()
    target = next(index for index, line in enumerate(shown(app, view)) if text in line)
    await pilot.press("home", *["down"] * target)
    await pilot.pause()
    assert text in chosen(app, view)


def test_a_value_leads_to_its_line_and_its_step(sample: Path) -> None:
    async def steps(app: Browser, pilot: Any) -> None:
        await highlight(app, pilot, "ir", "%y: f32")
        assert "return h.relu()" in chosen(app, "source")
        assert shown(app, "plan")[0] == "%y is computed by"
        assert any("region relu" in row for row in shown(app, "plan"))

    drive(sample, steps)


def test_a_line_leads_to_its_op_and_its_memory(sample: Path) -> None:
    async def steps(app: Browser, pilot: Any) -> None:
        await highlight(app, pilot, "source", "h = x @ self.w")
        assert "%h: f32" in chosen(app, "ir")
        assert shown(app, "plan")[0].startswith("model.py:7: 30 µs in 1 steps, holds 1.00 MiB")

    drive(sample, steps)


def test_a_step_leads_back_to_line_and_op(sample: Path) -> None:
    async def steps(app: Browser, pilot: Any) -> None:
        await pilot.press("p")
        await highlight(app, pilot, "plan", "library mm")
        await pilot.press("enter")
        await pilot.pause()
        assert "%h: f32" in chosen(app, "ir")
        assert "h = x @ self.w" in chosen(app, "source")

    drive(sample, steps)


def test_search_history_and_stages(sample: Path) -> None:
    async def steps(app: Browser, pilot: Any) -> None:
        await pilot.press("slash", *"relu", "enter")
        await pilot.pause()
        assert shown(app, "plan")[0] == "1 values fit 'relu'"
        await pilot.press("down", "down", "enter")
        await pilot.pause()
        assert "%y: f32" in chosen(app, "ir")
        app.query_one("#ir", OptionList).focus()
        await pilot.press("h")
        await pilot.pause()
        history = app.screen.query_one("#lines", OptionList)
        text = "\n".join(str(history.get_option_at_index(i).prompt) for i in range(history.option_count))
        assert "%y comes from model.py:8" in text and "step 1" in text and "buffer 3" in text
        await pilot.press("escape")
        await pilot.press("right_square_bracket")
        await pilot.pause()
        assert shown(app, "ir") == ["def run(x):", "    return x"]
        assert "host.py" in str(app.query_one("#ir-title", Label).render())
        await pilot.press("left_square_bracket")
        await pilot.pause()
        assert shown(app, "ir")[0].startswith("graph @mlp")

    drive(sample, steps)


def test_a_bad_search_is_told_and_the_browser_goes_on(sample: Path) -> None:
    async def steps(app: Browser, pilot: Any) -> None:
        await pilot.press("slash", "space", "enter")
        await pilot.pause()
        assert app.query_one("#query", Input).has_class("shown")
        await pilot.press("escape")
        await pilot.pause()
        assert not app.query_one("#query", Input).has_class("shown")
        assert app.focused is app.query_one("#ir", OptionList)

    drive(sample, steps)


@pytest.mark.parametrize("size", [(150, 40), (60, 30)])
def test_all_three_views_are_on_the_screen(sample: Path, size: tuple[int, int]) -> None:
    async def steps(app: Browser, pilot: Any) -> None:
        for view in ("source", "ir", "plan"):
            region = app.query_one(f"#{view}", OptionList).region
            assert region.width > 0 and region.height > 0
            assert region.right <= size[0] and region.bottom <= size[1]

    drive(sample, steps, size)


def test_a_folder_of_dumps_has_no_plan_and_works(effcc: Effcc, dead: Path, tmp_path: Path) -> None:
    effcc("opt", dead, "-p", "common-subexpressions,dead-code", "--dump", tmp_path / "dumps")

    async def steps(app: Browser, pilot: Any) -> None:
        assert "no plan" in shown(app, "plan")[0]
        assert not any("%unused" in line for line in shown(app, "ir"))  # it opens at the last stage
        await pilot.press("d")
        await pilot.pause()
        difference = app.screen.query_one("#lines", OptionList)
        lines = [str(difference.get_option_at_index(i).prompt) for i in range(difference.option_count)]
        assert any(line.startswith("-  %unused") for line in lines)

    drive(tmp_path / "dumps", steps)


def test_without_textual_the_extra_is_named(effcc: Effcc, sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [each for each in sys.modules if each.split(".")[0] == "textual"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "effcc.inspection.browser")
    monkeypatch.setitem(sys.modules, "textual", None)
    monkeypatch.setitem(sys.modules, "textual.app", None)
    refused(effcc("inspect", sample, "--tui"), "effcc[tui]")
