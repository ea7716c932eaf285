"""Pipelines as text: what is read, what is printed, and what is refused with a suggestion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
from effcc.errors import EffccError, OptionError
from effcc.ir.graph import Graph
from effcc.passes import pipeline
from effcc.passes.pipeline import PIPELINES, all_passes, find_pass, make_pass, parse_pipeline, pass_options, pass_text
from effcc.passes.regions import Regions
from effcc.passes.repeated_structure import RepeatedStructure
from fresh_seed import fresh_random
from hypothesis import given
from hypothesis import strategies as st


@dataclass(frozen=True)
class Tuned:
    """A pass with an option of each kind."""

    name: ClassVar[str] = "tuned"
    size: int
    share: float = 0.5
    eager: bool = False
    style: Literal["wide", "deep"] = "wide"
    limit: int | None = None
    tags: tuple[str, ...] = ()
    depths: Sequence[int] = (1, 2)
    title: str = ""

    def apply(self, graph: Graph) -> Graph:
        return graph


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """``tuned`` beside the real passes."""
    found, broken = all_passes()
    monkeypatch.setattr(pipeline, "all_passes", lambda: ({**found, "tuned": Tuned}, broken))


def test_names_options_and_blanks() -> None:
    passes = parse_pipeline(" dead-code , regions{ alone=[aten.mm, aten.bmm] },repeated-structure{min_nodes=3}")
    assert [pass_.name for pass_ in passes] == ["dead-code", "regions", "repeated-structure"]
    assert passes[1:] == (Regions(alone=("aten.mm", "aten.bmm")), RepeatedStructure(min_nodes=3))
    assert pass_text(passes[1]) == "regions{alone=[aten.mm,aten.bmm]}"
    assert pass_text(Regions()) == "regions", "an option at its default is left out"


def test_a_pipeline_stands_for_its_passes() -> None:
    names = [pass_.name for pass_ in parse_pipeline("normalize,regions")]
    assert names == ["canonicalize", "constant-folding", "common-subexpressions", "dead-code", "regions"]
    with pytest.raises(OptionError, match="pipeline normalize takes no options"):
        parse_pipeline("normalize{x=1}")


def test_every_pass_is_found_by_name_and_documented() -> None:
    found, _ = all_passes()
    assert {"canonicalize", "dead-code", "repeated-structure", "inline-calls", "regions", "schedule"} <= set(found)
    for text in PIPELINES.values():
        assert all(name in found for name in text.split(","))
    for name, cls in found.items():
        assert find_pass(name) is cls
        assert "rewrite" in (cls.__doc__ or "") and "->" in (cls.__doc__ or ""), f"{name}: rewrite: before -> after"


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("size=3", Tuned(3)),
        ("size=3,share=1e-3,eager=yes,style=deep", Tuned(3, share=1e-3, eager=True, style="deep")),
        ("size=-1,limit=none", Tuned(-1)),
        ("size=0,limit=7,tags=[a,b c],depths=(4,5)", Tuned(0, limit=7, tags=("a", "b c"), depths=(4, 5))),
        (
            'size=1,tags=["x,y]","]{}",z],title="a \\"b\\", {c}"',
            Tuned(1, tags=("x,y]", "]{}", "z"), title='a "b", {c}'),
        ),
        ("size=1,tags=[],depths=[]", Tuned(1, tags=(), depths=())),
    ],
)
@pytest.mark.usefixtures("tuned")
def test_values_are_read_by_their_type(text: str, options: Tuned) -> None:
    (made,) = parse_pipeline(f"tuned{{{text}}}")
    assert made == options


texts = st.text(st.characters(codec="utf-8"), max_size=8)


@given(
    st.builds(
        Tuned,
        st.integers(),
        share=st.floats(allow_nan=False),
        eager=st.booleans(),
        style=st.sampled_from(["wide", "deep"]),
        limit=st.none() | st.integers(),
        tags=st.lists(texts, max_size=3).map(tuple),
        depths=st.lists(st.integers(), max_size=3).map(tuple),
        title=texts,
    )
)
def test_printed_options_read_back_equal(options: Tuned) -> None:
    found, broken = all_passes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "all_passes", lambda: ({**found, "tuned": Tuned}, broken))
        assert parse_pipeline(pass_text(options)) == (options,)


@pytest.mark.parametrize(
    ("text", "message", "remedy"),
    [
        ("dead-cod", "no pass called 'dead-cod'", "did you mean 'dead-code'?"),
        ("normalise", "no pass called 'normalise'", "did you mean 'normalize'?"),
        ("dead_code", "no pass called 'dead_code'", "did you mean 'dead-code'?"),
        ("manager", "no pass called 'manager'", "known passes:"),
        ("zzz", "no pass called 'zzz'", "known passes: "),
        ("regions{alon=[aten.mm]}", "pass regions has no option 'alon'", "did you mean 'alone'?"),
        ("dead-code{x=1}", "pass dead-code has no option 'x'", "its options: none"),
        ("tuned", "pass tuned needs size", "tuned{size=...}"),
        ("tuned{size=three}", "tuned{size}: 'three' is not of type int", ""),
        ("tuned{size=1,share=}", "tuned{share}: '' is not of type float", ""),
        ("tuned{size=1,eager=perhaps}", "'perhaps' is not true or false", ""),
        ("tuned{size=1,style=wild}", "'wild' is not understood", "did you mean 'wide'?"),
        ("tuned{size=1,limit=many}", "'many' is not of type int", ""),
        ("tuned{size=1,depths=[1,x]}", "'x' is not of type int", ""),
        ("tuned{size=1,size=2}", "option 'size' is given twice", "remove one"),
        ("", "expected a pass name at column 1", "name{option=value"),
        ("dead-code,", "expected a pass name at column 11", ""),
        ("dead-code regions", "expected a comma at column 11", ""),
        ("regions{alone=[a", "expected ]", ""),
        ("regions{alone=a", "expected }", ""),
        ("regions{alone}", "expected option=value", ""),
        ('tuned{title="a"b}', "expected a comma or }", ""),
    ],
)
@pytest.mark.usefixtures("tuned")
def test_errors_say_what_and_suggest(text: str, message: str, remedy: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_pipeline(text)
    assert message in caught.value.message
    assert remedy in caught.value.remedy


def test_malformed_text_is_shown_with_a_caret() -> None:
    with pytest.raises(OptionError) as caught:
        parse_pipeline("dead-code regions")
    line, caret = caught.value.where.splitlines()
    assert line == "dead-code regions" and caret == "     " + " " * 10 + "^"


def test_a_pass_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "all_passes", lambda: ({"dead-code": object}, {"swap": "No module named 'ortools'"}))
    with pytest.raises(OptionError, match=r"not loaded: swap \(No module named 'ortools'\)"):
        find_pass("swapping")


def test_make_pass_takes_text_options() -> None:
    assert make_pass("regions", {"alone": "aten.mm"}) == Regions(alone=("aten.mm",))
    assert list(pass_options(Regions)) == ["alone"]


def test_any_text_is_read_or_refused() -> None:
    generator = fresh_random()
    words = [
        "dead-code",
        "regions",
        "tuned",
        "alone",
        "size",
        "=",
        "{",
        "}",
        "[",
        "]",
        ",",
        '"',
        "\\",
        " ",
        "1",
        "x",
        "-",
    ]
    for _ in range(3000):
        text = "".join(generator.choice(words) for _ in range(generator.randint(0, 9)))
        try:
            passes = parse_pipeline(text)
        except EffccError:
            continue
        assert parse_pipeline(",".join(map(pass_text, passes))) == passes
