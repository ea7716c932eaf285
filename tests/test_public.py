"""``effcc.compile``, ``effcc.explain``, and what plans and reports look like to a person and to a notebook."""

from __future__ import annotations

import html.parser
import pickle
import subprocess
import sys
from pathlib import Path

import effcc
import pytest
from effcc.errors import OptionError
from effcc.ir.plan_file import load_plan
from sample_plan import make_sample


class _Nested(html.parser.HTMLParser):
    """Fails for elements that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_public_names_are_documented_and_typed() -> None:
    text = (Path(__file__).parent.parent / "docs" / "api.md").read_text()
    for name in effcc.__all__:
        value = getattr(effcc, name)
        if not name.startswith("_"):
            assert value.__doc__, name
            assert f"effcc.{name}" in text, name
    for name in ("plan", "compile", "explain", "reports"):
        assert "return" in getattr(effcc, name).__annotations__, name


def test_options_are_checked_before_anything_is_compiled() -> None:
    with pytest.raises(OptionError, match="memory_budget"):
        effcc.compile(abs, memory_budgt="8GiB")
    with pytest.raises(OptionError, match="together"):
        effcc.compile(abs, mode="reduce-overhead", verify=False)
    with pytest.raises(OptionError, match="cannot explain int"):
        effcc.explain(3)


def test_options_are_pickled_and_passed_on_as_what_differs() -> None:
    from effcc.public import _chosen

    options = effcc.Options(memory_budget="8GiB", fallback="error")
    assert pickle.loads(pickle.dumps(options)) == options
    assert _chosen(options) == {"memory_budget": "8GiB", "fallback": "error"}
    assert _chosen(None) == _chosen(effcc.Options()) == {}


def test_a_plan_explained(sample: Path) -> None:
    explanation = effcc.explain(sample)
    assert "fits on l4" in explanation["Verdict"][0]
    assert any("Parameters hold" in line for line in explanation["What would change the most"])
    assert explanation["Fallbacks"] == ("aten.cholesky.default: no kernel <for> it (model.py:9)",)
    assert explanation["What holds the peak"][0].startswith("1.00 MiB ")
    assert explanation["Where the time goes"][0].startswith("30 µs library mm (inference)")
    assert str(effcc.explain(make_sample())) == str(explanation)
    _Nested(explanation._repr_html_())
    assert "&lt;for&gt;" in explanation._repr_html_()


def test_a_plan_in_a_notebook(sample: Path) -> None:
    from effcc.planning import Planned

    loaded = load_plan(sample)
    planned = Planned(loaded.plan, loaded.graphs_text, (), None)  # type: ignore[arg-type]
    assert repr(planned) == "<Planned sample on l4: peak 4.00 MiB, 40 µs, 2 steps, 1 fallbacks>"
    assert "fits on l4" in str(planned)
    shown = planned._repr_html_()
    _Nested(shown)
    assert "<svg" in shown and "http" not in shown and "<script" not in shown
    assert planned.report().startswith("<!doctype html>")


def test_importing_effcc_loads_neither_torch_nor_anything_heavy() -> None:
    script = "import sys, effcc; print([n for n in ('torch', 'sympy', 'numpy', 'rich', 'typer') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_loads_nothing_heavy() -> None:
    script = """
import contextlib, io, sys
from effcc import cli
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    cli.main(["--help"])
print([name for name in ("torch", "sympy", "numpy", "ortools", "textual") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.usefixtures("clean_compiler")
def test_a_call_explained() -> None:
    """Fallbacks, graph breaks and recompilations of a function, each with its cause."""
    import torch

    def scaled(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        torch._dynamo.graph_break()
        return y * x.shape[0]

    compiled = effcc.compile(scaled)
    first = effcc.explain(compiled, torch.randn(4, 8))
    assert len(first.graphs) == 2 and len(first["Graphs"]) == 2
    assert first["Fallbacks"] == ("none: every op was compiled",)
    assert any("scaled" in line for line in first["Graph breaks"])
    assert first["Compiled again"] == ("nothing",)
    again = effcc.explain(compiled, torch.randn(5, 8))
    assert any("scaled" in line and "expected 4, actual 5" in line for line in again["Compiled again"])
    report = effcc.reports()[0]
    assert repr(report).startswith(f"<GraphReport {report.name} (inference): 1 regions, ")
    _Nested(effcc.reports()._repr_html_())
    assert report.name in effcc.reports()._repr_html_()
