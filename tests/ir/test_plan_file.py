"""plan.effcc: deterministic, refuses what is damaged or strange, executes nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from effcc.errors import EffccError, OutputError, PlanError
from effcc.ir import plan_file, plan_schema
from effcc.ir.plan_file import decode_plan, load_plan, save_plan
from plan_files import GRAPHS, SOURCES, archive_of, members_of, resealed, small_plan


@pytest.fixture()
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "plan.effcc"
    save_plan(path, small_plan(), GRAPHS, SOURCES)
    return path


def test_round_trip(saved: Path) -> None:
    loaded = load_plan(saved)
    assert loaded.plan == small_plan()
    assert loaded.graphs_text == GRAPHS
    assert loaded.sources == SOURCES
    assert loaded.manifest.format == "effcc-plan"
    assert loaded.manifest.schema == "1.2"
    assert loaded.manifest.device == "cpu"
    assert loaded.manifest.inputs[0].shape == ("s0", "32")
    assert set(loaded.manifest.versions) == {"effcc", "torch", "triton"}
    assert [path.name for path in saved.parent.iterdir()] == ["plan.effcc"]


def test_same_input_same_bytes(saved: Path, tmp_path: Path) -> None:
    reordered = dict(reversed(SOURCES.items()))
    save_plan(tmp_path / "again.effcc", small_plan(), GRAPHS, reordered)
    assert (tmp_path / "again.effcc").read_bytes() == saved.read_bytes()
    with zipfile.ZipFile(saved) as archive:
        names = ["manifest.json", "plan.json", "graph.ir", "sources/kernel.cpp", "sources/region_0.py"]
        assert archive.namelist() == names
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_members_fit_their_published_digests(saved: Path) -> None:
    members = members_of(saved.read_bytes())
    manifest = json.loads(members.pop("manifest.json"))
    assert manifest["sha256"] == {name: hashlib.sha256(content).hexdigest() for name, content in members.items()}


def test_loading_needs_no_torch(saved: Path) -> None:
    code = (
        "import sys; from effcc.ir.plan_file import load_plan; load_plan(sys.argv[1]); "
        "assert not {'torch', 'numpy', 'pickle'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code, str(saved)], check=True)


def test_schema_file_is_current() -> None:
    remedy = "run python -m effcc.ir.plan_schema"
    assert plan_schema.SCHEMA_FILE.read_text(encoding="utf-8") == plan_schema.schema_text(), remedy


def test_schema_describes_the_plan(saved: Path) -> None:
    schema = json.loads(plan_schema.SCHEMA_FILE.read_text(encoding="utf-8"))
    plan = json.loads(members_of(saved.read_bytes())["plan.json"])
    definition = schema["$defs"]["Plan"]
    assert set(plan) == set(definition["properties"])
    assert set(definition["required"]) == {
        "model", "device", "training", "graphs", "steps", "buffers", "seconds", "peak", "arena",
    }  # fmt: skip


@pytest.mark.parametrize("version", ["2.0", "3.7", "11.0"])
def test_newer_major_is_refused_with_what_to_do(saved: Path, version: str) -> None:
    members = members_of(saved.read_bytes())
    manifest = json.loads(members["manifest.json"])
    # A future manifest may have other fields: the version must be judged before they are.
    members["manifest.json"] = json.dumps({"format": "effcc-plan", "schema": version, "sha256": 3}).encode()
    with pytest.raises(PlanError, match=f"schema {version}.*(?s:.)*update effcc"):
        decode_plan(archive_of(members))
    assert manifest["schema"] == "1.2"


def test_unknown_minor_with_new_fields_is_accepted(saved: Path) -> None:
    members = members_of(saved.read_bytes())
    plan, manifest = json.loads(members["plan.json"]), json.loads(members["manifest.json"])
    plan["steps"][0]["priority"] = 3
    plan["novelty"] = {"deep": [1]}
    manifest["schema"] = "1.9"
    members |= {"plan.json": json.dumps(plan).encode(), "manifest.json": json.dumps(manifest).encode()}
    assert decode_plan(resealed(members)).plan == small_plan()


@pytest.mark.parametrize("version", ["1", "1.x", "1.0.0", "", "-1.0", "١.٠"])  # noqa: RUF001
def test_malformed_version(saved: Path, version: str) -> None:
    members = members_of(saved.read_bytes())
    manifest = json.loads(members["manifest.json"]) | {"schema": version}
    members["manifest.json"] = json.dumps(manifest).encode()
    with pytest.raises(PlanError, match=r"major\.minor"):
        decode_plan(archive_of(members))


@pytest.mark.parametrize(
    ("field", "value", "path"),
    [
        (("steps", 3, "reads"), "no", "$.steps[3].reads"),
        (("buffers", 1, "bytes"), 1.5, "$.buffers[1].bytes"),
        (("seconds",), None, "$.seconds"),
        (("peak",), {"device": "x"}, "$.peak[...]"),
    ],
)
def test_wrong_type_names_member_and_field(saved: Path, field: tuple[Any, ...], value: Any, path: str) -> None:
    members = members_of(saved.read_bytes())
    plan = json.loads(members["plan.json"])
    place = plan
    for key in field[:-1]:
        place = place[key]
    place[field[-1]] = value
    members["plan.json"] = json.dumps(plan).encode()
    with pytest.raises(PlanError) as caught:
        decode_plan(resealed(members), "some.effcc")
    assert "plan.json" in str(caught.value) and path in str(caught.value) and "some.effcc" in str(caught.value)


def test_changed_member_is_named(saved: Path) -> None:
    members = members_of(saved.read_bytes())
    members["sources/region_0.py"] += b"\n"
    with pytest.raises(PlanError, match=r"sources/region_0.py was changed"):
        decode_plan(archive_of(members))


def test_manifest_must_agree_with_the_plan(saved: Path) -> None:
    members = members_of(saved.read_bytes())
    manifest = json.loads(members["manifest.json"])
    for field, value in {"device": "h200", "model": "other", "graphs": [], "inputs": []}.items():
        changed = archive_of({**members, "manifest.json": json.dumps({**manifest, field: value}).encode()})
        with pytest.raises(PlanError, match=f"disagree about {field}"):
            decode_plan(changed)


@pytest.mark.parametrize(
    "name",
    ["../plan.json", "/etc/passwd", "sources/../../x.py", "sources/", "sources/a/b.py", "sources/x.so", "C:\\x.py",
     "plan.json/", "sources/.py", "weights.pkl", "sources/x.py\n", "PLAN.JSON"],
)  # fmt: skip
def test_foreign_members_are_refused(saved: Path, name: str) -> None:
    members = members_of(saved.read_bytes())
    with pytest.raises(PlanError, match=r"does not belong|disagree"):
        decode_plan(resealed({**members, name: b"x"}))


def test_duplicate_member_is_refused(saved: Path) -> None:
    members = members_of(saved.read_bytes())
    with pytest.warns(UserWarning, match="Duplicate"):
        data = archive_of([*members.items(), ("plan.json", members["plan.json"])])
    with pytest.raises(PlanError, match="twice"):
        decode_plan(data)


@pytest.mark.parametrize("missing", ["manifest.json", "plan.json", "graph.ir", "sources/kernel.cpp"])
def test_missing_member(saved: Path, missing: str) -> None:
    members = members_of(saved.read_bytes())
    del members[missing]
    with pytest.raises(PlanError, match=missing):
        decode_plan(archive_of(members))


def test_unpacking_is_bounded(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = members_of(saved.read_bytes())
    monkeypatch.setattr(plan_file, "SOURCE_LIMIT", 1 << 20)
    bomb = resealed({**members, "sources/bomb.py": b"\0" * (8 << 20)})
    assert len(bomb) < 100_000
    with pytest.raises(PlanError, match="would unpack to 8388608 bytes"):
        decode_plan(bomb)
    # The same bomb with a header that understates its size, in both places where a zip keeps it.
    lying = bomb.replace(struct.pack("<I", 8 << 20), struct.pack("<I", 1000))
    assert lying != bomb
    with pytest.raises(PlanError):
        decode_plan(lying)
    monkeypatch.setattr(plan_file, "TOTAL_LIMIT", 1 << 20)
    with pytest.raises(PlanError, match="more than 1048576"):
        decode_plan(bomb)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_unusual_compression_is_refused(saved: Path, compression: int) -> None:
    with pytest.raises(PlanError, match="packed in a way"):
        decode_plan(archive_of(members_of(saved.read_bytes()), compression))


def test_deep_nesting_is_refused(saved: Path) -> None:
    members = members_of(saved.read_bytes())
    deep = b"[" * 200_000 + b"]" * 200_000
    members["plan.json"] = members["plan.json"].rstrip()[:-1] + b', "novelty": ' + deep + b"}"
    with pytest.raises(PlanError, match=r"plan\.json"):
        decode_plan(resealed(members))


def test_unsound_plan_is_refused_on_load(tmp_path: Path) -> None:
    plan = msgspec.structs.replace(small_plan(), budget=100)
    save_plan(tmp_path / "p.effcc", plan, GRAPHS, {})
    with pytest.raises(PlanError, match="above the budget of 100"):
        load_plan(tmp_path / "p.effcc")
    assert load_plan(tmp_path / "p.effcc", validate=False).plan == plan


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"\$\.seconds"):
        save_plan(tmp_path / "p.effcc", msgspec.structs.replace(small_plan(), seconds=float("nan")), {}, {})
    with pytest.raises(PlanError, match="not a plain"):
        save_plan(tmp_path / "p.effcc", small_plan(), {}, {"../evil.py": ""})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_failed_write_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    before = saved.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError) as caught:
        save_plan(saved, small_plan(), {}, {})
    assert os.strerror(code) in str(caught.value) and str(saved) in str(caught.value)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["plan.effcc"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file system that can be filled")
def test_unwritable_places(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="make the folder first"):
        save_plan(tmp_path / "none" / "p.effcc", small_plan(), {}, {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(EffccError, match="cannot write"):
        save_plan(tmp_path / "folder", small_plan(), {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot read the plan"):
        load_plan(tmp_path / "none.effcc")
    with pytest.raises(PlanError, match="cannot read the plan"):
        load_plan(tmp_path)
    (tmp_path / "empty.effcc").write_bytes(b"")
    with pytest.raises(PlanError, match="damaged archive"):
        load_plan(tmp_path / "empty.effcc")
