"""Search, side-by-side differences, colours and what a pass changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import DEAD, Effcc
from effcc.errors import OptionError
from effcc.inspection.candidates import cascade_verdicts
from effcc.inspection.changes import change
from effcc.inspection.colours import words
from effcc.inspection.links import Links, ir_lines
from effcc.inspection.model_source import model_source
from effcc.inspection.search import find
from effcc.inspection.side_by_side import side_by_side
from effcc.inspection.stages import Dump, open_dump
from effcc.ir.graph import Graph
from effcc.ir.parser import parse_graph
from effcc.ir.printer import print_location
from effcc.passes.manager import PassManager
from effcc.passes.pipeline import parse_pipeline
from effcc.report.cascades import cascade_views
from fresh_seed import fresh_random
from random_graphs import random_pointwise_graph
from sample_plan import FORWARD, MIB


@pytest.fixture
def dump(sample: Path) -> Dump:
    return open_dump(sample)


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("model.py:7", {"h"}),
        (":8", {"y"}),
        (">1MiB", set()),
        (">=1MiB", {"x", "w", "h", "y"}),
        ("1 MiB", {"x", "w", "h", "y"}),
        ("<1KiB", set()),
        ("layers.*", {"h", "y"}),
        ("layers.0", {"h", "y"}),
        ("layers.1", set()),
        ("f32[512,512]", {"x", "w", "h", "y"}),
        ("f32[512]", set()),
        ("relu", {"y"}),
        ("%w", {"w"}),
        ("self.w", {"h"}),
    ],
)
def test_search(dump: Dump, query: str, names: set[str]) -> None:
    found = find(dump, query)
    assert {each.name for each in found} == names, query
    assert all(each.bytes == MIB for each in found)


def test_an_empty_search_is_refused(dump: Dump) -> None:
    with pytest.raises(OptionError, match="empty"):
        find(dump, "  ")


def test_rows_of_a_comparison_give_both_texts_back() -> None:
    generator = fresh_random()
    for _ in range(200):
        lines = [generator.choice("abcdefg") * 3 for _ in range(generator.randint(0, 12))]
        other = [line for line in lines if generator.random() < 0.8]
        for _ in range(generator.randint(0, 3)):
            other.insert(generator.randint(0, len(other)), generator.choice("abcxyz") * 3)
        rows = side_by_side("\n".join(lines), "\n".join(other), context=100)
        if lines == other:
            assert rows == []
            continue
        assert [row.left for row in rows if row.left_line] == lines
        assert [row.right for row in rows if row.right_line] == other
        assert [row.left_line for row in rows if row.left_line] == list(range(1, len(lines) + 1))
        folded = side_by_side("\n".join(lines), "\n".join(other), context=1)
        hidden = sum(row.left_line for row in folded if row.kind == "folded")
        assert hidden + sum(row.kind == "equal" for row in folded) == sum(row.kind == "equal" for row in rows)


def test_a_changed_line_stands_beside_the_one_it_was() -> None:
    rows = side_by_side(DEAD, DEAD.replace("aten.add.Tensor(%y, %z)", "aten.add.Tensor(%y, %y)"))
    (changed,) = [row for row in rows if row.kind == "changed"]
    assert "%sum" in changed.left and "%sum" in changed.right and changed.left != changed.right


def test_colours_cut_a_line_without_losing_anything() -> None:
    generator = fresh_random()
    lines = [*DEAD.splitlines(), *FORWARD.splitlines(), 'x = "a" + f(1)  # why', ""]
    for _ in range(200):
        lines.append("".join(generator.choice('ab%@"()[]{},.:=# loc 19') for _ in range(40)))
    for line in lines:
        for code in (False, True):
            assert "".join(text for _, text in words(line, code)) == line
    kinds = dict((text, kind) for kind, text in words(DEAD.splitlines()[2]))
    assert kinds["%unused"] == "value" and kinds["aten.sin.default"] == "op" and kinds["f32[4,8]"] == "type"


def test_what_a_pass_changed_in_counts() -> None:
    after = "".join(line + "\n" for line in DEAD.splitlines() if "%unused" not in line and "%z:" not in line)
    made = change(DEAD, after.replace("(%y, %z)", "(%y, %y)"))
    assert made.removed == {"aten.sin.default": 1, "aten.cos.default": 1} and made.added == {}
    assert made.rewritten == 1
    assert made.words == "-1 aten.sin, -1 aten.cos; 1 rewritten"
    assert change(DEAD, DEAD).words == ""


def test_lines_of_a_text_know_their_value_and_place() -> None:
    generator = fresh_random()
    for text in (DEAD, FORWARD, *(_printed(random_pointwise_graph(generator)) for _ in range(10))):
        graph = parse_graph(text)
        lines = {line.name: line for line in ir_lines(text) if line.name}
        for node in graph.nodes:
            line = lines[node.name]
            assert (line.file, line.line, line.module) == (node.location.file, node.location.line, node.location.module)
            assert "loc(" not in line.text


def _printed(graph: Graph) -> str:
    from effcc.ir.printer import print_graph

    return print_graph(graph)


def test_the_models_source_is_the_file_only_where_it_agrees(tmp_path: Path) -> None:
    graph = parse_graph(FORWARD)
    (known,) = model_source([graph])
    assert not known.whole and known.lines == {7: "h = x @ self.w (twice)", 8: "return h.relu()"}
    text = [f"line {number}" for number in range(1, 7)] + ["    h = x @ self.w (twice)", "    return h.relu()", "end"]
    (tmp_path / "model.py").write_text("\n".join(text))
    (whole,) = model_source([graph], [tmp_path])
    assert whole.whole and whole.lines[9] == "end" and whole.used == {7, 8}
    (tmp_path / "model.py").write_text("\n".join(["edited", *text]))
    assert not model_source([graph], [tmp_path])[0].whole


def test_links_lead_from_each_view_to_the_others(dump: Dump) -> None:
    links = Links(dump)
    rows = links.of_value("mlp", ("", "h"))
    assert [row.kind for row in rows] == ["note", "step", "note", "buffer"]
    assert rows[1].ops == ("h",) and rows[1].source == "model.py:7" and rows[1].graph == "mlp"
    (file,) = links.files
    by_line = links.of_line(file, 7)
    assert by_line[0].text == "model.py:7: 30 µs in 1 steps, holds 1.00 MiB at the peak"
    assert {row.kind for row in by_line[1:]} == {"step", "buffer"}
    assert links.search("relu")[1].ops == ("y",)
    assert links.at_peak()[0].text == "peak 4.00 MiB, held by"


@pytest.mark.slow
def test_passes_beside_a_plan_are_shown_with_it(effcc: Effcc, linear: Path, tmp_path: Path) -> None:
    """With ``effcc plan --dump passes`` beside the plan, the history of a value begins at capture and ends at an
    address; a folder that belongs to another plan is left alone."""
    plan, dumps = tmp_path / "p.effcc", tmp_path / "passes"
    assert effcc("plan", linear, "-o", plan, "--dump", dumps, "--no-report").code == 0
    dump = open_dump(plan)
    assert dump.stages[0].label == "input" and dump.stages[-1].label.endswith("(planned)")
    graph = dump.stages[0].parsed
    assert graph is not None
    for node in graph.nodes:
        if node.op == "input":
            continue
        history = effcc("inspect", plan, "--node", f"%{node.name}", "--json").json
        assert history["complete"], history
        assert history["source"] == print_location(node.location)[4:-1]
    (other,) = [path for path in dumps.glob("*-regions.ir")]
    other.write_text(other.read_text().replace("%", "%other_"))
    assert open_dump(plan).stages[0].label != "input"


def attention_before_and_after() -> tuple[Graph, Graph]:
    """The graphs of the page of the pass fuse-cascades."""
    from documentation import DOCS, read

    before, after = (
        block.text for block in read(DOCS / "passes" / "fuse-cascades.md").blocks if block.language == "ir"
    )
    return parse_graph(before), parse_graph(after)


def test_what_could_be_fused_and_what_is() -> None:
    """The verdict is the pass's own."""
    before, after = attention_before_and_after()
    verdicts, skipped = cascade_verdicts([before])
    assert skipped == []
    assert {each.module for each in verdicts} == {"attn"}
    assert all(each.source.startswith("model.py:") and each.why for each in verdicts)
    by_the_pass = bool(PassManager(parse_pipeline("fuse-cascades")).run(before).cascades)
    assert any(each.verdict == "could be" for each in verdicts) == by_the_pass
    fused, _ = cascade_verdicts([after])
    assert [(each.verdict, each.source) for each in fused] == [("fused", "model.py:9")]
    assert cascade_verdicts([before], seconds=-1.0) == ([], ["attention was not looked at: time was up"])


def test_a_fused_cascades_passes_before_and_after() -> None:
    (view,) = cascade_views([attention_before_and_after()[1]])
    assert (view.calls, view.source) == (1, "model.py:9")
    counts = {(row.tensor, row.rank): (row.written, row.rewritten) for row in view.passes}
    assert counts["In2", "m"] == (3, 1)  # the keys: scores and maximum, sum, product with the values
    assert counts["In3", "m"] == (1, 1)
    assert any("rebase" in text for text in view.certificates)
    assert view.refused == ()
