"""Compile many generated C++ kernels in one translation unit.

Inductor compiles each CPU kernel in a file of its own, where parsing the headers costs more than the kernel itself.
Here the kernels that a region asks for are collected while its code is generated, put into namespaces of one file, and
compiled in the background while the next region is being generated.
"""

from __future__ import annotations

import functools
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from .. import torch_internals
from .vector_lanes import LANES, with_vector_draws

#: Fewest and most kernels of a translation unit (compiling is serial within a unit).
SMALLEST, LARGEST = 4, 10
_ENTRY = re.compile(r'extern\s+"C"\s+void\s+kernel\s*\(')
_READERS = {"int64_t": "integer", "double": "real<double>"}
#: A scalar that Inductor hands over in single precision, whatever the dtype of the tensor that it was read from.
_ROUNDED = re.compile(r"\bconst float (?=\w+[,)])")

_PRELUDE = """
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <cstdint>
#include <stdexcept>

namespace effcc_bindings {
using Address = void* (*)(PyObject*);
static Address tensor_address = nullptr;

template <typename T> static inline T pointer(PyObject* const* args, size_t n) {
    return static_cast<T>(tensor_address(args[n]));
}
static inline int64_t integer(PyObject* const* args, size_t n) {
    const long long value = PyLong_AsLongLong(args[n]);
    if (value == -1 && PyErr_Occurred()) throw std::runtime_error("an int argument was expected");
    return value;
}
template <typename T> static inline T real(PyObject* const* args, size_t n) {
    const double value = PyFloat_AsDouble(args[n]);
    if (value == -1.0 && PyErr_Occurred()) throw std::runtime_error("a float argument was expected");
    return static_cast<T>(value);
}
static PyObject* bind(PyObject*, PyObject* address) {
    tensor_address = reinterpret_cast<Address>(PyLong_AsVoidPtr(address));
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_NONE;
}
}  // namespace effcc_bindings
"""

_BINDING = """
static PyObject* call_{index}(PyObject*, PyObject* const* args, Py_ssize_t count) {{
    try {{
        if (count != {count}) throw std::runtime_error("{count} arguments were expected");
        kernel_{index}::kernel({arguments});
        Py_RETURN_NONE;
    }} catch (std::exception const& error) {{
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }}
}}
"""

_MODULE = """
static PyMethodDef methods[] = {{
    {{"bind", effcc_bindings::bind, METH_O, ""}},
{entries}
    {{nullptr, nullptr, 0, nullptr}}}};
static PyModuleDef definition = {{PyModuleDef_HEAD_INIT, "effcc_kernels", nullptr, -1, methods}};
PyMODINIT_FUNC PyInit_effcc_kernels(void) {{ return PyModule_Create(&definition); }}
"""


#: Compiles one kernel from its argument types and source.
CompileAlone: TypeAlias = Callable[[list[str], str], Any]


@dataclass(eq=False)
class PendingKernel:
    """A kernel that a region asked for; stands in the region's namespace until its batch is compiled."""

    argument_types: tuple[str, ...]
    source: str
    alone: Callable[[], Any]
    #: Identity of the region that calls it.
    region: str = ""
    compiled: Any = None

    def __call__(self, *args: Any) -> Any:
        if self.compiled is None:
            self.compiled = self.alone()
        return self.compiled(*args)


@dataclass
class Batch:
    """Kernels of one translation unit on their way through the C++ compiler."""

    kernels: list[PendingKernel]
    result: Callable[[], Any]

    def wait(self) -> dict[str, str]:
        """Load the unit; when it does not compile as a whole, each kernel is compiled alone. Returns the regions whose
        kernels do not compile at all, with the compiler's message."""
        try:
            module = self.result()
        except torch_internals.COMPILER_ERRORS:
            failed: dict[str, str] = {}
            for kernel in self.kernels:
                try:
                    kernel.compiled = kernel.alone()
                except torch_internals.COMPILER_ERRORS as error:
                    failed[kernel.region] = describe(error)
            return failed
        for index, kernel in enumerate(self.kernels):
            kernel.compiled = getattr(module, f"call_{index}")
        return {}


@dataclass
class Collector:
    """What a graph's regions asked for. ``scopes`` are the namespaces in which the kernels are to be replaced."""

    pending: list[PendingKernel] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    scopes: list[dict[str, Any]] = field(default_factory=list)
    #: Identity of the region whose code is being generated.
    region: str = ""

    def add(self, argument_types: list[str], source: str, alone: CompileAlone) -> Any:
        """A kernel as Inductor's wrapper asks for it. ``alone`` compiles it by itself."""
        argument_types = ["const double" if kind == "const float" else kind for kind in argument_types]
        source = _ROUNDED.sub("const double ", source)
        compile_alone = functools.partial(alone, argument_types, source)
        if len(_ENTRY.findall(source)) != 1 or "#define" in source or reader_problem(argument_types):
            return compile_alone()
        kernel = PendingKernel(tuple(argument_types), source, compile_alone, self.region)
        self.pending.append(kernel)
        return kernel

    def flush(self, last: bool = False) -> None:
        """Start compiling what is pending; fewer than SMALLEST kernels wait for the next region unless ``last``."""
        size = min(LARGEST, max(SMALLEST, -(-len(self.pending) // (os.cpu_count() or 1))))
        while len(self.pending) >= SMALLEST or (last and self.pending):
            kernels, self.pending = self.pending[:size], self.pending[size:]
            try:
                result = torch_internals.compile_cpp_module(unit_source(kernels))
            except torch_internals.COMPILER_ERRORS as error:
                result = functools.partial(_raise, error)
            self.batches.append(Batch(kernels, result))

    def finish(self) -> dict[str, str]:
        """Wait for all batches and put the compiled kernels into the regions' namespaces. Returns the regions that
        cannot run because a kernel did not compile, with the reason."""
        self.flush(last=True)
        failed: dict[str, str] = {}
        for batch in self.batches:
            failed.update(batch.wait())
        for scope in self.scopes:
            for name, value in list(scope.items()):
                if isinstance(value, PendingKernel) and value.compiled is not None:
                    scope[name] = value.compiled
        self.batches, self.scopes = [], []
        return failed


def describe(error: BaseException) -> str:
    """The error's kind and first line."""
    error = torch_internals.compile_error_cause(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def _raise(error: BaseException) -> Any:
    raise error


def reader_problem(argument_types: list[str]) -> bool:
    """Whether an argument is of a type that the bindings do not read."""
    return any(not kind.endswith("*") and kind.replace("const ", "") not in _READERS for kind in argument_types)


def unit_source(kernels: list[PendingKernel]) -> str:
    """The C++ text of a translation unit that holds ``kernels`` and their Python bindings."""
    includes: dict[str, None] = {}
    bodies: list[str] = []
    for index, kernel in enumerate(kernels):
        lines = kernel.source.splitlines()
        includes.update(dict.fromkeys(line.strip() for line in lines if line.lstrip().startswith("#include")))
        body = "\n".join(line for line in lines if not line.lstrip().startswith("#include"))
        body = with_vector_draws(_ENTRY.sub("void kernel(", body))
        arguments = ", ".join(read_argument(kind, n) for n, kind in enumerate(kernel.argument_types))
        bodies.append(f"namespace kernel_{index} {{\n{body}\n}}  // namespace kernel_{index}\n")
        bodies.append(_BINDING.format(index=index, count=len(kernel.argument_types), arguments=arguments))
    entries = "\n".join(
        f'    {{"call_{index}", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_{index})), '
        f'METH_FASTCALL, ""}},'
        for index in range(len(kernels))
    )
    return "\n".join([*includes, LANES, _PRELUDE, *bodies, _MODULE.format(entries=entries)])


def read_argument(kind: str, position: int) -> str:
    plain = kind.replace("const ", "")
    reader = f"pointer<{plain}>" if plain.endswith("*") else _READERS[plain]
    return f"effcc_bindings::{reader}(args, {position})"


_active = threading.local()


@contextmanager
def collecting(collector: Collector) -> Iterator[None]:
    """Kernels that Inductor's wrappers ask for in this thread, while inside, go to ``collector``."""
    torch_internals.divert_cpp_kernels(current_collector)
    before = getattr(_active, "collector", None)
    _active.collector = collector
    try:
        yield
    finally:
        _active.collector = before


def current_collector() -> Collector | None:
    return getattr(_active, "collector", None)
