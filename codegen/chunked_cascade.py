"""A cascade done in chunks of independent rows: a library's matrix products, and Inductor's loops between them.

Step after step for each chunk; what lies between two steps is stored for one chunk, in memory that later steps and
later chunks use again. A sum over the rows is added to its result chunk by chunk.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import sympy
import torch

from .. import torch_internals
from ..errors import CompileError
from ..ir.cascade import Cascade, Einsum, tensor_name
from ..ir.cascade_printer import print_einsum
from ..passes.library_products import product_operands
from .cascade_kernel import TORCH_DTYPES
from .einsums import Values, reduce
from .matrix_product import multiply

#: How tensors lie: shape, strides and dtype of each.
Layouts: TypeAlias = "tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]"


@dataclass
class Step:
    """Products, or maps that are compiled together. ``stores``: tensors that it writes; ``slots``: which buffer each of
    those has that is no result."""

    einsums: list[Einsum]
    library: bool
    stores: list[str] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    compiled: dict[Layouts, Callable[[list[torch.Tensor]], Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Slot:
    """A buffer for one chunk, of tensors with the same shape and dtype whose lives do not overlap."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class ChunkedCascade:
    """Callable on a cascade's tensors by name, as ``CascadeKernel``.

    ``sizes``: of every rank. ``chunks``: rank -> coordinates at a time. ``dtypes``: tensor -> element type, for all
    that is written. ``outputs``: the wanted tensors.
    """

    scratch_bytes = 0

    def __init__(
        self,
        cascade: Cascade,
        sizes: Mapping[str, int],
        chunks: Mapping[str, int],
        dtypes: Mapping[str, str],
        outputs: Sequence[str],
    ) -> None:
        self.cascade, self.sizes, self.chunks, self.outputs = cascade, dict(sizes), dict(chunks), tuple(outputs)
        self.ranks = _ranks_of_tensors(cascade)
        self.dtypes = {name: TORCH_DTYPES[dtypes.get(name, "f32")] for name in cascade.definitions}
        self.steps = _steps(cascade, self.outputs)
        self.slots: list[Slot] = []
        #: Tensor that is stored for one chunk -> its slot.
        self.slot_of: dict[str, int] = {}
        self._share_slots()
        self.summed = {name for name in self.outputs if self._is_summed(cascade.definitions[name])}
        #: What the steps were compiled for when they were first asked for.
        self.expected: list[Layouts] = []

    @property
    def buffer_bytes(self) -> int:
        return sum(torch.Size(slot.shape).numel() * slot.dtype.itemsize for slot in self.slots)

    @property
    def source(self) -> str:
        """What is done, as text."""
        lines = [f"for each chunk of {', '.join(f'{size} {rank}' for rank, size in self.chunks.items())}:"]
        for step in self.steps:
            lines.append("  by the library's products:" if step.library else "  by generated loops:")
            lines += [f"    {print_einsum(einsum)}" for einsum in step.einsums]
        return "\n".join(lines) + "\n"

    def finish(self) -> None:
        """Nothing to wait for: loops are compiled at the first call, for the tensors as they lie."""

    def __call__(
        self, inputs: Mapping[str, torch.Tensor], out: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        results = {name: (out or {}).get(name, None) for name in self.outputs}
        for name, tensor in results.items():
            if tensor is None:
                shape = [self.sizes[rank.name] for rank in self.ranks[name]]
                results[name] = torch.empty(shape, dtype=self.dtypes[name])
        totals = {}
        for name in self.summed:
            result = results[name]
            assert result is not None
            # Sums of many chunks are not rounded to a narrow type in between.
            wide = result if result.dtype.itemsize >= 4 else torch.empty_like(result, dtype=torch.float32)
            totals[name] = wide.zero_()
        buffers = [torch.empty(slot.shape, dtype=slot.dtype) for slot in self.slots]
        whole: dict[str, Any] = {**inputs, **results, **totals}
        for chunk in self._chunks():
            tensors = {name: self._part(name, tensor, chunk) for name, tensor in whole.items()}
            for name, slot in self.slot_of.items():
                tensors[name] = self._part(name, buffers[slot], {rank: (0, size) for rank, (_, size) in chunk.items()})
            for step in self.steps:
                if step.library:
                    self._multiply(step, tensors)
                else:
                    self._map(step, tensors)
        for name, total in totals.items():
            if total is not results[name]:
                whole[name] = results[name].copy_(total)  # type: ignore[union-attr]
        return {name: results[name] for name in self.outputs}  # type: ignore[misc]

    def _chunks(self) -> Iterator[dict[str, tuple[int, int]]]:
        """(first coordinate, number) of each rank that is cut."""
        cuts = [
            [(rank, (at, min(size, self.sizes[rank] - at))) for at in range(0, self.sizes[rank], size)]
            for rank, size in self.chunks.items()
        ]
        yield from map(dict, itertools.product(*cuts))

    def _part(self, name: str, tensor: torch.Tensor, chunk: Mapping[str, tuple[int, int]]) -> torch.Tensor:
        for dimension, rank in enumerate(self.ranks[name]):
            if rank.name in chunk:
                tensor = tensor.narrow(dimension, *chunk[rank.name])
        return tensor

    def _multiply(self, step: Step, tensors: Mapping[str, torch.Tensor]) -> None:
        for einsum in step.einsums:
            operands = product_operands(einsum)
            assert operands is not None
            left, right = ((tensors[tensor_name(item)], item.args) for item in operands)
            multiply(left, right, (tensors[einsum.output], einsum.kept), add=einsum.output in self.summed)

    def _map(self, step: Step, tensors: Mapping[str, torch.Tensor]) -> None:
        names = list(dict.fromkeys((*step.reads, *step.stores)))
        # A tensor that is written over another one's memory is that tensor, for the code.
        places: dict[Any, str] = {}
        same = {name: places.setdefault(_place(tensors[name]), name) for name in names}
        given = [name for name in names if same[name] == name]
        layouts = tuple((tuple(t.shape), t.stride(), t.dtype) for t in map(tensors.__getitem__, given))
        code = step.compiled.get(layouts)
        if code is None:
            code = step.compiled[layouts] = self._compile(step, given, same, layouts)
        code([tensors[name] for name in given])

    def _compile(
        self, step: Step, given: Sequence[str], same: Mapping[str, str], layouts: Layouts
    ) -> Callable[[list[torch.Tensor]], Any]:
        whole = {rank: size for rank, size in self.sizes.items() if rank not in self.chunks}

        def run(*tensors: torch.Tensor) -> None:
            places = dict(zip(given, tensors, strict=True))
            values = Values({name: places[same[name]] for name in step.reads}, sizes=self.sizes, extents=whole)
            for einsum in step.einsums:
                found = reduce(einsum.body, einsum.reduction, einsum.kept, einsum.reduced, values)
                values = values.with_tensors({einsum.output: found})
            for name in step.stores:
                place, found = places[same[name]], values.tensors[name]
                place.copy_(place + found if name in self.summed else found)

        try:
            with torch_internals.region_settings():
                return torch_internals.compile_writer(run, layouts)
        except torch_internals.COMPILER_ERRORS as error:
            cause = torch_internals.compile_error_cause(error)
            raise CompileError(
                f"the loops of a cascade in chunks do not compile: {cause}", remedy="Report it."
            ) from error

    def _is_summed(self, einsum: Einsum) -> bool:
        return any(rank.name in self.chunks for rank in einsum.reduced)

    def _share_slots(self) -> None:
        """A buffer for each tensor between steps; a map's result may take that of an operand that is read no more."""
        last = {name: number for number, step in enumerate(self.steps) for name in step.reads}
        free: list[int] = []
        for number, step in enumerate(self.steps):
            ending = [self.slot_of[n] for n in step.reads if n in self.slot_of and last[n] == number]
            if not step.library:
                free += ending
            for name in step.stores:
                if name in self.outputs:
                    continue
                slot = Slot(self._chunk_shape(name), self.dtypes[name])
                found = next((index for index in free if self.slots[index] == slot), None)
                if found is None:
                    self.slots.append(slot)
                    found = len(self.slots) - 1
                else:
                    free.remove(found)
                self.slot_of[name] = found
            if step.library:
                free += ending

    def _chunk_shape(self, name: str) -> tuple[int, ...]:
        return tuple(min(self.chunks.get(r.name, self.sizes[r.name]), self.sizes[r.name]) for r in self.ranks[name])


def _place(tensor: torch.Tensor) -> Any:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _ranks_of_tensors(cascade: Cascade) -> dict[str, tuple[sympy.Symbol, ...]]:
    """The ranks of each dimension: as written, for an input as first read. A rank that is cut is the same wherever the
    tensor is read."""
    found: dict[str, tuple[sympy.Symbol, ...]] = {e.output: e.kept for e in cascade.einsums}
    for einsum in cascade.einsums:
        for item in einsum.reads:
            found.setdefault(tensor_name(item), item.args)
    return found


def _steps(cascade: Cascade, outputs: Sequence[str]) -> list[Step]:
    """Products and maps in turn, each as early as it can be."""
    stage: dict[str, int] = {}
    library = {einsum.output: product_operands(einsum) is not None for einsum in cascade.einsums}
    for einsum in cascade.einsums:
        own = library[einsum.output]
        least = max((stage[n] + (library[n] != own) for n in map(tensor_name, einsum.reads) if n in stage), default=0)
        # Even stages are maps, odd ones products.
        stage[einsum.output] = least + (least % 2 != own)
    steps = []
    for number in sorted(set(stage.values())):
        einsums = [einsum for einsum in cascade.einsums if stage[einsum.output] == number]
        steps.append(Step(einsums, bool(number % 2)))
    for number, step in enumerate(steps):
        own_names = {einsum.output for einsum in step.einsums}
        later = {tensor_name(i) for other in steps[number + 1 :] for e in other.einsums for i in e.reads}
        step.stores = [e.output for e in step.einsums if e.output in later or e.output in outputs or step.library]
        read = dict.fromkeys(tensor_name(item) for einsum in step.einsums for item in einsum.reads)
        step.reads = [name for name in read if name not in own_names]
    return steps
