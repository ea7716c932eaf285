"""Read what a generated wrapper does with memory: its kernels in order, its allocations and when each is freed.

Inductor's Python wrapper is straight-line code: ``buf = empty_strided_cpu(...)``, kernel calls, ``del buf``. It is
parsed here with ``ast`` and never run.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from ..cost_model.flops import Call
from ..cost_model.region_memory import RegionBuffer, RegionKernel, RegionMemory
from ..cost_model.tensors import TensorTable
from ..ir.graph import Node
from ..ir.types import DTYPES, SHORT_DTYPE
from .library_workspace import MEASURED, LibraryCall, Operand, workspace_of

#: Inductor rounds allocations inside its wrappers up to nothing; torch's CPU allocator aligns to 64 bytes without cost.
_ALLOCATORS = re.compile(r"empty_strided(_\w+)?$")
_COMMENT = re.compile(r"\s*# (?:Topologically Sorted|Unsorted) Source Nodes: \[(.*?)\], Original ATen:")


#: What a fused cascade's kernel holds while it runs: bytes for each thread, and once.
_CASCADE = re.compile(r"^ *workspace (\d+) (\d+)$", re.MULTILINE)


@dataclass
class _Storage:
    name: str
    bytes: int
    first: int
    last: int
    values: list[str] = field(default_factory=list)


#: Bytes of what an op that allocates for itself returns: (op's name, size) -> bytes.
ResultBytes = Callable[[str, tuple[int, ...]], int]


def wrapper_memory(
    source: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    input_bytes: Mapping[str, int],
    result_bytes: ResultBytes,
    symbols: Mapping[str, int] | None = None,
    layouts: Mapping[str, Operand] | None = None,
) -> RegionMemory | None:
    """Kernels and buffers of a wrapper's ``call``; None where its code is not understood.

    inputs, outputs: names of the region's values in order. input_bytes: size of each input that is a tensor.
    symbols: values of the sizes that the wrapper computes with. layouts: the inputs that lie in the CPU's memory.
    """
    call = _call_function(source)
    if call is None:
        return None
    reader = _Reader(dict(input_bytes), result_bytes, dict(symbols or {}), _named_ops(source), dict(layouts or {}))
    try:
        for statement in _flat(call.body):
            reader.read(statement, list(inputs), list(outputs))
    except _NotUnderstood:
        return None
    return reader.memory()


def _named_ops(source: str) -> dict[int, tuple[str, ...]]:
    """Line -> the ops that the comment above it names."""
    found: dict[int, tuple[str, ...]] = {}
    ops: tuple[str, ...] = ()
    for number, line in enumerate(source.splitlines(), start=1):
        comment = _COMMENT.match(line)
        if comment:
            ops = tuple(name.strip() for name in comment[1].split(",") if name.strip())
        elif ops and not line.lstrip().startswith("#"):
            found[number] = ops
            ops = ()
    return found


class _NotUnderstood(Exception):
    """The wrapper has a form that this reader does not know."""


def _call_function(source: str) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "call"]
    return found[-1] if found else None


def _flat(statements: Sequence[ast.stmt]) -> list[ast.stmt]:
    """Statements in order, those inside ``with`` blocks (device guards) included."""
    result: list[ast.stmt] = []
    for statement in statements:
        if isinstance(statement, ast.With):
            result += _flat(statement.body)
        else:
            result.append(statement)
    return result


class _Reader:
    def __init__(
        self,
        input_bytes: dict[str, int],
        result_bytes: ResultBytes,
        symbols: dict[str, int],
        named: dict[int, tuple[str, ...]],
        layouts: dict[str, Operand],
    ) -> None:
        self.input_bytes, self.result_bytes, self.symbols, self.named = input_bytes, result_bytes, symbols, named
        self.given, self.layouts = layouts, dict[str, Operand]()
        #: What a library's op returned, with the element type of its first operand.
        self.made: dict[str, torch.dtype | None] = {}
        self.owner: dict[str, _Storage] = {}
        self.storages: list[_Storage] = []
        self.kernels: list[RegionKernel] = []
        self.unsized: dict[str, tuple[_Storage, str]] = {}

    def read(self, statement: ast.stmt, inputs: list[str], outputs: list[str]) -> None:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            self.assign(statement.targets[0], statement.value, inputs)
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            self.call(statement.value)
        elif isinstance(statement, ast.Return):
            self.result(statement.value, outputs)
        # ``del`` needs no reading: a buffer's last use is the last kernel that names it.

    def assign(self, target: ast.expr, value: ast.expr, inputs: list[str]) -> None:
        if isinstance(value, ast.Name) and value.id == "args":
            self.arguments(target, inputs)
            return
        if not isinstance(target, ast.Name):
            self.launch(value)
            return
        base = _base_name(value)
        if base is not None and base in self.unsized and isinstance(value, ast.Subscript):
            # One of an op's results: each has memory of its own.
            whole, op = self.unsized[base]
            part = self.allocate(target.id, 0)
            part.first = whole.first
            self.unsized[target.id] = (part, op)
            self.made[target.id] = self.made[base]
            return
        if base is not None:
            layout = self.layout(value)
            if layout is not None:
                self.layouts[target.id] = layout
            if base in self.owner:
                self.owner[target.id] = self.owner[base]
                if base in self.unsized:
                    self.unsized[target.id] = self.unsized[base]
            return
        if isinstance(value, ast.Call):
            name = _dotted(value.func)
            if _ALLOCATORS.search(name):
                self.allocate(target.id, self.strided_bytes(value))
                self.layouts.pop(target.id, None)
                if name.endswith("_cpu"):
                    dtype = getattr(torch, _dotted(value.args[2]).removeprefix("torch."))
                    self.layouts[target.id] = Operand(self.sizes(value.args[0]), self.sizes(value.args[1]), dtype)
            elif name.endswith((".size", ".stride", "get_raw_stream")):
                self.bind_size(target.id, value)
            else:
                storage = self.allocate(target.id, 0)
                self.unsized[target.id] = (storage, name.removeprefix("torch.ops."))
                read = next((layout for each in value.args if (layout := self.layout(each)) is not None), None)
                self.made[target.id] = read.dtype if read is not None else None
                self.launch(value, storage)

    def arguments(self, target: ast.expr, inputs: list[str]) -> None:
        names = (
            [item.id for item in target.elts if isinstance(item, ast.Name)]
            if isinstance(target, ast.Tuple | ast.List)
            else []
        )
        if len(names) != len(inputs):
            raise _NotUnderstood
        for name, value in zip(names, inputs, strict=True):
            if value in self.input_bytes:
                self.allocate(name, self.input_bytes[value]).values.append(value)
            if value in self.given:
                self.layouts[name] = self.given[value]

    def allocate(self, name: str, size: int) -> _Storage:
        position = len(self.kernels)
        storage = _Storage(name, size, position, position)
        self.storages.append(storage)
        self.owner[name] = storage
        return storage

    def call(self, node: ast.Call) -> None:
        name = _dotted(node.func)
        if name.startswith("assert_size_stride") and node.args and isinstance(node.args[0], ast.Name):
            found = self.unsized.pop(node.args[0].id, None)
            if found is not None:
                storage, op = found
                size = self.sizes(node.args[1])
                storage.bytes = max(storage.bytes, self.result_bytes(op, size))
                dtype = self.made.get(node.args[0].id)
                if dtype is not None and len(node.args) > 2:
                    self.layouts[node.args[0].id] = Operand(size, self.sizes(node.args[2]), dtype)
            return
        if name.startswith(("assert_", "args.clear")) or name.endswith((".clear", "set_device")):
            return
        self.launch(node)

    def launch(self, node: ast.expr, made: _Storage | None = None) -> None:
        """A kernel: everything it names is in use while it runs."""
        position = len(self.kernels)
        touched = [
            self.owner[item.id] for item in ast.walk(node) if isinstance(item, ast.Name) and item.id in self.owner
        ]
        for storage in [*touched, *([made] if made is not None else [])]:
            storage.last = max(storage.last, position)
        name = _dotted(node.func) if isinstance(node, ast.Call) else type(node).__name__
        if isinstance(node, ast.Call) and (size := self.workspace(name, node)):
            self.storages.append(_Storage(f"{name} workspace", size, position, position))
        library = name.startswith(("extern_kernels", "torch.ops", "aten", "inductor_ops"))
        ops = self.named.get(node.lineno, ())
        # A library call computes the last of them; the others made its operands, which are in memory.
        ops = ops[-1:] if library else ops
        self.kernels.append(RegionKernel(name=name, kind="library" if library else "kernel", ops=ops))

    def workspace(self, name: str, node: ast.Call) -> int:
        """Bytes that a library op holds for itself: a convolution on CPU says so when it is run (see
        ``library_workspace``), a fused cascade in its text."""
        if "effcc.cascade" in name:
            return _cascade_workspace(node)
        measured = self.measured_workspace(name, node)
        if measured is not None:
            return measured
        for op, operand, copies in _REORDERS:
            if op in name and len(node.args) > operand:
                base = _base_name(node.args[operand])
                if base is not None and base in self.owner:
                    return copies * self.owner[base].bytes
        return 0

    def measured_workspace(self, name: str, node: ast.Call) -> int | None:
        if name not in MEASURED:
            return None
        try:
            args = tuple(self.argument(each) for each in node.args)
            kwargs = tuple((each.arg or "", self.argument(each.value)) for each in node.keywords)
        except _NotUnderstood:
            return None
        return workspace_of(LibraryCall(name, args, kwargs))

    def argument(self, node: ast.expr) -> Any:
        """An operand, a constant, or a tuple of these."""
        if isinstance(node, ast.Tuple | ast.List):
            return tuple(self.argument(item) for item in node.elts)
        if isinstance(node, ast.Constant):
            return node.value
        return self.layout(node) or self.number(node)

    def layout(self, node: ast.expr) -> Operand | None:
        """How the tensor that an expression names lies in the CPU's memory, as far as known."""
        if isinstance(node, ast.Name):
            return self.layouts.get(node.id)
        if isinstance(node, ast.Call) and _dotted(node.func) == "reinterpret_tensor" and len(node.args) > 2:
            whole = self.layout(node.args[0])
            if whole is not None:
                return Operand(self.sizes(node.args[1]), self.sizes(node.args[2]), whole.dtype)
        return None

    def result(self, value: ast.expr | None, outputs: list[str]) -> None:
        items = list(value.elts) if isinstance(value, ast.Tuple | ast.List) else []
        if len(items) != len(outputs):
            raise _NotUnderstood
        for item, name in zip(items, outputs, strict=True):
            base = item.id if isinstance(item, ast.Name) else _base_name(item)
            if base is not None and base in self.owner and name not in self.owner[base].values:
                self.owner[base].values.append(name)

    def strided_bytes(self, node: ast.Call) -> int:
        if len(node.args) < 3:
            raise _NotUnderstood
        size, stride = self.sizes(node.args[0]), self.sizes(node.args[1])
        dtype = SHORT_DTYPE.get(_dotted(node.args[2]).removeprefix("torch."))
        if dtype is None:
            raise _NotUnderstood
        if 0 in size:
            return 0
        return (1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))) * DTYPES[dtype][1]

    def sizes(self, node: ast.expr) -> tuple[int, ...]:
        if not isinstance(node, ast.Tuple | ast.List):
            raise _NotUnderstood
        return tuple(self.number(item) for item in node.elts)

    def number(self, node: ast.expr) -> int:
        """A size: a number, a known symbol, or arithmetic of these."""
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name) and node.id in self.symbols:
            return self.symbols[node.id]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -self.number(node.operand)
        if isinstance(node, ast.BinOp):
            left, right = self.number(node.left), self.number(node.right)
            for kind, apply in _ARITHMETIC:
                if isinstance(node.op, kind):
                    return apply(left, right)
        if isinstance(node, ast.Call) and _dotted(node.func) in ("max", "min") and not node.keywords:
            return (max if _dotted(node.func) == "max" else min)(*(self.number(item) for item in node.args))
        raise _NotUnderstood

    def bind_size(self, name: str, node: ast.Call) -> None:
        """Symbols keep the value the caller gave; a symbol without one makes sizes that use it not understood."""

    def memory(self) -> RegionMemory:
        count = len(self.kernels)
        if count == 0:
            return RegionMemory(kernels=(), buffers=())
        buffers = [
            RegionBuffer(
                name=storage.name,
                bytes=storage.bytes,
                first=min(storage.first, count - 1),
                last=min(max(storage.first, storage.last), count - 1),
                values=tuple(storage.values),
            )
            for storage in self.storages
        ]
        # Views of what a library call returned carry its name along.
        calls = {op for kernel in self.kernels if kernel.kind == "library" for op in kernel.ops}
        kernels = [
            kernel
            if kernel.kind == "library"
            else msgspec.structs.replace(kernel, ops=tuple(op for op in kernel.ops if op not in calls))
            for kernel in self.kernels
        ]
        return RegionMemory(kernels=tuple(kernels), buffers=tuple(buffers))


#: Op, position of its weight, and how many more times the weight it holds while it runs, where that cannot be measured:
#: a convolution reorders its weight to oneDNN's blocks, and its backward makes the weight's gradient in blocks, in
#: strides, and as it is asked for (watched in the allocator, torch 2.13, channels-last, a processor with AVX-512).
_REORDERS = (("convolution_backward", 2, 2), ("convolution", 1, 1))


def reordered_bytes(node: Node, table: TensorTable) -> int:
    """Bytes that the call which an op becomes holds for itself, as ``wrapper_memory`` counts them."""
    call = Call(node, table)
    for op, operand, copies in _REORDERS:
        if op in node.op:
            weight = call.tensor(operand)
            return copies * weight.storage if weight is not None else 0
    return 0


_ARITHMETIC: tuple[tuple[type[ast.operator], Callable[[int, int], int]], ...] = (
    (ast.Add, lambda a, b: a + b),
    (ast.Sub, lambda a, b: a - b),
    (ast.Mult, lambda a, b: a * b),
    (ast.FloorDiv, lambda a, b: a // b),
    (ast.Mod, lambda a, b: a % b),
)


def _base_name(node: ast.expr) -> str | None:
    """The buffer that an expression is a view of: ``b``, ``b[0]``, ``reinterpret_tensor(b, ...)``."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Subscript):
        return _base_name(node.value)
    if isinstance(node, ast.Call) and _dotted(node.func) in ("reinterpret_tensor", "alloc_from_pool") and node.args:
        return _base_name(node.args[0])
    return None


def _dotted(node: ast.expr) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        parts.append(node.id)
    return ".".join(reversed(parts))


def _cascade_workspace(node: ast.Call) -> int:
    """Bytes that a fused cascade's kernel holds for itself on a CPU, all threads together."""
    texts = [item.value for item in node.args if isinstance(item, ast.Constant) and isinstance(item.value, str)]
    found = _CASCADE.search(texts[0]) if texts else None
    if found is None:
        return 0
    import torch

    return int(found[1]) * torch.get_num_threads() + int(found[2]) + 64
