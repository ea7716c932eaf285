"""What all tests share: warm caches in one temporary folder, and a clean compiler where a test asks for one.

The caches lie in ``EFFCC_TEST_CACHE``, else in a folder of the system's temporary directory that belongs to this user
and this torch. A second run of the suite then compiles almost nothing. Tests that need a cold cache set their own.
"""

from __future__ import annotations

import getpass
import importlib.metadata
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from command_line import Effcc, Result

_default = Path(tempfile.gettempdir()) / f"effcc-tests-{getpass.getuser()}-torch{importlib.metadata.version('torch')}"
CACHE = Path(os.environ.get("EFFCC_TEST_CACHE") or _default)
# Before torch is imported by any test: subprocesses and Inductor's workers inherit them.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE / "inductor"))
os.environ.setdefault("EFFCC_CACHE_DIR", str(CACHE / "effcc"))
# Workers that test side by side share the processor: threads that wait for one another would double the time.
if _workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _workers)))
# The models of the tests are too shallow to share layers by themselves.
os.environ.setdefault("EFFCC_MINIMUM_REPEATS", "3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# So that tests can import the helpers beside them (``models``, ``sample_plan``).
sys.path.append(str(Path(__file__).parent))


def pytest_configure(config: pytest.Config) -> None:
    # Else pytest formats, keeps and prints thousands of lines of torch's structured trace, which is at level DEBUG.
    config.option.log_level = config.option.log_level or "WARNING"


@pytest.fixture
def clean_compiler() -> Iterator[None]:
    """Dynamo without compiled code, the default generator at a fixed seed, and no reports of earlier tests."""
    import effcc
    import torch

    torch._dynamo.reset()
    effcc.reset_reports()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture(
    params=["found", pytest.param("flat", marks=pytest.mark.slow), pytest.param("marked", marks=pytest.mark.slow)]
)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``torch.compile`` with the backend, for towers of equal layers. ``found``: the layers are found and become one
    region that is called repeatedly, as users have it; ``marked``: by hand, with torch's mark; ``flat``: neither."""
    import torch
    from models import Block

    if request.param == "marked":
        monkeypatch.setattr(Block, "forward", torch.compiler.nested_compile_region(Block.forward))

    def compile_(model: Any, options: dict[str, Any] | None = None, **settings: Any) -> Any:
        found = {"repeated_modules": request.param == "found"}
        return torch.compile(model, backend="effcc", options=found | (options or {}), **settings)

    return compile_


@pytest.fixture
def effcc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Effcc:
    """Runs a command in this process, as the ``effcc`` script does."""
    from command_line import Result
    from effcc import cli

    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Result(exit.value.code or 0, out, err)

    return run


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """The plan of ``sample_plan`` as a file."""
    from sample_plan import write_sample

    return write_sample(tmp_path)


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    """A model file: two linear layers and a GELU."""
    from command_line import LINEAR

    path = tmp_path / "linear.py"
    path.write_text(LINEAR)
    return path


@pytest.fixture
def dead(tmp_path: Path) -> Path:
    """IR text with a value that nobody reads, and one that is computed twice."""
    from command_line import DEAD

    path = tmp_path / "dead.ir"
    path.write_text(DEAD)
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip gpu tests where there is no GPU; torch is loaded only if there are such tests."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Totals of the op database, and what did not go through whole."""
    totals: Counter[str] = Counter()
    lines = []
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for key, value in report.user_properties:
                if key != "op_db":
                    continue
                totals["ops"] += 1
                for name, part in value.items():
                    totals[name] += part if isinstance(part, int) else len(part)
                lines += [f"{kind}: {text}" for kind in ("wrong", "failed", "refused", "near") for text in value[kind]]
    if totals:
        terminalreporter.section("op database")
        terminalreporter.write_line(", ".join(f"{name} {count}" for name, count in totals.items()))
        for line in lines:
            terminalreporter.write_line(line[:300])
