"""Cascades as Triton kernels on torch tensors: the sibling of ``codegen.cascade_kernel`` for GPUs.

    kernel = prepare_triton(parse_cascade(text), sizes, dtypes, target=Target.of_capability(90))
    result = kernel({"Q": q, "K": k, "V": v})          # {"AV": tensor}, on the tensors' device

Compiled by Triton when it is first called; ``codegen.triton_tiles.aot`` compiles ahead of time, without a GPU.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...errors import ShapeError
from ...ir.cascade import Cascade, tensor_name
from ...ir.cascade_printer import print_cascade
from ...ir.tile import Program
from ...passes.rewrite_cascade import Rewriting
from ..prepared import TORCH_DTYPES, Prepared, TensorInfo, checked, prepared
from .blocks import Blocks
from .memory import FLOATING
from .module import load_kernels, print_module
from .printer import TritonFunction, print_kernel
from .schedule import GpuTiles, Launch, Shape, launch
from .target import Target


@dataclass(frozen=True)
class Step:
    """One launch: a kernel, its settings, and the number of its blocks. ``plain``: the kernel for tensors that cannot
    be described to the tensor memory accelerator, if ``function`` wants that."""

    function: TritonFunction
    launch: Launch
    blocks: int
    plain: TritonFunction | None = None


class TritonKernel:
    """``programs`` are the tile programs, in launch order; ``steps`` what is launched for them."""

    def __init__(self, lowered: Prepared, steps: Sequence[Step]) -> None:
        self.inputs, self.outputs, self.buffers = lowered.inputs, lowered.outputs, lowered.buffers
        self.steps = tuple(steps)
        self.programs: tuple[Program, ...] = tuple(step.function.program for step in steps)
        self.sizes = lowered.sizes
        self._kernels: dict[str, Any] = {}

    @property
    def source(self) -> str:
        """The Python of this kernel alone."""
        return print_module(step.function for step in self.steps)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of tensors between two launches."""
        return sum(math.prod(info.shape) * TORCH_DTYPES[info.dtype].itemsize for info in self.buffers.values())

    def with_launches(self, launches: Sequence[Launch]) -> TritonKernel:
        """The same kernels with other warps and stages."""
        lowered = Prepared(self.programs, self.sizes, {}, self.inputs, self.outputs, self.buffers)
        return TritonKernel(
            lowered, [replace(step, launch=each) for step, each in zip(self.steps, launches, strict=True)]
        )

    def __call__(
        self, inputs: Mapping[str, torch.Tensor], out: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """The cascade's outputs. ``out`` holds tensors to write into; the others are made on the inputs' device.

        Raises ``ShapeError`` for a tensor that is missing or does not lie as the kernel was made for.
        """
        tensors: dict[str, torch.Tensor] = {}
        for name, info in self.inputs.items():
            if name not in inputs:
                raise ShapeError(f"no value for the input {name}", where=name, remedy="Pass every input.")
            tensors[name] = checked(name, inputs[name], info)
        device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
        for name, info in self.outputs.items():
            given = out is not None and name in out
            tensors[name] = checked(name, out[name], info) if given else _empty(info, device)  # type: ignore[index]
        for name, info in self.buffers.items():
            tensors[name] = _empty(info, device)
        self.run(tensors)
        return {name: tensors[name] for name in self.outputs}

    def run(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Launch all kernels on these tensors."""
        for step in self.steps:
            described = all(_can_be_described(tensors[name]) for name, _ in step.function.descriptors)
            function = step.function if described else step.plain
            assert function is not None
            if function.name not in self._kernels:
                (self._kernels[function.name],) = load_kernels([function])
            kernel, arguments = self._kernels[function.name], self.arguments(function, tensors)
            kernel[(step.blocks,)](*arguments, num_warps=step.launch.warps, num_stages=step.launch.stages)

    def arguments(self, function: TritonFunction, tensors: Mapping[str, torch.Tensor]) -> list[Any]:
        return [
            *(tensors[item.name] for item in function.program.tensors),
            *(_described(tensors[name], lengths) for name, lengths in function.descriptors),
            *(self.sizes[name] for name in function.sizes),
            *(tensors[name].stride(dimension) for name, dimension in function.strides),
        ]


def prepare_triton(
    cascade: Cascade | Rewriting,
    sizes: Mapping[str, int],
    dtypes: Mapping[str, str] | str = "f32",
    *,
    target: Target,
    outputs: Sequence[str] | None = None,
    units: Mapping[str, int | None] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    wide: frozenset[str] = frozenset(),
    shape: Shape | None = None,
    tile: tuple[int, int] | None = None,
    launches: Launch | None = None,
    precision: str = "",
    splitting: bool = True,
) -> TritonKernel:
    """The kernel of a cascade, not compiled yet; arguments as of ``prepare_cascade``.

    ``shape``, ``tile`` (rows, streamed) and ``launches``: others than the schedule's first choice. ``precision`` of
    float32 products, by default what ``torch.set_float32_matmul_precision`` says. Raises ``NotLowerable`` with the
    reason.
    """
    rewritten = cascade if isinstance(cascade, Cascade) else cascade.cascade
    narrow = operand_bytes(rewritten, dtypes)
    tiles = GpuTiles(target, narrow, shape or Shape(), tile)
    lowered = prepared(
        cascade, sizes, dtypes, outputs, units, shapes, wide, machine=tiles, crossing=False, splitting=splitting
    )
    steps = []
    for number, program in enumerate(lowered.programs):
        chosen = launches or launch(program, Blocks(program, lowered.sizes, lowered.shapes), target, narrow)
        printed = functools.partial(
            print_kernel,
            program,
            lowered.sizes,
            lowered.shapes,
            precision=precision or float32_precision(),
            interpreted=is_interpreted(),
            specialized=chosen.specialized,
            comment=print_cascade(rewritten) if number == 0 else "",
        )
        function = printed(descriptors=chosen.descriptors)
        plain = printed() if function.descriptors else None
        blocks = math.prod(-(-_size(program, lowered.sizes, rank) // step) for rank, step in function.tiles)
        steps.append(Step(function, chosen, blocks, plain))
    return TritonKernel(lowered, steps)


def _size(program: Program, sizes: Mapping[str, int], rank: str) -> int:
    return sizes[next((other.name for own, other in program.alias if own.name == rank), rank)]


def operand_bytes(cascade: Cascade, dtypes: Mapping[str, str] | str) -> int:
    """Bytes of an element of what is multiplied: of the floating inputs with most indices, the narrowest."""
    ranks = {tensor_name(item): len(item.args) for einsum in cascade.einsums for item in einsum.reads}
    kinds = {name: dtypes if isinstance(dtypes, str) else dtypes.get(name, "f32") for name in cascade.inputs}
    floating = {name: kind for name, kind in kinds.items() if kind in FLOATING}
    most = max((ranks[name] for name in floating), default=0)
    return min((TORCH_DTYPES[kind].itemsize for name, kind in floating.items() if ranks[name] == most), default=4)


def float32_precision() -> str:
    """How float32 matrix products are made. ``tf32x3``: by three products of parts, which have float32's digits (a unit
    or two in the last place of each product) at the speed of matrix units."""
    return {"highest": "tf32x3"}.get(torch.get_float32_matmul_precision(), "tf32")


def is_interpreted() -> bool:
    """Whether this process runs kernels in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes")


def _can_be_described(tensor: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator can read it: rows of neighbours, and all else at multiples of 16 bytes."""
    steps = [step * tensor.itemsize for step in tensor.stride()[:-1]]
    aligned = tensor.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)
    return aligned and tensor.stride(-1) == 1


def _described(tensor: torch.Tensor, lengths: tuple[int, ...]) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(lengths))


def _empty(info: TensorInfo, device: torch.device) -> torch.Tensor:
    return torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype], device=device)
