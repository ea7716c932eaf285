"""Which of a cascade's possible kernels is used without timing any: the one that was chosen by its price, else the
first choice of the rules that keeps within the target's registers and shared memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ...errors import CompileError
from ...ir.fused_cascade import FusedCascade
from ...passes.rewrite_cascade import Rewriting, rewrite
from ..fused_kernel import PlacedKernel, prepare_with
from .aot import Usage, usage
from .kernel import TritonKernel, prepare_triton
from .schedule import Launch, Shape, chosen
from .target import Target

#: Makes a kernel with tiles of a shape, and these launch settings for all of its launches if any are given.
Make = Callable[[Shape, Launch | None], TritonKernel]
#: Tiles that are tried, one after the other.
_SHAPES = (Shape(), Shape(columns=0.5), Shape(rows=0.5), Shape(rows=0.5, columns=0.5), Shape(rows=0.25))


def settled(make: Make, target: Target, wanted: TritonKernel | None = None) -> tuple[TritonKernel, tuple[Usage, ...]]:
    """``wanted``, if it compiles and spills no registers; else the schedule's first choice, with fewer stages, other
    warps or shorter tiles where registers would be spilled or shared memory does not suffice; else what spills least.
    Raises ``CompileError`` if nothing can be compiled."""
    best: tuple[int, TritonKernel, tuple[Usage, ...]] | None = None
    error: CompileError | None = None
    if wanted is not None:
        with contextlib.suppress(CompileError):
            used = usage(wanted, target)
            if not any(each.spilled for each in used):
                return wanted, used
    for shape in _SHAPES:
        kernel = make(shape, None)
        try:
            found = [usage(kernel, target)]
        except CompileError as failed:
            error, found = failed, []
        if not found or any(each.spilled for each in found[0]):
            found += _other_launches(kernel, target)
        for each in found:
            spilled = sum(one.spilled for one in each)
            if best is None or spilled < best[0]:
                best = spilled, kernel.with_launches([one.launch for one in each]), each
        if best is not None and best[0] == 0:
            break
    if best is None:
        raise error or CompileError("no schedule is known")
    return best[1], best[2]


def placed(
    fused: FusedCascade,
    rewriting: Rewriting | None,
    target: Target,
    *,
    wide: frozenset[str] = frozenset(),
    bindings: Mapping[str, int] | None = None,
) -> PlacedKernel[TritonKernel]:
    """The settled kernel of a fused cascade. Raises ``NotLowerable``, or ``CompileError`` as ``settled`` does."""
    rewriting = rewriting or rewrite(fused.cascade)

    def make(**settings: Any) -> TritonKernel:
        return prepare_with(
            prepare_triton, fused, rewriting, wide=wide, bindings=bindings, target=target, **settings
        ).kernel

    wanted = chosen(fused.schedule)
    kernel, _ = settled(
        lambda shape, launches: make(shape=shape, launches=launches), target, make(**wanted) if wanted else None
    )
    return PlacedKernel(fused, kernel, bindings or {})


def _other_launches(kernel: TritonKernel, target: Target) -> list[tuple[Usage, ...]]:
    """The same kernels with fewer stages, and with more warps; each launch the best of its own."""
    taken: list[Usage] = []
    for number, step in enumerate(kernel.steps):
        first = step.launch
        warps = (first.warps, 8) if first.warps < 8 else (first.warps,)
        tries = [replace(first, warps=each, stages=stages) for stages in range(first.stages, 0, -1) for each in warps]
        best: Usage | None = None
        for each in tries:
            launches = [each if other == number else one.launch for other, one in enumerate(kernel.steps)]
            try:
                (found,) = usage(kernel.with_launches(launches), target, only=number)
            except CompileError:
                continue
            if best is None or found.spilled < best.spilled:
                best = found
            if best.spilled == 0:
                break
        if best is None:
            return []
        taken.append(best)
    return [tuple(taken)]
