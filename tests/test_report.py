"""The HTML page: one file, nothing from elsewhere, and its figures and drawings are the plan's."""

from __future__ import annotations

import dataclasses
import html.parser
import random
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import msgspec
import pytest
from effcc.cost_model.devices import load_device
from effcc.ir.plan import Buffer, Plan, Step
from effcc.ir.plan_file import PlanFile, decode_plan, encode_plan, load_plan
from effcc.passes.dump import DumpFolder, PassRecord
from effcc.report.charts import LEFT, PLOT, by_module, by_role, memory_chart, schedule_chart
from effcc.report.page import TEXT_LIMIT, render_report
from effcc.report.roofline import HEIGHT, roofline_chart
from effcc.suggestions import suggestions
from effcc.summary import live_use, memory_use, peak_position, summarize
from fresh_seed import fresh_random
from sample_plan import FORWARD, MIB, make_sample, write_sample

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(html.parser.HTMLParser):
    """Checks that elements nest, and collects references, table rows and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.references += [value for key in ("src", "href", "xlink:href") if (value := values.get(key))]
        self.ids += [value for key in ("id",) if (value := values.get(key))]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if any(tag in ("td", "th") for tag in self.open):
            self.rows[-1][-1] += data


def page(folder: Path, **arguments: object) -> Page:
    return Page(render_report(load_plan(write_sample(folder)), **arguments))  # type: ignore[arg-type]


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    shown = page(tmp_path)
    assert shown.references
    for reference in shown.references:
        assert reference.startswith(("#", "data:")), reference
        if reference.startswith("#"):
            assert reference[1:] in shown.ids
    text = render_report(load_plan(tmp_path / "plan.effcc"))
    assert "@import" not in text and "url(" not in text
    assert re.findall(r"https?://[^\s\"'<]+", text) == []


def test_figures_are_the_plans(tmp_path: Path) -> None:
    shown = page(tmp_path, measured={"seconds": 5e-5, "peak": 5 * MIB})
    assert "predicted peak, measured 5.00 MiB" in shown.text
    assert "predicted time, measured 50 µs" in shown.text
    rows = {tuple(cell.strip() for cell in row) for row in shown.rows}
    assert ("1.00 MiB", "25.0 %", "scratch", "1", 'model.py:7 "h = x @ self.w"', "layers.*") in rows
    l4 = load_device("l4")
    assert 2 * 512**3 / l4.matrix_rate("f32") < 3 * MIB / l4.bandwidth
    reached = f"memory: {3 * MIB / 3e-5 / 1e9:.0f} GB/s, {100 * 3 * MIB / 3e-5 / l4.bandwidth:.0f} % of peak"
    (product,) = [row for row in rows if "library mm" in row]
    assert product[:6] == ("30 µs", "75.0 %", "1", "library mm", "inference", reached)
    assert ("aten.cholesky.default", "no kernel <for> it", "model.py:9") in rows
    assert ("offsets", "greedy", "1,048,576", "1,048,576", "0.00 %", "0 µs", "0") in rows
    assert FORWARD.strip() in shown.text and "def run(x):" in shown.text


def test_what_a_plan_says_is_escaped(tmp_path: Path) -> None:
    """A plan may come from anybody: none of its texts may become markup."""
    attack = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'"
    loaded = load_plan(write_sample(tmp_path))
    plan = msgspec.structs.replace(
        loaded.plan,
        model=attack,
        device=attack,
        dtype=attack,
        optimizer=attack,
        notes=(attack,),
        fallbacks=((attack, attack, attack),),
        buffers=tuple(
            msgspec.structs.replace(each, name=attack, source=attack, module=attack) for each in loaded.plan.buffers
        ),
        steps=tuple(
            msgspec.structs.replace(each, name=attack, source=attack, module=attack, stream=attack)
            for each in loaded.plan.steps
        ),
    )
    planted = dataclasses.replace(loaded, plan=plan, graphs_text={attack: attack}, sources={"host.py": attack})
    honest = Page(render_report(loaded))
    text = render_report(planted)
    shown = Page(text)
    assert attack in shown.text
    assert text.count("<script") == 2  # data and code
    assert "<img" not in text
    assert set(shown.references) <= set(honest.references)


def test_passes_are_listed_where_there_are_dumps(tmp_path: Path) -> None:
    folder = DumpFolder(tmp_path / "dumps")
    _, stem = folder.claim("dead-code")
    folder.write_record(stem, PassRecord(0, "dead-code", "mlp", "inference", 0.002, True, 9, 7))
    without, listed = page(tmp_path), page(tmp_path, dumps=tmp_path / "dumps")
    row = ["0", "dead-code", "mlp", "inference", "9", "7", "2 ms", "changed"]
    assert row in listed.rows and row not in without.rows
    assert "passes" in listed.ids and "passes" not in without.ids


def test_long_texts_are_cut(tmp_path: Path) -> None:
    loaded = load_plan(write_sample(tmp_path))
    long = dataclasses.replace(loaded, sources={"host.py": "x = 1\n" * TEXT_LIMIT})
    text = render_report(long)
    assert len(text) < TEXT_LIMIT + 200_000
    assert "cut here: effcc inspect shows all" in text
    assert "cut here" not in render_report(loaded)


def test_suggestions_are_read_off_the_figures() -> None:
    plan = make_sample()
    found = suggestions(plan, summarize(plan))
    assert any("Parameters hold 1.00 MiB (25 % of the peak)" in line for line in found)
    assert any("1 ops fall back" in line for line in found)
    launch = msgspec.structs.replace(
        plan, steps=tuple(msgspec.structs.replace(step, flop=1, bytes_moved=1) for step in plan.steps)
    )
    assert any("Launching kernels takes 100 % of the time" in line for line in suggestions(launch, summarize(launch)))


# --- drawings ---------------------------------------------------------------------------------------------------------


def _drawing(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text[: text.index("</svg>") + 6])


def test_the_schedule_is_to_scale() -> None:
    rectangles = _drawing(schedule_chart(make_sample())).findall("rect")
    begins = [float(each.get("x", "nan")) for each in rectangles]
    widths = [float(each.get("width", "nan")) for each in rectangles]
    # 30 and 10 of 40 microseconds.
    assert begins == pytest.approx([LEFT, LEFT + 0.75 * PLOT], abs=0.1)
    assert widths == pytest.approx([0.75 * PLOT, 0.25 * PLOT], abs=0.1)


def test_memory_over_time_is_to_scale() -> None:
    """Heights of the curve of what is held: 3 MiB during the first step, 4 during the second."""
    drawing = _drawing(memory_chart(make_sample(), by_role, None, "memory"))
    curve = next(each.get("d", "") for each in drawing.findall("path") if each.get("class") == "use")
    match = re.fullmatch(r"M(\S+) (\S+)H(\S+)V(\S+)H(\S+)", curve)
    assert match is not None, curve
    left, first, turn, second, _ = map(float, match.groups())
    base = max(float(each.get("y2", 0)) for each in drawing.findall("line"))
    assert (left, turn) == pytest.approx((LEFT, LEFT + 0.75 * PLOT), abs=0.1)
    assert (base - first) / (base - second) == pytest.approx(3 / 4, abs=0.01)
    titles = [each.text for each in drawing.iter("title")]
    assert {f"{role}: at most 1.00 MiB" for role in ("input", "parameter", "scratch", "output")} <= set(titles)


def _random_plan(generator: random.Random) -> Plan:
    """Steps of random length, buffers with random lifetimes, some of them placed in one of two arenas."""
    count = generator.randint(1, 40)
    start = 0.0
    steps = []
    for index in range(count):
        seconds = generator.choice([0.0, generator.random()])
        steps.append(Step(id=index, kind="kernel", name="k", phase="inference", start=start, seconds=seconds))
        start += seconds
    buffers, arena = [], {}
    for index in range(generator.randint(0, 60)):
        lower = generator.randrange(count)
        pool = generator.choice(["", "saved", "scratch"])
        size = generator.randrange(1000)
        offset = arena.get(f"device/{pool}", 0) if pool else None
        if pool:
            arena[f"device/{pool}"] = offset + size
        buffers.append(
            Buffer(
                id=index, name=f"b{index}", bytes=size, lower=lower, upper=generator.randint(lower, count), pool=pool,
                role=generator.choice(["input", "saved", "scratch"]), offset=offset, module=f"layers.{index}.x",
                tier=generator.choice(["device", "device", "device", "host"]) if not pool else "device",
            )
        )  # fmt: skip
    return Plan(
        model="m", device="l4", training=False, graphs=(), steps=tuple(steps), buffers=tuple(buffers), seconds=start,
        peak={}, arena=arena,
    )  # fmt: skip


def test_use_over_time_is_what_counting_at_each_position_gives() -> None:
    generator = fresh_random()
    for _ in range(100):
        plan = _random_plan(generator)
        on_device = [b for b in plan.buffers if b.tier == "device" and b.lower < b.upper]
        live = [sum(b.bytes for b in on_device if b.lower <= p < b.upper) for p in range(len(plan.steps))]
        held = []
        for position in range(len(plan.steps)):
            size = sum(b.bytes for b in on_device if b.offset is None and b.lower <= position < b.upper)
            for key, arena in plan.arena.items():
                members = [b for b in on_device if b.offset is not None and b.arena_key == key]
                if members and min(b.lower for b in members) <= position < max(b.upper for b in members):
                    size += arena
            held.append(size)
        assert live_use(plan) == live
        assert memory_use(plan) == held
        assert live[peak_position(plan)] == max(live)


def test_drawings_of_any_plan_are_well_formed_and_inside_their_frame() -> None:
    generator = fresh_random()
    for _ in range(50):
        plan = _random_plan(generator)
        for text in (
            memory_chart(plan, by_role, None, "a < b"),
            memory_chart(plan, by_module, 1 << 30, "b"),
            schedule_chart(plan),
        ):
            drawing = _drawing(text)
            _, _, width, height = map(float, drawing.get("viewBox", "").split())
            for each in drawing.findall("rect"):
                assert 0 <= float(each.get("x", "nan")) <= width
                assert float(each.get("x", "nan")) + float(each.get("width", "nan")) <= width + 1
            for each in drawing.findall("path"):
                heights = re.findall(r"(?:V|M\S+ )([\d.]+)", each.get("d", ""))
                assert all(0 <= float(y) <= height for y in heights)


def test_the_roofline_places_kernels_under_the_devices_roofs() -> None:
    plan = make_sample()
    device = load_device("l4")
    drawn = ElementTree.fromstring(roofline_chart(summarize(plan).groups, device, "f32").split("\n<ul")[0])
    circles = {each[0].text.split("\n")[0]: each for each in drawn.iter("circle")}  # type: ignore[union-attr]
    product, relu = circles["library mm"], circles["region relu"]
    # 2 * 512^3 FLOP of 3 MiB in 30 us, 512^2 of 2 MiB in 10 us: further right, higher, larger.
    assert float(product.get("cx", 0)) > float(relu.get("cx", 0))
    assert float(product.get("cy", 0)) < float(relu.get("cy", 0)) < HEIGHT
    assert float(product.get("r", 0)) > float(relu.get("r", 0))
    titles = [each.text or "" for each in drawn.iter("title")]
    assert any(title.startswith("memory: 300 GB/s") for title in titles)
    assert f"{2 * 512**3 / (3 * MIB):.3g} FLOP/byte, 8.95 TFLOP/s" in product[0].text  # type: ignore[operator]
    assert roofline_chart(summarize(plan).groups, None, "f32") == ""
    assert 'id="roofline"' in render_report(load_plan_of(plan))


def load_plan_of(plan: Plan) -> PlanFile:
    return decode_plan(encode_plan(plan, {"mlp": FORWARD}, {}))
