"""Triton kernels compiled ahead of time for a GPU that need not be there, and what they take of it.

Registers, stack and static shared memory are read from the machine code (``cuobjdump``, which comes with Triton); the
shared memory that a launch asks for is Triton's own figure. A stack is where registers are spilled to.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CompileError
from .kernel import Step, TritonKernel
from .memory import descriptor
from .module import load_kernels
from .schedule import Launch
from .target import Target

_POINTERS = {
    "f32": "*fp32",
    "f64": "*fp64",
    "bf16": "*bf16",
    "f16": "*fp16",
    "i64": "*i64",
    "i32": "*i32",
    "i16": "*i16",
    "i8": "*i8",
    "u8": "*u8",
    "b1": "*i1",
}
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Usage:
    """What one kernel takes. ``registers`` of a thread; ``spilled`` bytes of a thread's stack; ``shared`` bytes of a
    block; ``occupancy``: threads that a multiprocessor holds of it, as a part of those that it can hold."""

    name: str
    capability: int
    launch: Launch
    registers: int
    spilled: int
    shared: int
    occupancy: float

    def __str__(self) -> str:
        return (
            f"{self.name} on sm_{self.capability}: {self.launch.warps} warps, {self.launch.stages} stages, "
            f"{self.registers} registers, {self.spilled} bytes spilled, {self.shared} bytes of shared memory, "
            f"occupancy {self.occupancy:.0%}"
        )


def usage(kernel: TritonKernel, target: Target, only: int | None = None) -> tuple[Usage, ...]:
    """Compile all launches of a kernel (or ``only`` one) and report each. Raises ``CompileError`` if Triton does, or if
    a block needs more shared memory than the target has."""
    chosen = kernel.steps if only is None else kernel.steps[only : only + 1]
    functions = load_kernels(step.function for step in chosen)
    return tuple(_usage(step, function, kernel, target) for step, function in zip(chosen, functions, strict=True))


def _usage(step: Step, function: Any, kernel: TritonKernel, target: Target) -> Usage:
    compiled = compile_step(step, function, kernel, target)
    name, shared = step.function.name, int(compiled.metadata.shared)
    if shared > target.shared:
        raise CompileError(
            f"{name} needs {shared} bytes of shared memory; a block on sm_{target.capability} has {target.shared}",
            remedy="Use fewer stages or shorter tiles.",
        )
    registers, stack = _resources(compiled.asm["cubin"])
    threads = step.launch.warps * 32
    return Usage(
        name,
        target.capability,
        step.launch,
        registers,
        stack,
        shared,
        target.occupancy(threads, registers, shared),
    )


def compile_step(step: Step, function: Any, kernel: TritonKernel, target: Target) -> Any:
    """Triton's compiled kernel for contiguous tensors, aligned as torch allocates them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    declared = {tensor.name: tensor for tensor in step.function.program.tensors}
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    constants: dict[str, Any] = {}
    numbers = _numbers(step, kernel)
    described = {descriptor(*each): each for each in step.function.descriptors}
    for position, argument in enumerate(step.function.arguments):
        if argument in described:
            name, lengths = described[argument]
            signature[argument] = f"tensordesc<{_POINTERS[declared[name].dtype][1:]}[{', '.join(map(str, lengths))}]>"
            continue
        if argument.startswith("t_"):
            signature[argument] = _POINTERS[declared[argument[2:]].dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
            continue
        number = numbers[argument]
        if number == 1:  # as the launcher does
            signature[argument], constants[argument] = "constexpr", 1
            continue
        signature[argument] = "i32" if number < 2**31 else "i64"
        if number % 16 == 0:
            attributes[(position,)] = [["tt.divisibility", 16]]
    options = {"num_warps": step.launch.warps, "num_stages": step.launch.stages}
    source = ASTSource(function, signature, constants, attributes)
    try:
        return triton.compile(source, target=GPUTarget("cuda", target.capability, 32), options=options)
    except Exception as error:  # whatever stage of Triton's it is, the kernel cannot be used
        raise CompileError(
            f"Triton refused {step.function.name} for sm_{target.capability}: {type(error).__name__}: {error}",
            remedy="Report it.",
        ) from error


def _numbers(step: Step, kernel: TritonKernel) -> Mapping[str, int]:
    """Every size and stride that is passed, for contiguous tensors."""
    shapes = {
        name: info.shape for group in (kernel.inputs, kernel.outputs, kernel.buffers) for name, info in group.items()
    }
    found = {f"z_{name}": kernel.sizes[name] for name in step.function.sizes}
    for name, dimension in step.function.strides:
        found[f"s_{name}_{dimension}"] = math.prod(shapes[name][dimension + 1 :])
    return found


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of the one kernel in a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(_tool("cuobjdump")), "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = _USAGE.search(text)
    if found is None:
        raise CompileError("cuobjdump says nothing of the kernel's registers", where=text[:200])
    registers, stack, _, local = map(int, found.groups())
    return registers, max(stack, local)


def _tool(name: str) -> Path:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise CompileError(f"{name} is not beside Triton", where=str(path), remedy="Install Triton for NVIDIA GPUs.")
    return path
