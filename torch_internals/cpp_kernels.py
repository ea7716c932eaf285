"""C++ kernels on their way to the compiler and back."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import torch
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

#: What stands between generated C++ and a loaded kernel: no compiler, a compiler that fails or was killed, a full disk.
COMPILER_ERRORS = (CppCompileError, InvalidCxxCompiler, OSError, ImportError)


def divert_cpp_kernels(current: Callable[[], Any]) -> None:
    """From now on, wrappers loaded while ``current()`` gives a collector hand their C++ kernels to it.

    The collector has ``add(argument types, source, compile one)``, and ``scopes``, which receives each wrapper's
    namespace. Installed once; other compilations are untouched.
    """
    from torch._inductor.async_compile import AsyncCompile

    if getattr(AsyncCompile, "_effcc_diverted", False):
        return
    plain_kernel, plain_wait = AsyncCompile.cpp_pybinding, AsyncCompile.wait

    @functools.wraps(plain_kernel)
    def cpp_pybinding(self: Any, argtypes: list[str], source_code: str) -> Any:
        collector = current()
        if collector is None:
            return plain_kernel(self, argtypes, source_code)
        return collector.add(argtypes, source_code, load_cpp_kernel)

    @functools.wraps(plain_wait)
    def wait(self: Any, scope: dict[str, Any]) -> None:
        plain_wait(self, scope)
        collector = current()
        if collector is not None:
            collector.scopes.append(scope)

    AsyncCompile.cpp_pybinding, AsyncCompile.wait = cpp_pybinding, wait
    AsyncCompile._effcc_diverted = True
    comment_cpp_calls()


def comment_cpp_calls() -> None:
    """From now on, wrappers say before each call of a C++ kernel which ops it computes, as they do for Triton kernels
    and library calls. (``# Topologically Sorted Source Nodes: [mul, sum_1], Original ATen: [...]``)"""
    from torch._inductor.codegen.cpp import CppScheduling
    from torch._inductor.utils import get_kernel_metadata
    from torch._inductor.virtualized import V

    plain = CppScheduling.codegen_comment

    @functools.wraps(plain)
    def codegen_comment(self: Any, node_schedule: Any, kernel_name: Any = None) -> None:
        wrapper = V.graph.wrapper_code
        wrapper.make_comment(get_kernel_metadata(node_schedule, wrapper)[0])
        plain(self, node_schedule, kernel_name)

    CppScheduling.codegen_comment = codegen_comment


def load_cpp_kernel(argument_types: list[str], source: str) -> Any:
    """One C++ kernel compiled and bound the way Inductor does it. Raises CppCompileError."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    return CppPythonBindingsCodeCache.load_pybinding(argument_types, source)


def compile_cpp_module(source: str) -> Callable[[], Any]:
    """Start compiling a Python extension module named ``effcc_kernels``; the result waits for it and loads it."""
    from torch._inductor.async_compile import AsyncCompile

    load = _cpp_module_cache().load_async(source, submit_fn=AsyncCompile.submit)

    def result() -> Any:
        module = load()
        module.bind(torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr)
        return module

    return result


@functools.cache
def _cpp_module_cache() -> Any:
    from torch._inductor.codecache import CppPythonBindingsCodeCache, clear_on_fresh_cache

    class CppModuleCache(CppPythonBindingsCodeCache):
        cache: ClassVar[dict[str, Any]] = {}
        entry_function = "effcc_kernels"

        @staticmethod
        def cache_clear() -> None:
            CppModuleCache.cache.clear()

    return clear_on_fresh_cache(CppModuleCache)


def start_cpp_library(source: str) -> Callable[[], Any]:
    """Begin to compile C++ with ``extern "C"`` functions by Inductor's builder (its flags, vector instructions, OpenMP
    and code cache), in the background. The result waits for it and gives the loaded ``ctypes`` library; it raises
    CppCompileError."""
    from torch._inductor.codecache import CppCodeCache

    load: Callable[[], Any] = CppCodeCache.load_async(source, submit_fn=_compiler_threads().submit)
    return load


@functools.cache
def _compiler_threads() -> ThreadPoolExecutor:
    """The compilers are processes of their own; threads only wait for them."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="effcc-compile")
