"""``effcc opt`` as a user calls it."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import DEAD, Effcc, refused


def test_opt_runs_passes(effcc: Effcc, dead: Path) -> None:
    out = effcc("opt", dead, "-p", "common-subexpressions,dead-code").out
    assert "%unused" not in out and "%z" not in out
    assert "aten.add.Tensor(%y, %y)" in out
    assert effcc("opt", dead).out == DEAD


def test_opt_diff_and_json(effcc: Effcc, dead: Path, tmp_path: Path) -> None:
    out = effcc("opt", dead, "-p", "dead-code", "--diff").out
    assert [line for line in out.splitlines() if line.startswith("-  ")] == [
        "-" + next(line for line in DEAD.splitlines() if "%unused" in line)
    ]
    shown = effcc("opt", dead, "-p", "dead-code", "--json").json
    (record,) = shown["passes"]
    assert (record["text"], record["ops_before"], record["ops_after"], record["changed"]) == ("dead-code", 5, 4, True)
    assert effcc("opt", dead, "-p", "dead-code", "-o", tmp_path / "out.ir").out == ""
    assert (tmp_path / "out.ir").read_text() == shown["graph"]


def test_opt_reads_standard_input(effcc: Effcc, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO(DEAD))
    assert "%unused" not in effcc("opt", "-", "-p", "dead-code").out


def test_opt_lists_passes_with_their_options(effcc: Effcc) -> None:
    shown = effcc("opt", "--list", "--json").json
    assert {"dead-code", "regions", "schedule"} <= shown["passes"].keys()
    assert shown["pipelines"]["normalize"].split(",")[0] == "canonicalize"
    assert "dead-code" in effcc("opt", "--list").out


@pytest.mark.parametrize(
    ("passes", "words"),
    [
        ("dead-cod", ["dead-cod", "did you mean 'dead-code'?"]),
        ("dead-code{deep=1}", ["deep"]),
        ("dead-code,", ["column 11"]),
    ],
)
def test_opt_refuses_a_wrong_pipeline(effcc: Effcc, dead: Path, passes: str, words: list[str]) -> None:
    refused(effcc("opt", dead, "-p", passes), *words)


def test_opt_names_the_line_that_is_wrong(effcc: Effcc, tmp_path: Path) -> None:
    bad = tmp_path / "bad.ir"
    bad.write_text(DEAD.replace("aten.sin.default(%x)", "aten.sin.default(%x"))
    refused(effcc("opt", bad), "bad.ir:3")
    bad.write_bytes(b"\xff\xfe")
    refused(effcc("opt", bad), "not text")
    refused(effcc("opt", tmp_path / "missing.ir"), "missing.ir")
    refused(effcc("opt"), "--list")
