"""The package: loaded under one name from a root folder of any name, complete when installed, typed, registered."""

from __future__ import annotations

import email
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import effcc
import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
#: Folders of the repository that are not part of the package.
OUTSIDE = {"tests", "benchmarks", "examples", "docs", "build", "dist"}


def package_files() -> list[Path]:
    """All files of the package's folders, relative to the root; caches left out."""
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name not in OUTSIDE]
    folders = [path for path in folders if not path.name.startswith(".") and (path / "__init__.py").exists()]
    found = [path for folder in folders for path in folder.rglob("*")] + list(ROOT.glob("*.py")) + [ROOT / "py.typed"]
    found += [path for path in (ROOT / "docs").rglob("*.md")]  # what `effcc docs` prints
    return sorted(path.relative_to(ROOT) for path in found if path.is_file() and "__pycache__" not in path.parts)


def test_the_package_is_loaded_under_one_name() -> None:
    """Its root folder may be called anything, and must not be imported by that name, nor its rooms by theirs."""
    import effcc.cli
    import effcc.planning

    assert Path(effcc.__file__ or "").resolve() == ROOT / "__init__.py"
    by_file: dict[Path, list[str]] = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and name != "__main__" and ROOT in Path(file).parents and (ROOT / ".venv") not in Path(file).parents:
            by_file.setdefault(Path(file).resolve(), []).append(name)
    ours = {file: names for file, names in by_file.items() if file.relative_to(ROOT).parts[0] not in OUTSIDE}
    assert ROOT / "cli.py" in ours
    assert {file: names for file, names in ours.items() if len(names) > 1} == {}
    assert [names for names in ours.values() if names[0] != "effcc" and not names[0].startswith("effcc.")] == []


def test_every_folder_with_code_is_listed_as_a_package() -> None:
    """What is not listed is missing from a wheel, though an editable install finds it."""
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    there = {"effcc"} | {
        ".".join(("effcc", *path.parent.parts))
        for path in package_files()
        if path.suffix == ".py" and path.parent.parts
    }
    assert listed == there
    assert all((ROOT / Path(*name.split(".")[1:]) / "__init__.py").exists() for name in listed)


def test_every_data_file_is_covered() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    missing = []
    for path in package_files():
        if path.suffix == ".py":
            continue
        covered = any(
            path in {found.relative_to(ROOT) for found in (ROOT / Path(*package.split(".")[1:])).glob(pattern)}
            for package, globs in patterns.items()
            for pattern in globs
        )
        if not covered:
            missing.append(path)
    assert missing == []


def test_rooms_import_each_other_relatively_and_downwards() -> None:
    """ir < cost_model < passes < codegen < runtime < frontend < the face; the frontend needs ir alone."""
    floors = {"ir": 0, "cost_model": 1, "passes": 2, "codegen": 3, "runtime": 4}
    #: In the root, but below the rooms: every room may use them.
    ground = {"errors", "formatting", "logs", "torch_internals", "options"}
    wrong = []
    for path in package_files():
        if path.suffix != ".py":
            continue
        text = (ROOT / path).read_text()
        if re.search(r"^\s*(from|import) effcc\b", text, re.MULTILINE):
            wrong.append(f"{path}: imports effcc by name")
        room = path.parts[0] if len(path.parts) > 1 else ""
        if room not in floors and room != "frontend":
            continue
        up = "." * len(path.parts)
        for target in re.findall(rf"^\s*from {re.escape(up)}([a-z_]+)", text, re.MULTILINE):
            allowed = {"ir"} if room == "frontend" else {name for name in floors if floors[name] <= floors[room]}
            if target not in allowed | ground | {room}:
                wrong.append(f"{path}: imports {target}")
    assert wrong == []


def test_entry_points() -> None:
    backends = importlib.metadata.entry_points(group="torch_dynamo_backends")
    (backend,) = [point for point in backends if point.name == "effcc"]
    assert backend.value == "effcc.backend:effcc"
    (script,) = [point for point in importlib.metadata.entry_points(group="console_scripts") if point.name == "effcc"]
    assert script.load() is sys.modules["effcc.cli"].main


def test_torch_lists_the_backend() -> None:
    import torch

    assert "effcc" in torch._dynamo.list_backends()


def test_versions_agree() -> None:
    assert effcc.__version__ == PROJECT["project"]["version"] == importlib.metadata.version("effcc")
    assert f"({effcc.__version__})" in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_pin_every_requirement_within_its_range() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version

    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pins[canonicalize_name(name)] = Version(version)
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["dev"]]
    for text in wanted:
        requirement = Requirement(text)
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, text


def test_the_readme_gives_the_test_command_that_ci_runs() -> None:
    readme = (ROOT / "README.md").read_text()
    command = r"^\.venv/bin/python -m pytest -c tests/pytest\.ini tests( -n 2 --dist loadfile)?$"
    assert len(re.findall(command, readme, re.MULTILINE)) == 1
    assert "sed -n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["effcc", "repo", "dev-3"])
def test_a_wheel_from_a_clone_of_any_name_is_complete(tmp_path: Path, folder: str) -> None:
    """Built from a copy, unpacked elsewhere and run from there: same files, same version, a command that works."""
    clone = tmp_path / folder
    for path in [*package_files(), *map(Path, ("pyproject.toml", "README.md", "LICENSE"))]:
        (clone / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, clone / path)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path / "wheels", clone],
        check=True,
    )
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        described = email.message_from_bytes(archive.read(metadata))
    assert names == {f"effcc/{path.as_posix()}" for path in package_files()}
    assert described["Version"] == effcc.__version__
    script = f"""
import sys
sys.path.insert(0, {str(tmp_path / "site")!r})
import effcc
assert effcc.__file__.startswith({str(tmp_path)!r}), effcc.__file__
from effcc.cli import main
main(["devices", "h200"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "h200" in done.stdout
