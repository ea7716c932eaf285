"""The ways in which C++ can be generated for a fused cascade, each priced: tile shapes, parts of the streamed rank, and
one kernel or two where gradients go along two ranks. What is chosen among them comes back as ``FusedCascade.schedule``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..cost_model.cascade_cost import price_kernels
from ..cost_model.devices import Device
from ..cost_model.tile_cost import KernelVariant, TileRates, programs_seconds
from ..ir.fused_cascade import FusedCascade
from ..ir.fused_cascade_text import fused_cascade_lines
from ..ir.tile import Program
from ..ir.tile_printer import print_program
from ..passes.raising.group import Group
from ..passes.rewrite_cascade import Rewriting, rewrite
from .fused_kernel import prepare_with, schedule_settings
from .prepared import Prepared, prepared
from .tiles.errors import NotLowerable
from .tiles.roles import Caches

#: (rows, streamed) of tiles.
TILES = ((128, 512), (128, 256), (64, 512), (64, 256), (64, 128), (32, 256))
#: Parts of the streamed rank, where threads would be idle without.
PARTS = (1, 2, 4, 8)


@dataclass(frozen=True)
class KernelVariants:
    """Callable on a group: the ways to generate its kernel that differ, those of the generator's own rules first. None
    where there is no kernel, or the cascade is done in chunks by a library."""

    rates: TileRates

    def __call__(self, group: Group) -> tuple[KernelVariant, ...]:
        fused = group.fused
        if fused.chunks:
            return ()
        found: dict[tuple[str, ...], KernelVariant] = {}
        schedules: list[Mapping[str, int]] = [
            {},
            *({"rows": rows, "streamed": n} for rows, n in TILES),
            {"crossing": 0},
        ]
        for schedule in schedules:
            try:
                lowered = _lowered(fused, group.rewriting, schedule)
            except NotLowerable:
                if not schedule:
                    return ()
                continue
            if not schedule and any(loop.part is not None for each in lowered.programs for loop in each.loops):
                schedules += [{"parts": parts} for parts in PARTS]
            key = tuple(map(print_program, lowered.programs))
            if key not in found:
                seconds = programs_seconds(lowered.programs, lowered.sizes, self.rates)
                told = f"{words(lowered.programs)}{'' if schedule else ' (rule)'}"
                if any(each.what == told for each in found.values()):  # alike but for what the words leave out
                    told = f"{told}, {' '.join(f'{name} {figure}' for name, figure in schedule.items())}"
                found[key] = KernelVariant(told, seconds, tuple(schedule.items()), buffer_bytes(lowered))
        return tuple(found.values())


def rule_seconds(fused: FusedCascade, device: Device) -> float | None:
    """Seconds of the kernel that is generated for a cascade on a calibrated CPU; None where there is none: on other
    devices, in chunks, of sizes that are not known, or in a form that cannot be generated."""
    rates = TileRates.of(device)
    if rates is None or fused.chunks or not all(isinstance(size, int) for size in fused.sizes.values()):
        return None
    known = _prices.setdefault(rates, {})
    text = "\n".join(fused_cascade_lines("@fused", fused))
    if text not in known:
        try:
            lowered = _lowered(fused, rewrite(fused.cascade), fused.schedule)
            known[text] = programs_seconds(lowered.programs, lowered.sizes, rates)
        except NotLowerable:
            known[text] = None
    return known[text]


#: What was priced in this process: for some rates, seconds by the cascade's text.
_prices: dict[TileRates, dict[str, float | None]] = {}
price_kernels(rule_seconds)


def _lowered(fused: FusedCascade, rewriting: Rewriting, schedule: Mapping[str, int]) -> Prepared:
    settings = schedule_settings(schedule)
    settings["machine"] = settings.pop("caches", None) or Caches.of_this_machine()
    whole = {"crossing": True, "splitting": True} | settings
    return prepare_with(Lowered, replace(fused, schedule={}), rewriting, wide=frozenset(fused.wide), **whole).kernel.it


class Lowered:
    """In the place of a kernel: its programs, which nothing has printed."""

    def __init__(self, rewriting: Rewriting, sizes: Mapping[str, int], dtypes: Mapping[str, str], **more: Any) -> None:
        self.it: Prepared = prepared(rewriting, sizes, dtypes, **more)

    def __call__(
        self, inputs: Mapping[str, torch.Tensor], out: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        raise NotLowerable("a kernel that is only priced cannot be run")


def buffer_bytes(lowered: Prepared) -> int:
    """Of what lies between two launches."""
    total = 0
    for info in lowered.buffers.values():
        size = 8 if info.dtype == "f64" else 4
        for extent in info.shape:
            size *= extent
        total += size
    return total


def words(programs: Sequence[Program]) -> str:
    """Programs in short: how many, their tiles, their parts."""
    parts = []
    for program in programs:
        loops = [item for item in program.loops if item.step > 1]
        split = next((f" of {item.length}" for item in program.loops if item.part is not None), "")
        tiles = " x ".join(f"{item.step} {item.rank.name}" for item in loops)
        parts.append(f"{tiles or 'points'}{split}")
    return "; ".join(parts)
