"""Cascades as callables on torch tensors: lowered to tile programs, printed as C++, compiled, cached.

    kernel = compile_cascade(parse_cascade(text), sizes={"m": 128, "n": 128, "d": 64, "f": 64}, dtypes={"Q": "f32"})
    result = kernel({"Q": q, "K": k, "V": v})          # {"AV": tensor}

The library is found again by its source in Inductor's code cache, and in this process by what was asked for.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .. import torch_internals
from ..errors import CompileError, ShapeError
from ..ir.cascade import Cascade
from ..ir.cascade_printer import print_cascade
from ..ir.tile import Program
from ..passes.rewrite_cascade import Rewriting, rewrite
from .cpp_tiles.printer import Function, print_function, print_source
from .integers import compared_integers
from .prepared import DTYPE_NAMES, TORCH_DTYPES, TensorInfo, checked, prepared, wanted_outputs
from .tiles.lower import LARGEST_INDEX
from .tiles.roles import Caches, threads


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
        #: Integer inputs that are compared with each other.
        self.integers: Sequence[str] = ()
        #: The same kernel in float64, for integers that float32 does not hold; None if this one is.
        self.in_float64: Callable[[], CascadeKernel] | None = None
        #: Waits for the library that has been begun, and loads it.
        self._load: Callable[[], Any] | None = None

    @property
    def source(self) -> str:
        """The C++ of this kernel alone."""
        return print_source(self.functions)

    def finish(self) -> None:
        """Wait until the kernel is compiled. Raises ``CompileError`` if the C++ compiler refuses it."""
        if self._entries:
            return
        begin([self])
        assert self._load is not None
        try:
            library = self._load()
        except torch_internals.COMPILER_ERRORS as error:
            raise _refused(error) from error
        self._entries = [getattr(library, function.name) for function in self.functions]
        for entry in self._entries:
            entry.restype = None

    def __call__(
        self, inputs: Mapping[str, torch.Tensor], out: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """The cascade's outputs. ``out`` holds tensors to write into; the others are made.

        Raises ``ShapeError`` for a tensor that is missing or does not lie as the kernel was made for, and for integers
        that no floating-point number holds.
        """
        if self.integers and self._inexact(inputs):
            if self.in_float64 is not None:
                return self.in_float64()(inputs, out)
            raise ShapeError(
                "an integer operand has elements of 2**53 or more, which a fused kernel cannot tell apart",
                where=", ".join(self.integers),
                remedy="Compile with options={'cascades': False}.",
            )
        self.finish()
        tensors: dict[str, torch.Tensor] = {}
        for name, info in self.inputs.items():
            if name not in inputs:
                raise ShapeError(f"no value for the input {name}", where=name, remedy="Pass every input.")
            tensors[name] = checked(name, inputs[name], info)
        for name, info in self.outputs.items():
            if out is not None and name in out:
                tensors[name] = checked(name, out[name], info)
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

    def _inexact(self, inputs: Mapping[str, torch.Tensor]) -> bool:
        """Whether an integer is beyond those that the kernel's numbers tell apart."""
        limit = LARGEST_INDEX["f32" if self.in_float64 is not None else "f64"]
        for name in self.integers:
            tensor = inputs.get(name)
            if tensor is not None and tensor.numel():
                low, high = torch.aminmax(tensor)
                if int(high) >= limit or int(low) <= -limit:
                    return True
        return False

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


_prepared: dict[object, CascadeKernel] = {}


def begin(kernels: Sequence[CascadeKernel]) -> None:
    """Compile kernels as one library in the background. Parsing torch's headers takes longer than most kernels, so many
    at a time are faster. Raises ``CompileError`` where there is no C++ compiler."""
    waiting = [kernel for kernel in kernels if kernel._load is None]
    if not waiting:
        return
    source = print_source(function for kernel in waiting for function in kernel.functions)
    try:
        load = torch_internals.start_cpp_library(source)
    except torch_internals.COMPILER_ERRORS as error:
        raise _refused(error) from error
    for kernel in waiting:
        kernel._load = load


def build(kernels: Sequence[CascadeKernel]) -> None:
    """Compile kernels as one library, now. Raises ``CompileError`` if the C++ compiler refuses one."""
    begin(kernels)
    for kernel in kernels:
        kernel.finish()


def _refused(error: Exception) -> CompileError:
    cause = torch_internals.compile_error_cause(error)
    return CompileError(f"the C++ compiler refused a generated kernel: {cause}", remedy="Report it.")


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
    exact: bool = False,
) -> CascadeKernel:
    """The kernel of a cascade (rewritten first, if it is not yet), not compiled yet.

    ``sizes``: every rank and named constant. ``dtypes``: tensor -> element type (inputs; outputs that are not float32,
    or float64 if an input is), or one for all. ``outputs``: wanted tensors, the cascade's outputs by default.
    ``units``: tensor -> the dimension of stride 1, by default the last. ``shapes``: of inputs with indices other than
    plain ranks. ``wide``: tensors never to be stored. ``caches`` bound the tiles (this machine's by default).
    ``crossing``: gradients along two ranks in one kernel, where there are heads enough for all threads. ``splitting``:
    parts of the streamed rank at once, where there is too little else for all threads. ``exact``: computed in float64
    whatever the inputs are. Raises ``NotLowerable`` with the reason.
    """
    rewriting = cascade if isinstance(cascade, Rewriting) else rewrite(cascade)
    text = print_cascade(rewriting.cascade)
    wanted = wanted_outputs(cascade, outputs)
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
        (crossing, splitting, exact, threads()),
    )
    if key not in _prepared:
        limits = caches or Caches.of_this_machine()
        found = prepared(
            rewriting,
            sizes,
            dtypes,
            wanted,
            units,
            shapes,
            wide,
            machine=limits,
            crossing=crossing,
            splitting=splitting,
            exact=exact,
        )
        functions = [
            print_function(program, found.sizes, found.shapes, (comment or text) if number == 0 else "")
            for number, program in enumerate(found.programs)
        ]
        kernel = CascadeKernel(functions, found.sizes, found.inputs, found.outputs, found.buffers)
        integers = [name for name, info in found.inputs.items() if info.dtype in ("i64", "i32")]
        kernel.integers = compared_integers(rewriting.cascade, integers)
        if not exact and not any(info.dtype == "f64" for info in found.inputs.values()):
            kernel.in_float64 = functools.partial(
                prepare_cascade,
                rewriting,
                sizes,
                dtypes,
                outputs=outputs,
                units=units,
                shapes=shapes,
                wide=wide,
                comment=comment,
                caches=caches,
                crossing=crossing,
                splitting=splitting,
                exact=True,
            )
        _prepared[key] = kernel
    return _prepared[key]


__all__ = ["DTYPE_NAMES", "TORCH_DTYPES", "CascadeKernel", "TensorInfo", "build", "compile_cascade", "prepare_cascade"]
