"""``effcc verify``, and what every command says to a damaged or edited plan."""

from __future__ import annotations

import hashlib
import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import DEAD, Effcc, refused
from fresh_seed import fresh_random


def test_verify_tells_sound_from_damaged(effcc: Effcc, sample: Path, dead: Path, tmp_path: Path) -> None:
    assert effcc("verify", sample, dead).code == 0
    data = sample.read_bytes()
    truncated, text = tmp_path / "truncated.effcc", tmp_path / "text.effcc"
    truncated.write_bytes(data[: len(data) // 2])
    text.write_text("a plan")
    edited = _with_member(sample, tmp_path / "edited.effcc", "plan.json", lambda json: json.replace(b'"mm"', b'"nn"'))
    undefined = tmp_path / "undefined.ir"
    undefined.write_text(DEAD.replace("(%y, %z)", "(%y, %nowhere)"))
    result = effcc("verify", sample, truncated, text, edited, undefined, "--json")
    assert result.code == 2
    rows = {Path(row["file"]).name: row for row in result.json}
    assert [name for name, row in rows.items() if row["sound"]] == ["plan.effcc"]
    assert "plan.json was changed" in rows["edited.effcc"]["error"]
    assert "%nowhere" in rows["undefined.ir"]["error"]
    assert "effcc plan" in rows["truncated.effcc"]["error"]


def _with_member(plan: Path, target: Path, name: str, change: Callable[[bytes], bytes]) -> Path:
    with zipfile.ZipFile(plan) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            new.writestr(info, change(content) if info.filename == name else content)
    return target


@pytest.mark.parametrize("command", ["explain", "inspect", "report"])
def test_readers_refuse_a_damaged_plan(effcc: Effcc, sample: Path, command: str) -> None:
    sample.write_bytes(sample.read_bytes()[:-200])
    refused(effcc(command, sample), "plan.effcc", "make the plan again")


def _mutated(value: Any, generator: random.Random) -> Any:
    """One random change somewhere in a JSON value, of the same type or another."""
    strange = [None, -1, 0, 1, 2**40, 2**62, 0.5, -1e300, "", "[bold]", "%x", "a\n\x00b", [], {}, [0], True]
    if isinstance(value, dict) and value and generator.random() < 0.9:
        key = generator.choice(sorted(value))
        return {**value, key: _mutated(value[key], generator)}
    if isinstance(value, list) and value and generator.random() < 0.8:
        index = generator.randrange(len(value))
        kept = value[:index] + value[index + 1 :]
        return generator.choice([kept, [*value, value[index]], [*kept, _mutated(value[index], generator)]])
    return generator.choice(strange)


def test_an_edited_plan_with_right_digests_never_breaks_a_reader(effcc: Effcc, sample: Path, tmp_path: Path) -> None:
    """Whoever edits a plan can also make its digests right. Then the validator refuses it, or the commands cope."""
    generator = fresh_random()
    with zipfile.ZipFile(sample) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    plan = json.loads(members["plan.json"])
    edited = tmp_path / "edited.effcc"
    refusals = 0
    for _ in range(20):
        changed = _mutated(plan, generator)
        content = json.dumps(changed).encode()
        manifest = json.loads(members["manifest.json"])
        manifest["sha256"]["plan.json"] = hashlib.sha256(content).hexdigest()
        for field in ("model", "device", "inputs"):
            if isinstance(changed, dict) and field in changed:
                manifest[field] = changed[field]
        with zipfile.ZipFile(edited, "w") as archive:
            for name, old in {**members, "manifest.json": json.dumps(manifest).encode(), "plan.json": content}.items():
                archive.writestr(name, old)
        for arguments in (["explain", edited], ["inspect", edited, "--node", "%h"], ["report", edited]):
            result = effcc(*arguments)
            assert result.code in (0, 2), (changed, result)
            refusals += result.code == 2
    assert refusals  # most edits make no sense
