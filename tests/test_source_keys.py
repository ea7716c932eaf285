"""The hashes of torch's own files that the code cache remembers: right, and taken again once a file has changed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from effcc.torch_internals import code_cache
from torch._inductor import codecache

pytestmark = pytest.mark.skipif(not hasattr(codecache.torch_key, "set"), reason="this torch keeps its keys to itself")


class Package:
    """Stands for torch: one file, whose hash is what is in it. ``reads`` counts how often it was hashed."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.file, self.reads, self.monkeypatch = folder / "__init__.py", 0, monkeypatch
        folder.mkdir()
        self.file.write_text("one")
        self.origin = str(self.file)

    def key(self) -> bytes:
        """What a new process takes for the hash."""
        from torch.utils._functools import prefetchable_cache

        def torch_key() -> bytes:
            self.reads += 1
            return self.file.read_bytes()

        key: Any = prefetchable_cache(torch_key)
        self.monkeypatch.setattr(codecache, "torch_key", key)
        code_cache._remember_source_keys.__wrapped__()
        return bytes(key())


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    found = Package(tmp_path / "package", monkeypatch)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found if name == "torch" else None)
    monkeypatch.setattr(codecache, "get_lock_dir", lambda: str(tmp_path / "cache" / "locks"))
    return found


def test_hashed_once_for_as_long_as_the_files_stay(package: Package) -> None:
    assert [package.key(), package.key()] == [b"one", b"one"] and package.reads == 1
    package.file.write_text("three")
    assert [package.key(), package.key()] == [b"three", b"three"] and package.reads == 2
    os.utime(package.file, ns=(1, 1))
    assert package.key() == b"three" and package.reads == 3


def test_a_directory_that_cannot_be_written_changes_nothing(package: Package, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in its place")
    assert [package.key(), package.key()] == [b"one", b"one"] and package.reads == 2
