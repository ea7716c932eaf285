"""Passes per (tensor, rank): known counts, a brute-force count on short fibers, and ``effcc passes``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sympy
from effcc.cli import app
from effcc.ir.cascade import Cascade, rank, ranks_of, size, tensor_name
from effcc.ir.cascade_parser import parse_cascade
from effcc.passes.cascade_analysis import forced_passes, pass_table, passes, rank_passes
from effcc.passes.rewrite_cascade import rewrite
from fresh_seed import fresh_random
from known_cascades import EXAMPLES, KNOWN, REFUSED
from random_cascades import random_cascade
from typer.testing import CliRunner


@pytest.mark.parametrize("name", KNOWN)
def test_known_cascades_as_written(name: str) -> None:
    known = KNOWN[name]
    table = pass_table(parse_cascade(known.text))
    assert {(t, r): table[t][r] for t, r, _, _ in known.checks} == {(t, r): n for t, r, n, _ in known.checks}


def test_every_tensor_is_listed_with_each_of_its_ranks() -> None:
    table = pass_table(parse_cascade(KNOWN["stable softmax attention"].text))
    assert {tensor: sorted(ranks) for tensor, ranks in table.items()} == {
        "Q": ["d", "m"],
        "K": ["d", "n"],
        "QK": ["m", "n"],
        "GM": ["m"],
        "SN": ["m", "n"],
        "SD": ["m"],
        "A": ["m", "n"],
        "V": ["f", "n"],
        "AV": ["f", "m"],
    }
    assert (table["SN"]["n"], table["A"]["n"], table["K"]["d"], table["AV"]["m"]) == (2, 1, 1, 0)


def test_what_forces_a_pass_is_named() -> None:
    cascade = parse_cascade(KNOWN["stable softmax attention"].text)
    found = [(each.number, each.einsums, each.after) for each in forced_passes(cascade, "K", rank("n"))]
    assert found == [(1, ("QK", "GM"), ()), (2, ("SN", "SD"), ("GM",)), (3, ("A", "AV"), ("SD",))]


def test_a_result_carries_its_pass_through_einsums_in_between() -> None:
    cascade = parse_cascade("A[] = sum[n] X[n]\nB[] = log(A[])\nC[m] = B[] * U[m]\nD[m] = sum[n] X[n] * C[m]\n")
    assert passes(cascade, "X", rank("n")) == 2


def test_two_names_that_some_einsum_walks_over_at_once_are_two_fibers() -> None:
    """Queries and keys made of the same X: reducing over keys and keeping queries does not revisit anything."""
    cascade = parse_cascade("S[m,n] = X[m] * X[n]\nM[m] = max[n] S[m,n]\nY[] = sum[m] M[m]\n")
    assert pass_table(cascade)["X"] == {"m": 1, "n": 1}


def _brute_force_levels(cascade: Cascade, symbol: sympy.Symbol) -> dict[int, int]:
    """The traversal in which each Einsum can see the fiber's elements at the earliest, found element by element.

    Time is (traversal, position). An element of an Einsum that walks over the rank is done in the first traversal where
    its position comes no earlier than all that it needs; a reduction is done when its last element is. The last element
    of a fiber can be had one traversal sooner than the others, the one before it in the next chained reduction, and so
    on: the fiber is longer than any such chain.
    """
    fiber = len(cascade.einsums) + 2
    time: dict[tuple[str, int], tuple[int, int]] = {}
    levels: dict[int, int] = {}

    def ready(item: sympy.Expr, at: int | None) -> tuple[int, int]:
        name = tensor_name(item)
        index = next(
            (index for index in item.args if ranks_of(index) == {symbol} or index.has(size(symbol.name))), None
        )
        if index is None:
            return time.get((name, -1), (0, 0))
        place = index.xreplace(
            {symbol: sympy.Integer(-1 if at is None else at), size(symbol.name): sympy.Integer(fiber)}
        )
        return time.get((name, int(place)), (0, 0))

    for number, einsum in enumerate(cascade.einsums):
        if einsum.is_start:
            continue
        if symbol not in einsum.space:
            time[einsum.output, -1] = max((ready(item, None) for item in einsum.reads), default=(0, 0))
            continue
        done = []
        for at in range(fiber):
            needs = max(((1, at), *(ready(item, at) for item in einsum.reads)))
            done.append((needs[0] if needs[1] <= at else needs[0] + 1, at))
            if symbol in einsum.kept:
                step = 1 if einsum.iterative == symbol else 0
                time[einsum.output, at + step] = done[-1]
        if symbol in einsum.reduced:
            time[einsum.output, -1] = max(done)
        levels[number] = max(traversal for traversal, _ in done)
    return levels


def test_counts_equal_brute_force_on_random_cascades() -> None:
    source = fresh_random()
    for _ in range(200):
        seed = source.getrandbits(32)
        cascade = random_cascade(seed)
        for symbol in cascade.ranks:
            expected = _brute_force_levels(cascade, symbol)
            assert dict(rank_passes(cascade, frozenset({symbol})).einsum) == expected, f"seed {seed}, rank {symbol}"


@pytest.mark.parametrize("name", ["stable softmax attention", "variance", "entropy", "attention and dQ"])
def test_counts_equal_brute_force_on_rewritten_cascades(name: str) -> None:
    """Loops over an iterative rank too are one traversal, element by element."""
    cascade = rewrite(parse_cascade(KNOWN[name].text)).cascade
    for symbol in cascade.ranks:
        assert dict(rank_passes(cascade, frozenset({symbol})).einsum) == _brute_force_levels(cascade, symbol)


def test_command_prints_the_table_as_json() -> None:
    result = CliRunner().invoke(app, ["passes", str(EXAMPLES / "attention.cascade"), "--json"])
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert set(told) == {"as_written", "rewritten", "refused", "certificates"}
    written = {tensor: told["as_written"][tensor]["n"] for tensor in ("K", "QK", "SN", "A", "V")}
    assert written == {"K": 3, "QK": 3, "SN": 2, "A": 1, "V": 1}
    assert {told["rewritten"][tensor]["n"] for tensor in ("K", "QK", "V")} == {1}
    assert "A" not in told["rewritten"] and "SN" not in told["rewritten"]
    assert told["refused"] == []
    assert [sorted(certificate) for certificate in told["certificates"]] == [
        ["T", "conditions", "depends_on", "einsum", "g", "h", "k", "mode", "rank", "residual"]
    ] * 2
    last = told["certificates"][-1]
    assert (last["einsum"], last["rank"], last["depends_on"], last["k"]) == ("AV", "n", ["GM", "SD"], 1)
    assert (last["mode"], last["residual"], last["T"]) == ("rebase", "0", [["exp(GM - GM_new)"]])


def test_command_prints_the_table_for_people() -> None:
    result = CliRunner().invoke(app, ["passes", "-"], input=KNOWN["variance"].text)
    assert result.exit_code == 0
    row = next(line for line in result.stdout.splitlines() if line.strip().startswith("X "))
    assert row.split()[:4] == ["X", "n", "2", "1"]
    assert "1: M; 2: V (after M)" in row
    assert "k = 3" in result.stdout


def test_refusals_are_told_and_are_no_failure() -> None:
    text, *_ = REFUSED["sigmoid of x - max"]
    result = CliRunner().invoke(app, ["passes", "-", "--json"], input=text)
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert told["refused"][0]["einsum"] == "S" and "sigmoid" in told["refused"][0]["why"]
    assert told["certificates"] == []


def test_a_syntax_error_exits_with_2_and_names_line_and_column(tmp_path: Path) -> None:
    import subprocess
    import sys

    file = tmp_path / "bad.cascade"
    file.write_text("# fine\nY[m] = sum[n] X[m,n] +\n")
    result = subprocess.run([sys.executable, "-m", "effcc.cli", "passes", str(file)], capture_output=True, text=True)
    assert result.returncode == 2
    assert f"{file}:2:23" in result.stderr and "Traceback" not in result.stderr
