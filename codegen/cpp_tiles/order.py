"""The order of a tile's statements: matrix products as soon as they can be, so that what is done element by element
comes together, and shares loops.

rewrite::

    map E[m,n] = ...                                dot S[m,n] = ...
    dot S[m,n] = ...                          ->    map E[m,n] = ...
    map P[m,n] = exp(S[m,n] + E[m,n])               map P[m,n] = exp(S[m,n] + E[m,n])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ...ir.cascade import accesses, tensor_name
from ...ir.tile import Carry, Cases, Dot, Loop, Map, Reduce, Statement, expressions

_MOVED = (Map, Reduce, Carry, Dot)


def products_first(body: Sequence[Statement], apart: Callable[[Map], bool]) -> tuple[Statement, ...]:
    """The statements in that order, those of blocks in them, too. ``apart``: maps that share no loops."""
    found: list[Statement] = []
    run: list[Statement] = []
    for item in body:
        if isinstance(item, _MOVED):
            run.append(item)
            continue
        found += _ordered(run, apart)
        run = []
        if isinstance(item, Loop):
            item = replace(item, body=products_first(item.body, apart))
        elif isinstance(item, Cases):
            item = replace(item, full=products_first(item.full, apart), partial=products_first(item.partial, apart))
        found.append(item)
    return (*found, *_ordered(run, apart))


def _ordered(run: Sequence[Statement], apart: Callable[[Map], bool]) -> list[Statement]:
    """Each statement after those that it depends on: in turn all products that can be, and all others that can."""
    waiting = list(run)
    found: list[Statement] = []
    products = True
    while waiting:
        before: list[Statement] = []
        left: list[Statement] = []
        for item in waiting:
            own = isinstance(item, Dot) or (isinstance(item, Map) and apart(item))
            if own == products and not any(_depend(item, each) for each in left):
                before.append(item)
            else:
                left.append(item)
        found += before
        waiting, products = left, not products
    return found


def _depend(first: Statement, second: Statement) -> bool:
    """Whether it matters which of two statements comes first."""
    (a, reads_a), (b, reads_b) = _touched(first), _touched(second)
    return a == b or a in reads_b or b in reads_a


def _touched(item: Statement) -> tuple[str, set[str]]:
    assert isinstance(item, _MOVED)
    return tensor_name(item.target), {tensor_name(each) for e in expressions(item) for each in accesses(e)}
