"""Random tests draw a fresh seed each time; the seed of a failing one stands in pytest's captured output."""

from __future__ import annotations

import os
import random


def fresh_random() -> random.Random:
    """A generator with a new seed, or with that of the variable ``EFFCC_TEST_SEED`` to repeat a failure."""
    seed = int(os.environ.get("EFFCC_TEST_SEED") or random.SystemRandom().getrandbits(32))
    print(f"repeat with EFFCC_TEST_SEED={seed}")
    return random.Random(seed)
