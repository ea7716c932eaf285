"""The report in a real Chromium: it renders, everything leads on, keys work, nothing is asked of the network."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import browser, console, requests
from effcc.ir.plan_file import load_plan
from effcc.report.page import render_report
from sample_plan import MIB, write_sample


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    path = folder / "plan.html"
    loaded = load_plan(write_sample(folder, budget=5 * MIB))
    measured = {"seconds": 5e-5, "peak": 4 * MIB, "memory": (MIB, 3 * MIB, 4 * MIB, 2 * MIB)}
    path.write_text(render_report(loaded, measured=measured))
    return path


@pytest.fixture(scope="module")
def driver(page: Path) -> Iterator[Any]:
    with browser() as opened:
        yield opened


@pytest.fixture
def opened(driver: Any, page: Path) -> Any:
    console(driver), requests(driver)  # what came before, such as Chromium's own first page
    driver.get(page.as_uri())
    return driver


def find(driver: Any, selector: str) -> Any:
    return driver.find_element("css selector", selector)


def press(driver: Any, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(driver).send_keys(*keys).perform()


def until(condition: Callable[[], Any]) -> Any:
    """The condition's value once it is true; fails after some seconds."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    pytest.fail("it did not happen")


def detail(driver: Any) -> str:
    return until(lambda: find(driver, "#detail").is_displayed() and find(driver, "#detail .body").text)


def test_it_renders_without_a_word_on_the_console_or_a_request(opened: Any, page: Path) -> None:
    assert opened.title.startswith("sample on l4")
    for section in ("summary", "memory", "holders", "schedule", "steps", "cascades", "fallbacks", "source", "listings"):
        shown = find(opened, f"#{section}")
        assert shown.is_displayed() and shown.size["height"] > 20, section
    assert console(opened) == []
    assert {address for address in requests(opened) if not address.startswith("data:")} == {page.as_uri()}


def test_every_entry_of_the_navigation_leads_to_its_section(opened: Any) -> None:
    for link in opened.find_elements("css selector", "nav a"):
        target = link.get_attribute("href").partition("#")[2]
        link.click()
        assert opened.current_url.endswith(f"#{target}")
        assert find(opened, f"#{target}").is_displayed()


def test_a_byte_leads_to_its_tensor_its_line_and_why_it_is_kept(opened: Any) -> None:
    """Halfway up the stack of the second step's 4 MiB, by module: layers.* lies at the bottom."""
    from selenium.webdriver.common.action_chains import ActionChains

    find(opened, '[data-tab="memory-2"]').click()
    chart = find(opened, '#memory-2 svg[data-memory="role"]')
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    box = chart.rect
    top = float(chart.get_attribute("data-top"))
    seen = {}
    for level in range(4):
        height = 12 + (320 - 12 - 30) * (1 - (level + 0.5) * MIB / top)
        x, y = box["width"] * 0.9 - box["width"] / 2, box["height"] * height / 320 - box["height"] / 2
        ActionChains(opened).move_to_element_with_offset(chart, int(x), int(y)).click().perform()
        text = detail(opened)
        seen[text.splitlines()[0]] = text
    assert seen.keys() == {"%x", "%w", "%h", "%y"}
    assert 'model.py:7 "h = x @ self.w"' in seen["%h"]
    assert "an intermediate result, held until step 1" in seen["%h"]
    assert "device + 0" in seen["%h"] and "1.00 MiB f32[512,512]" in seen["%h"]
    assert "returned to the caller" in seen["%y"] and "a weight: held all along" in seen["%w"]
    assert console(opened) == []


def test_a_tensor_leads_to_its_source_line_and_to_its_ir(opened: Any) -> None:
    find(opened, "#holders tr[data-b='2']").click()
    assert detail(opened).startswith("%h")
    find(opened, "#detail a[data-goto]").click()
    marked = until(lambda: opened.find_elements("css selector", "tr.marked"))
    assert marked[0].get_attribute("data-line") == "model.py:7"
    find(opened, "#detail a[data-ir]").click()
    row = until(lambda: opened.find_elements("css selector", "pre .row.marked"))
    assert row[0].text.strip().startswith("%h: f32[512,512] = aten.mm.default(%x, %w)")
    find(opened, "#source tr[data-line='model.py:7']").click()
    text = detail(opened)
    assert text.startswith("model.py:7") and "30 µs in 1 steps" in text and "1.00 MiB in 1 tensors" in text
    find(opened, "#detail a[data-s]").click()
    assert until(lambda: detail(opened).startswith("library mm"))
    assert console(opened) == []


def test_the_keyboard_alone(opened: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    press(opened, "?")
    assert until(lambda: find(opened, "#help").is_displayed())
    press(opened, Keys.ESCAPE)
    assert until(lambda: not find(opened, "#help").is_displayed())
    press(opened, "m")
    reading = find(opened, "#memory-1 .reading")
    assert until(lambda: "step 1 of 2: 4.00 MiB live in 4 tensors" in reading.text)
    press(opened, Keys.ARROW_LEFT)
    assert until(lambda: "step 0 of 2: 3.00 MiB live in 3 tensors" in reading.text)
    names = set()
    for _ in range(3):
        press(opened, Keys.ENTER)
        names.add(detail(opened).splitlines()[0])
        press(opened, Keys.ARROW_UP)
    assert names == {"%x", "%w", "%h"}
    press(opened, Keys.ESCAPE)
    assert until(lambda: not find(opened, "#detail").is_displayed())
    find(opened, "h1").click()
    press(opened, "j", "j")
    assert until(lambda: opened.switch_to.active_element.get_attribute("id") not in ("", None))
    press(opened, "/")
    press(opened, ">=1MiB")
    assert until(lambda: find(opened, "#found").text == "4 tensors")
    query = find(opened, "#query")
    query.clear()
    query.send_keys("model.py:7")
    assert until(lambda: find(opened, "#found").text == "1 tensors")
    find(opened, "#results a").click()
    assert detail(opened).startswith("%h")


@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False), (390, False), (1280, True)])
def test_it_fits_its_window_and_its_text_can_be_read(page: Path, width: int, dark: bool) -> None:
    with browser(width, 800, dark) as opened:
        opened.get(page.as_uri())
        assert opened.execute_script("return document.documentElement.scrollWidth") <= width
        ground, text = opened.execute_script(
            "const style = getComputedStyle(document.body); return [style.backgroundColor, style.color]"
        )
        assert contrast(ground, text) >= 7
        assert (luminance(ground) < 0.2) == dark
        find(opened, "#holders tr[data-b]").click()
        panel = find(opened, "#detail").rect
        assert panel["x"] >= 0 and panel["x"] + panel["width"] <= width


def luminance(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)``, as WCAG 2 defines it."""
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_a_printed_page_has_the_charts_and_no_controls(driver: Any, page: Path) -> None:
    driver.get(page.as_uri())
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert find(driver, "#memory-1 svg").is_displayed() and find(driver, "#memory-2 svg").is_displayed()
        for control in ("nav", "#query", ".tabs"):
            assert not find(driver, control).is_displayed()
    finally:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
