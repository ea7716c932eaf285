"""Machines that lack something: a C++ compiler, a cache directory that can be written, a platform that Inductor serves.

Each falls back to eager operations with a reason, and gives eager's results.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from subprocesses import STEP, run

TELL = STEP + "distance = step()\ntell(distance=distance)\n"


def script(path: Path, lines: str) -> str:
    """An executable in place of the C++ compiler that answers questions about its version."""
    real = shutil.which("g++") or shutil.which("c++")
    if real is None:
        pytest.skip("needs a C++ compiler to put something before")
    head = f'#!/bin/sh\nfor each in "$@"; do case "$each" in --version|-v) exec {real} "$@";; esac; done\n'
    path.write_text(head + lines.replace("REAL", f'{real} "$@"'))
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("how", ["CXX names nothing", pytest.param("PATH is empty", marks=pytest.mark.slow)])
def test_without_a_compiler_everything_runs_as_eager_ops(tmp_path: Path, how: str) -> None:
    variables = {"PATH": str(tmp_path)} | ({"CXX": str(tmp_path / "g++")} if how.startswith("CXX") else {})
    found = run(TELL, tmp_path, variables)
    assert found["distance"] < 1e-12
    assert found["graphs"] == 2 and found["kernels"] == 0
    assert found["fallbacks"] and all("compiler" in reason.lower() for reason in found["fallbacks"])


@pytest.mark.slow
@pytest.mark.parametrize("system", ["Windows", "Darwin"])
def test_other_systems_without_their_compiler(tmp_path: Path, system: str) -> None:
    """Torch is imported as on Linux (its libraries are); what is asked afterwards answers as that system would."""
    platform = {"Windows": "win32", "Darwin": "darwin"}[system]
    code = f"""
import torch._inductor.async_compile, torch._inductor.codecache, torch._inductor.compile_fx, torch._inductor.cpp_builder
import os, platform, sys
sys.platform, platform.system = {platform!r}, lambda: {system!r}
os.environ["PATH"] = "/nonexistent"
"""
    found = run(TELL.replace("import effcc", "import effcc" + code), tmp_path)
    assert found["distance"] < 1e-12 and found["graphs"] == 2
    assert found["fallbacks"] and all("compiler" in reason.lower() for reason in found["fallbacks"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["once", "always"])
def test_compiler_killed(tmp_path: Path, kind: str) -> None:
    """The compiler ends by signal 9, as the out-of-memory killer ends it."""
    mark = tmp_path / "killed"
    kill = "kill -9 $$\n" if kind == "always" else f"if mkdir {mark} 2>/dev/null; then kill -9 $$; fi\nexec REAL\n"
    found = run(TELL, tmp_path / "cache", {"CXX": script(tmp_path / "cxx", kill)})
    assert found["distance"] < 1e-12 and found["graphs"] == 2
    if kind == "always":
        assert found["kernels"] == 0 and found["fallbacks"]
        assert all("compile" in reason.lower() for reason in found["fallbacks"])
    else:
        assert mark.exists(), "the compiler was not called"


@pytest.mark.slow
def test_compile_workers_killed(tmp_path: Path) -> None:
    """Child processes of the first seconds of compilation are killed: right, by a retry or by eager ops."""
    code = (
        STEP
        + """
import threading, time
import psutil

killed, done = [], threading.Event()

def kill():
    while not done.is_set() and len(killed) < 6:
        for child in psutil.Process().children(recursive=True):
            try:
                name = " ".join(child.cmdline())
                if "cc1plus" in name or "compile_worker" in name or "g++" in name:
                    child.kill()
                    killed.append(name)
            except psutil.NoSuchProcess:
                pass
        time.sleep(0.02)

thread = threading.Thread(target=kill)
thread.start()
try:
    distance = step()
finally:
    done.set()
    thread.join()
tell(distance=distance, killed=len(killed))
"""
    )
    found = run(code, tmp_path)
    assert found["killed"] > 0
    assert found["distance"] < 1e-12 and found["graphs"] == 2


@pytest.mark.slow
def test_cache_directory_that_cannot_be_made(tmp_path: Path) -> None:
    """A file stands where the directory should (a read-only directory is writable for root). A warning names the
    directory and the variable, and nothing is lost but the cache."""
    (tmp_path / "file").write_text("")
    code = TELL.replace('warnings.simplefilter("ignore")', 'warnings.simplefilter("always")')
    found = run(code, tmp_path, {"EFFCC_CACHE_DIR": str(tmp_path / "file" / "cache")})
    assert found["distance"] < 1e-12 and found["graphs"] == 2
    assert str(tmp_path / "file") in found["stderr"] and "EFFCC_CACHE_DIR" in found["stderr"]
