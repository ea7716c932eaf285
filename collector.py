"""Python's collector of circular garbage, kept from going through everything again and again while a graph is planned.

Tracing a model makes millions of objects that all stay; the collector looks at all of them each time their number has
grown by a quarter, which is about an eighth of the time.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

#: Objects made between two collections of the youngest, and how many of those there are to one of the older.
_SELDOM = (100_000, 50, 100)


@contextmanager
def collecting_seldom() -> Iterator[None]:
    """Inside, collections are rare, and leave alone what was there before. The caller's settings come back."""
    before = gc.get_threshold()
    frozen = gc.get_freeze_count()
    if not frozen:
        gc.freeze()
    gc.set_threshold(*(max(own, rare) if own else 0 for own, rare in zip(before, _SELDOM, strict=True)))
    try:
        yield
    finally:
        gc.set_threshold(*before)
        if not frozen:
            gc.unfreeze()


def leave_garbage() -> None:
    """At the end of this process its memory is given back as it is: the interpreter looks through all that a large plan
    is made of several times to find circles in it, which takes seconds."""
    atexit.register(gc.freeze)
