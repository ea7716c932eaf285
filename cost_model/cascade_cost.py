"""What a fused cascade's kernel does besides its matrix products, on a calibrated CPU.

Every point of a map or of a plain reduction executes its operations on vectors, and calls its functions; both cost what
they do in other generated code (``generated_loops.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import sympy

from ..ir.cascade import Cascade
from .devices import Figure
from .generated_loops import MEASURED


def map_seconds(cascade: Cascade, sizes: Mapping[str, int], added: Mapping[str, Figure], lanes: int) -> float:
    """Seconds on one thread; ``sizes``: of every rank, ``lanes`` of a vector. Sums of products are left out, for they
    are matrix products."""
    if "statement" not in added:
        return 0.0
    total = 0.0
    for einsum in cascade.einsums:
        if einsum.reduction == "sum" and len(einsum.reads) > 1:
            continue
        points = math.prod(sizes[symbol.name] for symbol in einsum.space)
        operations = max(1, int(sympy.count_ops(einsum.body))) + (einsum.reduction is not None)
        called = (type(each).__name__.lower() for each in einsum.body.atoms(sympy.Function))
        names = [MEASURED.get(name, name) for name in called]
        total += points * operations * added["statement"].value / lanes
        total += points * sum(added[name].value for name in names if name in added)
    return total
