"""What a step frees is there for the next one: page faults of real processes."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
from effcc.options import parse_options

#: Rounds of tensors that are made one after the other and freed together; prints page faults a round, once it settled.
SCRIPT = """
import resource, sys
import torch, effcc

run = torch.compile(lambda x: x * 2, backend="effcc", options={"keep_freed_memory": sys.argv[1] == "keep"})
run(torch.ones(4))

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def rounds(count):
    for _ in range(count):
        made = [torch.ones(6 << 18) for _ in range(8)]
        del made

rounds(3)
before = faults()
rounds(5)
print("faults", (faults() - before) / 5)
"""


def faults(how: str, **variables: str) -> float:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_PRE"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how], env=kept | variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split("faults")[-1])


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own allocator")
def test_freed_memory_is_kept() -> None:
    assert faults("keep") < 100


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own allocator")
def test_freed_memory_is_given_back_where_the_user_says_so() -> None:
    given_back = faults("keep", MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072")
    assert given_back > 8 * (6 << 20) / 4096 / 2, "what the environment says comes first"


def test_the_option_is_a_truth_value() -> None:
    assert parse_options({}).keep_freed_memory and not parse_options({"keep_freed_memory": False}).keep_freed_memory
