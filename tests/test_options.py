"""Options of the backend: sizes, unknown names, wrong values, and that the documentation has all of them."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import effcc
import pytest
from effcc.errors import OptionError
from effcc.options import Options, default_cache_dir, parse_bytes, parse_options

ROOT = Path(__file__).parent.parent
NAMES = [field.name for field in fields(Options)]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1, 1),
        (8589934592, 8 * 2**30),
        ("8589934592", 8 * 2**30),
        ("8GiB", 8 * 2**30),
        ("8 GiB", 8 * 2**30),
        ("8gib", 8 * 2**30),
        ("8G", 8 * 2**30),
        ("1.5KiB", 1536),
        ("512 MB", 512 * 10**6),
        (" 3 TB ", 3 * 10**12),
        ("7B", 7),
    ],
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "8 XiB", "-1GiB", "1e9", "8GiB8", "eight", "0", 0, -1, "0.1B", True, 1.5, None]
)
def test_what_is_no_size_is_refused_with_the_options_name(text: Any) -> None:
    with pytest.raises(OptionError) as refused:
        parse_bytes(text, option="some_budget")
    assert "some_budget" in str(refused.value)


def test_nothing_given_is_the_defaults() -> None:
    assert parse_options(None) == parse_options({}) == Options()
    given = Options(fallback="error")
    assert parse_options(given) is given


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("memory_bugdet", "memory_budget"), ("dumpdir", "dump_dir"), ("fall_back", "fallback"), ("plans", "plan")],
)
def test_an_unknown_name_is_refused_with_the_nearest(wrong: str, meant: str) -> None:
    with pytest.raises(OptionError) as refused:
        parse_options({wrong: 1})
    text = str(refused.value)
    assert repr(wrong) in text and f"Did you mean {meant!r}?" in text
    assert all(name in text for name in NAMES)


@pytest.mark.parametrize(
    "given",
    [
        {"fallback": "never"},
        {"gemm": "mkl"},
        {"verify": "yes"},
        {"verify": 1},
        {"workers": True},
        {"workers": 2.0},
        {"plan": 3},
        {"dump_dir": ["a"]},
        {"memory_budget": "much"},
        {1: 2},
    ],
)
def test_a_wrong_value_is_refused_and_named(given: dict[Any, Any]) -> None:
    ((name, _),) = given.items()
    with pytest.raises(OptionError) as refused:
        parse_options(given)
    assert str(name) in str(refused.value)


def test_options_that_are_no_mapping_are_refused() -> None:
    with pytest.raises(OptionError, match="dict"):
        parse_options([("plan", "x")])  # type: ignore[arg-type]


def test_values_are_normalized(tmp_path: Path) -> None:
    options = parse_options({"memory_budget": "2KiB", "plan": tmp_path / "p.effcc", "cache_dir": "~/somewhere"})
    assert options.memory_budget == 2048
    assert options.plan == str(tmp_path / "p.effcc")
    assert options.cache_path() == Path.home() / "somewhere"


def test_cache_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EFFCC_CACHE_DIR", str(tmp_path))
    assert default_cache_dir() == Options().cache_path() == tmp_path
    monkeypatch.delenv("EFFCC_CACHE_DIR")
    assert default_cache_dir() == Path.home() / ".cache" / "effcc"


@pytest.mark.usefixtures("clean_compiler")
def test_torch_compile_shows_the_suggestion() -> None:
    import torch

    compiled = torch.compile(torch.sin, backend="effcc", options={"memory_bugdet": "8GiB"})
    with pytest.raises(Exception, match="Did you mean 'memory_budget'"):
        compiled(torch.ones(2))


def test_the_documentation_has_every_option_with_its_default() -> None:
    """Rows of the table in docs/options.md: name, default, meaning."""
    text = (ROOT / "docs" / "options.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", text, re.MULTILINE))
    assert rows == {field.name: repr(field.default).replace("'", '"') for field in fields(Options)}


def test_the_documentation_has_every_environment_variable() -> None:
    text = (ROOT / "docs" / "options.md").read_text()
    section = text.partition("## Environment")[2].partition("### ")[0]
    outside = {"tests", "benchmarks", "examples", "docs", "build", "dist"}
    read = set()
    for path in ROOT.rglob("*.py"):
        folders = path.relative_to(ROOT).parts[:-1]
        if not folders or (folders[0] not in outside and not folders[0].startswith(".")):
            read |= set(re.findall(r"[\"'](EFFCC_[A-Z_]+)[\"']", path.read_text()))
    assert {"EFFCC_CACHE_DIR", "EFFCC_LOGS"} <= read
    assert read <= set(re.findall(r"^\| `(EFFCC_[A-Z_]+)` \|", section, re.MULTILINE))


def test_public_names() -> None:
    """Everything in ``__all__`` is there, and what is not public says so."""
    for name in effcc.__all__:
        assert getattr(effcc, name) is not None
    assert effcc.Options is Options
    with pytest.raises(AttributeError, match="no attribute 'compiled'"):
        effcc.compiled  # type: ignore[attr-defined] # noqa: B018


def test_plan_of_a_module_leaves_the_module_alone() -> None:
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 10)).eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    parameter_bytes = sum(parameter.numel() * 4 for parameter in module.parameters())
    made = effcc.plan(module, (torch.ones(4, 300),), train=True, optimizer="sgd_momentum", device="h200")
    assert made.summary.roles["parameter"] == made.summary.roles["gradient"] == parameter_bytes
    assert made.summary.roles["optimizer"] == parameter_bytes
    assert not module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    narrow = effcc.plan(module, (torch.ones(4, 300),), dtype="bf16")
    assert narrow.summary.roles["parameter"] == parameter_bytes // 2
    assert module[0].weight.dtype == torch.float32


def test_plan_refuses_what_does_not_go_together(tmp_path: Path) -> None:
    import torch

    with pytest.raises(OptionError, match="example_inputs"):
        effcc.plan(torch.nn.Linear(2, 2))
    with pytest.raises(OptionError, match="go with a module"):
        effcc.plan(str(tmp_path / "model.py"), (torch.ones(2),))
    with pytest.raises(OptionError, match="the model is int"):
        effcc.plan(3, (torch.ones(2),))  # type: ignore[arg-type]
    with pytest.raises(effcc.EffccError, match="least budget that works is"):
        effcc.plan(torch.nn.Linear(2, 2), (torch.ones(1, 2),), memory_budget="1B")
