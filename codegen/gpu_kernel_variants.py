"""The ways in which Triton can be generated for a fused cascade, each priced from the GPU's device file: tile lengths,
warps, stages of loads in flight. What is chosen among them comes back as ``FusedCascade.schedule``.

No GPU and no compiler is asked: registers and shared memory are what ``triton_tiles.schedule`` counts, and a choice
that spills after all is replaced where it is compiled (``triton_tiles.settle``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..cost_model.devices import Device
from ..cost_model.gpu_tile_cost import GpuRates, Launched, program_seconds
from ..cost_model.tile_cost import KernelVariant
from ..ir.fused_cascade import FusedCascade
from ..ir.tile import Dot, Program, walk
from ..ir.tile_printer import print_program
from ..passes.raising.group import Group
from ..passes.rewrite_cascade import Rewriting
from .fused_kernel import prepare_with
from .kernel_variants import Lowered, buffer_bytes, words
from .prepared import Prepared
from .tiles.errors import NotLowerable
from .triton_tiles.blocks import Blocks
from .triton_tiles.kernel import float32_precision, operand_bytes
from .triton_tiles.schedule import GpuTiles, Launch, array_registers, arrays_of, launch, shared_tiles
from .triton_tiles.target import Target

#: (rows, streamed) of tiles.
TILES = ((128, 128), (128, 64), (64, 128), (64, 64), (128, 32), (64, 32), (32, 64), (32, 32), (16, 64), (16, 128))
#: Warps and stages that are tried with each, beside what the schedule's rules say.
WARPS, STAGES = (4, 8), (2, 3, 4)
#: Registers of a thread besides those of arrays, and those that an array's element takes with what is computed of it,
#: from Hopper on and before, where operands of products lie in registers, too. From machine code of attention, forward
#: and backward, for sm_90 and sm_80.
_HOPPER, _BEFORE = (40, 1.2), (100, 1.0)
#: What a price must be below that of the rules' kernel to speak against it, as a share: these prices were not measured.
GPU_ALIKE = 0.25
#: Rows of a tile that an instruction multiplies which reads shared memory itself, from Hopper on.
_ROWS = 64


@dataclass(frozen=True)
class GpuKernelVariants:
    """Callable on a group: the ways to generate its kernel that differ, that of the generator's own rules first. None
    where there is no kernel."""

    target: Target
    rates: GpuRates

    @classmethod
    def of(cls, device: Device, target: Target) -> GpuKernelVariants:
        return cls(target, GpuRates.of(device, _ROWS if target.capability >= 90 else 16))

    def __call__(self, group: Group) -> tuple[KernelVariant, ...]:
        if group.fused.chunks:
            return ()
        found: dict[tuple[str, ...], KernelVariant] = {}
        for tile in (None, *TILES):
            try:
                lowered, narrow = self.lowered(group.fused, group.rewriting, tile)
                if not any(isinstance(item, Dot) for program in lowered.programs for item in walk(program.body)):
                    return ()  # registers of what is reduced without products are not counted well enough
                key = tuple(map(print_program, lowered.programs))
                made = None if key in found else self.cheapest(lowered, narrow, tile)
            except NotLowerable:
                if tile is None:
                    return ()
                continue
            if made is not None:
                found[key] = made
        return tuple(found.values())

    def lowered(self, fused: FusedCascade, rewriting: Rewriting, tile: tuple[int, int] | None) -> tuple[Prepared, int]:
        """Programs with these tiles, and the bytes of an element of what is multiplied."""
        narrow = 4

        def made(cascade: Rewriting, sizes: Mapping[str, int], dtypes: Mapping[str, str], **more: Any) -> Lowered:
            nonlocal narrow
            narrow = operand_bytes(cascade.cascade, dtypes)
            tiles = GpuTiles(self.target, narrow, tile=tile)
            return Lowered(cascade, sizes, dtypes, machine=tiles, crossing=False, splitting=True, **more)

        bare = replace(fused, schedule={})
        return prepare_with(made, bare, rewriting, wide=frozenset(fused.wide)).kernel.it, narrow

    def cheapest(self, lowered: Prepared, narrow: int, tile: tuple[int, int] | None) -> KernelVariant | None:
        """These tiles with the warps and stages that cost least; for the rules' tiles, with the rules'. None where none
        has room."""
        blocks = [Blocks(program, lowered.sizes, lowered.shapes) for program in lowered.programs]
        pairs = list(zip(lowered.programs, blocks, strict=True))
        rules = [launch(program, block, self.target, narrow) for program, block in pairs]
        offered: list[tuple[Launch | None, list[Launch]]] = [(None, rules)]
        if tile is not None:
            offered += [(each, [each] * len(rules)) for each in self.launches()]
        best: KernelVariant | None = None
        for chosen, launches in offered:
            launched = [self.launched(*pair, each, narrow) for pair, each in zip(pairs, launches, strict=True)]
            if tile is not None and not all(each.resident for each in launched):
                continue
            seconds = sum(
                program_seconds(program, lowered.sizes, self.rates, replace(each, resident=max(1, each.resident)))
                for program, each in zip(lowered.programs, launched, strict=True)
            )
            if best is not None and seconds >= best.seconds:
                continue
            settings = {"warps": chosen.warps, "stages": chosen.stages} if chosen is not None else {}
            schedule = {"rows": tile[0], "streamed": tile[1]} | settings if tile is not None else {}
            told = ", ".join(dict.fromkeys(f"{each.warps} warps {each.stages} stages" for each in launches))
            what = f"{words(lowered.programs)}, {told}{'' if schedule else ' (rule)'}"
            best = KernelVariant(what, seconds, tuple(schedule.items()), buffer_bytes(lowered), alike=GPU_ALIKE)
        return best

    def launches(self) -> Iterator[Launch]:
        for warps in WARPS:
            for stages in STAGES:
                yield Launch(warps, stages)

    def launched(self, program: Program, blocks: Blocks, chosen: Launch, narrow: int) -> Launched:
        """With the blocks that a multiprocessor holds of it: none where registers or shared memory do not suffice."""
        threads = chosen.warps * 32
        arrays, _ = arrays_of(program, blocks, narrow)
        resident, streamed = shared_tiles(program, blocks, narrow)
        hopper = self.target.capability >= 90
        # Before Hopper, the stage that is multiplied has been read into registers.
        shared = resident + (chosen.stages - (0 if hopper or chosen.stages == 1 else 1)) * streamed
        other, each = _HOPPER if hopper else _BEFORE
        registers = min(255, int(other + each * arrays / threads))
        fits = arrays <= array_registers(self.target) * threads and shared <= self.target.shared
        held = self.target.resident(threads, registers, shared) if fits else 0
        double = program.compute == "f64"
        operand = "f64" if double else "bf16" if narrow == 2 else "f32"
        parts = 3 if operand == "f32" and float32_precision() == "tf32x3" else 1
        return Launched(chosen.warps, chosen.stages, held, chosen.stages * streamed, operand, parts)
