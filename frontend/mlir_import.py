"""A ``.mlir`` file in torch-mlir's ``torch`` dialect as the input of ``effcc plan``.

Each function becomes a graph: its ops are called on fake tensors, which gives strides and aliasing that MLIR does not
write down, and the FX graph so made is decomposed and goes the way of every other. Functions ``forward_N`` and
``backward_N``, as ``--emit mlir`` writes them, are taken for a training step. Sizes must be known.
"""

from __future__ import annotations

import linecache
import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ..errors import CaptureError, ModelFileError
from .mlir import torch_mlir

__all__ = ["MlirFunction", "read_mlir"]

_TENSOR = re.compile(r"!torch\.v?tensor<\[([^\]]*)\],\s*([^>]+(?:<[^>]*>)?)>")
_AT = re.compile(r'"([^"]+)":(\d+)')
_NAMED = re.compile(r'loc\("(parameter|buffer|input|saved|tangent|seed|symbol) ([^"]*)"\)')
_DTYPES = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
    "si64": torch.int64, "si32": torch.int32, "si16": torch.int16, "si8": torch.int8, "ui8": torch.uint8,
    "i1": torch.bool, "complex<f32>": torch.complex64, "complex<f64>": torch.complex128,
    "f8E4M3FN": torch.float8_e4m3fn, "f8E5M2": torch.float8_e5m2,
}  # fmt: skip
#: Ops that only convert between value and tensor semantics.
_TRANSPARENT = ("torch.copy.to_vtensor", "torch.copy.to_tensor", "torch.tensor_static_info_cast")


@dataclass(frozen=True)
class MlirFunction:
    """``roles`` and ``paths`` of the inputs as the file says them; "input" and "" where it does not."""

    name: str
    gm: torch.fx.GraphModule
    roles: tuple[str, ...]
    paths: tuple[str, ...]


def read_mlir(path: Path) -> list[MlirFunction]:
    """The functions of a file. Raises MissingExtraError without torch-mlir, ModelFileError for a file that is not in
    the torch dialect, CaptureError for an op or size that has no form here."""
    torch_mlir("an .mlir model file")
    from torch_mlir import ir
    from torch_mlir.dialects import torch as dialect

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path.name} cannot be read: {error}", where=str(path)) from None
    context = ir.Context()
    dialect.register_dialect(context)
    try:
        module = ir.Module.parse(text, context)
    except ir.MLIRError as error:
        first = next((line.strip() for line in str(error).splitlines() if "error" in line.lower()), str(error))
        raise ModelFileError(
            f"{path.name} is not MLIR that torch-mlir reads: {first}",
            where=str(path),
            remedy="Give it a module in the torch dialect, as `effcc plan --emit mlir` writes it.",
        ) from None
    functions = [op for op in module.body.operations if op.operation.name == "func.func"]
    if not functions:
        raise ModelFileError(f"{path.name} holds no function", where=str(path))
    return [_Reader(path).read(function) for function in functions]


@dataclass
class _Reader:
    path: Path
    graph: torch.fx.Graph = field(default_factory=torch.fx.Graph)
    #: MLIR value -> FX node, or a plain constant.
    values: dict[Any, Any] = field(default_factory=dict)
    fake_mode: FakeTensorMode = field(default_factory=FakeTensorMode)

    def read(self, function: Any) -> MlirFunction:
        name = str(function.attributes["sym_name"]).strip('"')
        roles, paths = [], []
        block = function.regions[0].blocks[0]
        for index, argument in enumerate(block.arguments):
            node = self.graph.placeholder(f"arg{index}")
            node.meta["val"] = self.fake(str(argument.type), argument.location)
            self.values[argument] = node
            found = _NAMED.match(str(argument.location))
            roles.append(found[1] if found else "input")
            paths.append(found[2] if found and found[1] in ("parameter", "buffer") else "")
        # Weights inside of the file are parameters like all others; their values are not read.
        literals = [op.operation for op in block.operations if op.operation.name == "torch.vtensor.literal"]
        for index, literal in enumerate(literals):
            node = self.graph.placeholder(f"literal{index}")
            node.meta["val"] = self.fake(str(literal.results[0].type), literal.location)
            self.values[literal.results[0]] = node
            roles.append("parameter")
            paths.append(f"literal{index}")
        for op in block.operations:
            self.operation(op.operation)
        return MlirFunction(name, self.decomposed(), tuple(roles), tuple(paths))

    def decomposed(self) -> torch.fx.GraphModule:
        """The graph in the ops that every capture consists of."""
        from torch._inductor.decomposition import select_decomp_table

        written = torch.fx.GraphModule(torch.nn.Module(), self.graph)
        inputs = [node.meta["val"] for node in self.graph.find_nodes(op="placeholder")]
        with self.fake_mode, torch.fx.traceback.preserve_node_meta():
            trace = make_fx(torch.fx.Interpreter(written).run, decomposition_table=select_decomp_table())
            return trace(*inputs)

    def fake(self, kind: str, location: Any) -> torch.Tensor:
        found = _TENSOR.fullmatch(kind)
        sizes = [size.strip() for size in found[1].split(",")] if found and found[1].strip() else []
        if found is None or found[2] not in _DTYPES:
            raise self.error(f"type {kind} is not of the torch dialect", location, "Lower the module no further.")
        if "?" in sizes:
            raise self.error(f"type {kind} has an unknown size", location, "Export with static sizes.")
        with self.fake_mode:
            return torch.empty([int(size) for size in sizes], dtype=_DTYPES[found[2]])

    def operation(self, op: Any) -> None:
        name: str = op.name
        operands = [self.values[operand] for operand in op.operands]
        if name in ("func.return", "return"):
            self.graph.output(tuple(operands))
        elif name.startswith("torch.constant."):
            self.values[op.results[0]] = self.constant(op)
        elif name in ("torch.prim.ListConstruct", "torch.prim.TupleConstruct"):
            self.values[op.results[0]] = operands
        elif name in _TRANSPARENT:
            self.values[op.results[0]] = operands[0]
        elif name.startswith("torch.prim.NumToTensor"):
            dtype = self.fake(str(op.results[0].type), op.location).dtype
            self.values[op.results[0]] = self.call(op, torch.ops.aten.scalar_tensor.default, operands, {"dtype": dtype})
        elif name == "torch.vtensor.literal":
            pass  # an input already
        elif name == "torch.prim.ListUnpack":
            for index, result in enumerate(op.results):
                self.values[result] = self.part(op, operands[0], index)
        elif name == "torch.overwrite.tensor.contents":
            self.call(op, torch.ops.aten.copy_.default, (operands[1], operands[0]), {})
        else:
            target = self.target(op)
            args, kwargs = _arguments(target, operands)
            self.results(op, self.call(op, target, args, kwargs))

    def constant(self, op: Any) -> Any:
        if op.name == "torch.constant.none":
            return None
        value = op.attributes["value"].value
        return torch.device(value) if op.name == "torch.constant.device" else value

    def target(self, op: Any) -> Any:
        """``torch.aten.add.Tensor`` or ``torch.operator "torch.mylib.f"`` -> the overload."""
        name = str(op.attributes["name"]).strip('"') if op.name == "torch.operator" else op.name
        parts = name.removeprefix("torch.").split(".")
        if len(parts) in (2, 3):
            packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
            overload = getattr(packet, parts[2] if len(parts) == 3 else "default", None)
            if isinstance(overload, torch._ops.OpOverload):
                return overload
        raise self.error(f"op {name} has no form here", op.location, "Lower it to ATen ops first.")

    def call(self, op: Any, target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.fx.Node:
        args = tuple(args)
        node = self.graph.call_function(target, args, kwargs)
        node.meta["stack_trace"] = _stack_trace(op.location)

        def value(argument: torch.fx.Node) -> Any:
            return argument.meta["val"]

        try:
            with self.fake_mode:
                called = torch.fx.node.map_arg((args, kwargs), value)
                node.meta["val"] = target(*called[0], **called[1])
        except Exception as error:  # a file may call an op with anything
            raise self.error(f"{target} cannot be called as the file does: {error}", op.location) from error
        return node

    def results(self, op: Any, node: torch.fx.Node) -> None:
        results = list(op.results)
        if len(results) == 1:
            self.values[results[0]] = node
            return
        for index, result in enumerate(results):
            self.values[result] = self.part(op, node, index)

    def part(self, op: Any, whole: Any, index: int) -> Any:
        """One of several results, or of a list."""
        if not isinstance(whole, torch.fx.Node):
            return whole[index]
        part = self.graph.call_function(operator.getitem, (whole, index))
        part.meta.update(val=whole.meta["val"][index], stack_trace=_stack_trace(op.location))
        return part

    def error(self, message: str, location: Any, remedy: str = "") -> CaptureError:
        places = _AT.findall(str(location))
        where = f"{places[0][0]}:{places[0][1]}" if places else str(self.path)
        return CaptureError(f"{self.path.name}: {message}", where=where, remedy=remedy)


def _arguments(target: Any, operands: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Operands in the schema's order as FX writes a call: keyword-only arguments by name, defaults left out."""
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for parameter, operand in zip(target._schema.arguments, operands, strict=False):
        value = _enumerated(str(parameter.real_type), operand)
        if not parameter.kwarg_only:
            positional.append(value)
        elif not parameter.has_default_value() or value != parameter.default_value:
            named[parameter.name] = value
    parameters = [parameter for parameter in target._schema.arguments if not parameter.kwarg_only]
    while positional and _is_default(parameters[len(positional) - 1], positional[-1]):
        positional.pop()
    return tuple(positional), named


def _is_default(parameter: Any, value: Any) -> bool:
    if isinstance(value, torch.fx.Node) or not parameter.has_default_value():
        return False
    return type(value) is type(parameter.default_value) and bool(value == parameter.default_value)


def _enumerated(kind: str, value: Any) -> Any:
    """MLIR writes dtypes, layouts and memory formats as numbers."""
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    from torch_mlir.extras import fx_importer

    for name, table in (
        ("ScalarType", fx_importer.TORCH_DTYPE_TO_INT),
        ("Layout", fx_importer.TORCH_LAYOUT_TO_INT),
        ("MemoryFormat", fx_importer.TORCH_MEMORY_FORMAT_TO_INT),
    ):
        if name in kind:
            return next((key for key, number in table.items() if number == value), value)
    return value


def _stack_trace(location: Any) -> str:
    """The source lines of a location, as torch writes a stack: outermost first."""
    lines = []
    for file, number in reversed(list(_places(str(location)))):
        lines.append(f'  File "{file}", line {number}, in forward\n    {linecache.getline(file, number).strip()}\n')
    return "".join(lines)


def _places(location: str) -> Iterator[tuple[str, int]]:
    for file, line in _AT.findall(location):
        yield file, int(line)
