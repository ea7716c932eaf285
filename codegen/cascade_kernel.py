"""Cascades as callables on torch tensors: lowered to tile programs, printed as C++, compiled, cached.

    kernel = compile_cascade(parse_cascade(text), sizes={"m": 128, "n": 128, "d": 64, "f": 64}, dtypes={"Q": "f32"})
    result = kernel({"Q": q, "K": k, "V": v})          # {"AV": tensor}

The library is found again by its source in Inductor's code cache, and in this process by what was asked for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import torch_internals
from ..errors import CompileError, ShapeError
from ..ir.cascade import Cascade, accesses, is_rank
from ..ir.cascade_printer import print_cascade
from ..ir.tile import Program
from ..passes.rewrite_cascade import Rewriting, rewrite
from .cpp_tiles.printer import Function, print_function, print_source
from .tiles.errors import NotLowerable
from .tiles.lower import Operand, Settings, lower
from .tiles.roles import Caches, threads

#: Element types of kernels -> torch's.
TORCH_DTYPES = {
    "f32": torch.float32,
    "f64": torch.float64,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "b1": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """How a tensor lies in memory: shape, element type, and which dimension has stride 1 (None: not known)."""

    shape: tuple[int, ...]
    dtype: str
    unit: int | None


class CascadeKernel:
    """A cascade as C++, compiled when it is first called or by ``build``. ``programs`` are its tile programs, in launch
    order. ``scratch_bytes`` is what each thread needs while it runs; ``buffer_bytes`` what lies between two launches.
    """

    def __init__(
        self,
        functions: Sequence[Function],
        sizes: Mapping[str, int],
        inputs: Mapping[str, TensorInfo],
        outputs: Mapping[str, TensorInfo],
        buffers: Mapping[str, TensorInfo],
    ) -> None:
        self.inputs, self.outputs, self.buffers = dict(inputs), dict(outputs), dict(buffers)
        self.functions = tuple(functions)
        self.programs: tuple[Program, ...] = tuple(function.program for function in functions)
        self.scratch_bytes = max(function.scratch for function in functions)
        self.buffer_bytes = sum(
            torch.Size(info.shape).numel() * TORCH_DTYPES[info.dtype].itemsize for info in buffers.values()
        )
        self._sizes = dict(sizes)
        self._entries: list[Any] = []

    @property
    def source(self) -> str:
        """The C++ of this kernel alone."""
        return print_source(self.functions)

    def bind(self, library: Any) -> None:
        """Take the functions from a loaded library."""
        self._entries = [getattr(library, function.name) for function in self.functions]
        for entry in self._entries:
            entry.restype = None

    def __call__(
        self, inputs: Mapping[str, torch.Tensor], out: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """The cascade's outputs. ``out`` holds tensors to write into; the others are made.

        Raises ``ShapeError`` for a tensor that is missing or does not lie as the kernel was made for.
        """
        if not self._entries:
            build([self])
        tensors: dict[str, torch.Tensor] = {}
        for name, info in self.inputs.items():
            if name not in inputs:
                raise ShapeError(f"no value for the input {name}", where=name, remedy="Pass every input.")
            tensors[name] = _checked(name, inputs[name], info)
        for name, info in self.outputs.items():
            if out is not None and name in out:
                tensors[name] = _checked(name, out[name], info)
            else:
                tensors[name] = _empty(info)
        for name, info in self.buffers.items():
            tensors[name] = _empty(info)
        threads = torch.get_num_threads()
        scratch = torch.empty(self.scratch_bytes * threads + 64, dtype=torch.uint8)
        at = -(-scratch.data_ptr() // 64) * 64
        for function, entry in zip(self.functions, self._entries, strict=True):
            self._launch(function, entry, tensors, at)
        return {name: tensors[name] for name in self.outputs}

    def _launch(self, function: Function, entry: Any, tensors: Mapping[str, torch.Tensor], scratch: int) -> None:
        numbers = [self._sizes[name] for name in function.sizes]
        pointers = []
        for item in function.program.tensors:
            tensor = tensors[item.name]
            pointers.append(tensor.data_ptr())
            numbers += tensor.stride()
        entry(
            (ctypes.c_void_p * len(pointers))(*pointers),
            (ctypes.c_int64 * len(numbers))(*numbers),
            ctypes.c_void_p(scratch),
            ctypes.c_int64(self.scratch_bytes),
        )


def _empty(info: TensorInfo) -> torch.Tensor:
    return torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])


def _checked(name: str, tensor: torch.Tensor, info: TensorInfo) -> torch.Tensor:
    if tuple(tensor.shape) != info.shape or tensor.dtype != TORCH_DTYPES[info.dtype]:
        found = f"{DTYPE_NAMES.get(tensor.dtype, tensor.dtype)}{list(tensor.shape)}"
        raise ShapeError(
            f"{name} is {found}; the kernel was made for {info.dtype}{list(info.shape)}",
            where=name,
            remedy="Compile the cascade for these sizes.",
        )
    if info.unit is not None and tensor.shape[info.unit] > 1 and tensor.stride(info.unit) != 1:
        raise ShapeError(
            f"the elements of {name} are not neighbours along dimension {info.unit}",
            where=name,
            remedy="Compile with units={name: None}, or make the tensor contiguous.",
        )
    return tensor


_prepared: dict[object, CascadeKernel] = {}


def build(kernels: Sequence[CascadeKernel]) -> None:
    """Compile kernels as one library. Parsing torch's headers takes longer than most kernels, so many at a time are
    faster. Raises ``CompileError`` if the C++ compiler refuses one."""
    waiting = [kernel for kernel in kernels if not kernel._entries]
    if not waiting:
        return
    try:
        library = torch_internals.load_cpp_library(
            print_source(function for kernel in waiting for function in kernel.functions)
        )
    except torch_internals.COMPILER_ERRORS as error:
        cause = torch_internals.compile_error_cause(error)
        raise CompileError(f"the C++ compiler refused a generated kernel: {cause}", remedy="Report it.") from error
    for kernel in waiting:
        kernel.bind(library)


def compile_cascade(cascade: Cascade | Rewriting, *arguments: Any, **named: Any) -> CascadeKernel:
    """``prepare_cascade``, and compiled at once. Raises ``CompileError`` if C++ fails."""
    kernel = prepare_cascade(cascade, *arguments, **named)
    build([kernel])
    return kernel


def prepare_cascade(
    cascade: Cascade | Rewriting,
    sizes: Mapping[str, int],
    dtypes: Mapping[str, str] | str = "f32",
    *,
    outputs: Sequence[str] | None = None,
    units: Mapping[str, int | None] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    wide: frozenset[str] = frozenset(),
    comment: str | None = None,
    caches: Caches | None = None,
    crossing: bool = True,
    splitting: bool = True,
) -> CascadeKernel:
    """The kernel of a cascade (rewritten first, if it is not yet), not compiled yet.

    ``sizes``: every rank and named constant. ``dtypes``: tensor -> element type (inputs; outputs that are not float32,
    or float64 if an input is), or one for all. ``outputs``: wanted tensors, the cascade's outputs by default.
    ``units``: tensor -> the dimension of stride 1, by default the last. ``shapes``: of inputs with indices other than
    plain ranks. ``wide``: tensors never to be stored. ``caches`` bound the tiles (this machine's by default).
    ``crossing``: gradients along two ranks in one kernel, where there are heads enough for all threads. ``splitting``:
    parts of the streamed rank at once, where there is too little else for all threads. Raises ``NotLowerable`` with
    the reason.
    """
    rewriting = cascade if isinstance(cascade, Rewriting) else rewrite(cascade)
    text = print_cascade(rewriting.cascade)
    written = cascade if isinstance(cascade, Cascade) else cascade.cascade
    wanted = tuple(outputs if outputs is not None else written.outputs)
    given = {name: dtypes if isinstance(dtypes, str) else dtypes.get(name) for name in rewriting.cascade.tensors}
    key = (
        text,
        wanted,
        tuple(sorted(sizes.items())),
        tuple(sorted((name, dtype or "") for name, dtype in given.items())),
        tuple(sorted((units or {}).items())),
        tuple(sorted((name, tuple(shape)) for name, shape in (shapes or {}).items())),
        wide,
        caches,
        (crossing, splitting, threads()),
    )
    if key not in _prepared:
        infos = _infos(rewriting.cascade, sizes, given, units or {}, shapes or {}, wanted)
        compute = "f64" if any(info.dtype == "f64" for info in infos.values()) else "f32"
        operands = {name: Operand(info.dtype, info.unit) for name, info in infos.items()}
        limits = caches or Caches.of_this_machine()
        settings = Settings(sizes, operands, compute, wide, limits, crossing, splitting)
        _prepared[key] = _prepare(rewriting, wanted, infos, settings, comment or text)
    return _prepared[key]


def _infos(
    cascade: Cascade,
    sizes: Mapping[str, int],
    dtypes: Mapping[str, str | None],
    units: Mapping[str, int | None],
    shapes: Mapping[str, Sequence[int]],
    wanted: Sequence[str],
) -> dict[str, TensorInfo]:
    """Every input's and output's place in memory."""
    wide = any(dtypes.get(name) == "f64" for name in cascade.inputs)
    found: dict[str, TensorInfo] = {}
    for einsum in cascade.einsums:
        for item in accesses(einsum.body):
            name = str(item.func.__name__)
            if name in cascade.definitions or name in found:
                continue
            shape = shapes.get(name) or [_extent(name, index, sizes) for index in item.args]
            unit = units.get(name, len(shape) - 1 if shape else None)
            found[name] = TensorInfo(tuple(shape), dtypes.get(name) or "f32", unit)
    for name in wanted:
        if name not in cascade.definitions:
            raise NotLowerable(f"the rewritten cascade does not compute {name}", where=name)
        shape = [sizes[symbol.name] for symbol in cascade.definitions[name].kept]
        dtype = dtypes.get(name) or ("f64" if wide else "f32")
        found[name] = TensorInfo(tuple(shape), dtype, units.get(name, len(shape) - 1 if shape else None))
    return found


def _extent(name: str, index: object, sizes: Mapping[str, int]) -> int:
    symbol = getattr(index, "name", None)
    if symbol is None or symbol not in sizes or not is_rank(index):
        raise NotLowerable(f"the shape of {name}, read at {index}, is not known", where=name)
    return sizes[symbol]


def _prepare(
    rewriting: Rewriting, wanted: Sequence[str], infos: Mapping[str, TensorInfo], settings: Settings, comment: str
) -> CascadeKernel:
    lowered = lower(rewriting.cascade, rewriting.monoids, wanted, settings)
    programs = lowered.programs
    sizes = {**settings.sizes, **lowered.sizes}
    full = dict(sizes)
    shapes: dict[str, Sequence[int]] = {name: info.shape for name, info in infos.items()}
    buffers: dict[str, TensorInfo] = {}
    for program in programs:
        for item in program.tensors:
            if item.name not in infos:
                shape = tuple(sizes[rank.name] for rank in item.ranks)
                buffers[item.name] = TensorInfo(shape, item.dtype, item.unit)
                shapes[item.name] = shape
            full.update({rank.name: extent for rank, extent in zip(item.ranks, shapes[item.name], strict=True)})
    functions = [
        print_function(program, full, shapes, comment if number == 0 else "") for number, program in enumerate(programs)
    ]
    inputs = {name: info for name, info in infos.items() if name not in wanted}
    outputs = {name: infos[name] for name in wanted}
    return CascadeKernel(functions, full, inputs, outputs, buffers)
