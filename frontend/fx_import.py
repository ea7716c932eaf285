"""FX graphs (Dynamo's, AOTAutograd's joint, forward, backward and inference graphs, torch.export's) -> ``ir.Graph``.

Every value keeps its FX name. Types come from the fake tensors that tracing leaves in ``node.meta``; nothing is run.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from ..errors import CaptureError
from ..ir.expressions import ExpressionError, canonical
from ..ir.graph import Alias, Argument, Graph, Location, Node, Ref, Symbol
from ..ir.types import (
    SHORT_DTYPE,
    NoneType,
    OpaqueType,
    ScalarType,
    Size,
    TensorType,
    TupleType,
    Type,
)
from .fx_aliases import node_aliases
from .fx_locations import forward_nodes, is_backward, node_location

__all__ = ["from_fx", "import_argument", "tensor_constants", "value_type"]


def from_fx(
    gm: torch.fx.GraphModule,
    name: str,
    phase: str,
    roles: Sequence[str] | None = None,
    saved: int = 0,
    forward: torch.fx.GraphModule | None = None,
) -> Graph:
    """The graph module as IR.

    args:
        phase: inference, forward, backward or joint.
        roles: role of each placeholder, in order; guessed from names and types when None.
        saved: of a forward graph, how many of the last outputs are kept for the backward.
        forward: for a backward graph, the forward graph module whose node names ``Node.forward`` shall carry.

    Raises ``CaptureError`` for a node that has no form in the IR.
    """
    numbers = forward_nodes(forward, "forward") if forward is not None else forward_nodes(gm, phase)
    return _Importer(gm, name, phase, numbers).run(roles, saved)


def tensor_constants(gm: torch.fx.GraphModule) -> dict[str, Any]:
    """Name -> tensor (or other object) of each ``constant`` that ``from_fx`` makes of this module, submodules included."""
    found: dict[str, Any] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            value = attribute(gm, str(node.target))
            if isinstance(value, torch.nn.Module):
                if isinstance(value, torch.fx.GraphModule):
                    found |= {f"{node.target}.{key}": inner for key, inner in tensor_constants(value).items()}
            else:
                found[str(node.target)] = value
    return found


def attribute(module: torch.nn.Module, path: str) -> Any:
    """The object at a dotted path below a module."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


@dataclass
class _Importer:
    gm: torch.fx.GraphModule
    name: str
    phase: str
    forward_names: Mapping[int, str]
    prefix: str = ""
    nodes: list[Node] = field(default_factory=list)
    outputs: tuple[Argument, ...] = ()
    aliases: list[Alias] = field(default_factory=list)
    subgraphs: dict[str, Graph] = field(default_factory=dict)
    #: get_attr nodes that name a subgraph -> its symbol.
    bodies: dict[str, Symbol] = field(default_factory=dict)
    body_names: dict[int, str] = field(default_factory=dict)

    def run(self, roles: Sequence[str] | None, saved: int) -> Graph:
        placeholders = [node for node in self.gm.graph.nodes if node.op == "placeholder"]
        if roles is not None and len(roles) != len(placeholders):
            raise CaptureError(
                f"{len(roles)} roles for the {len(placeholders)} inputs of graph {self.name}",
                remedy="give one role for each placeholder",
            )
        # FX lets a placeholder or get_attr stand anywhere; the IR lists inputs first.
        for index, node in enumerate(placeholders):
            self.nodes.append(self.input(node, roles[index] if roles is not None else _role(node, self.phase)))
        for node in self.gm.graph.nodes:
            self.visit(node)
        self.aliases.extend(node_aliases(self.gm, {node.name for node in self.nodes}))
        return Graph(
            name=self.name,
            phase=self.phase,
            nodes=tuple(self.nodes),
            outputs=self.outputs,
            saved=saved,
            subgraphs=self.subgraphs,
            aliases=tuple(self.aliases),
        )

    def input(self, node: torch.fx.Node, role: str) -> Node:
        location = node_location(node.meta)
        return Node(node.name, "input", type=_node_type(node), location=location, role=role)

    def visit(self, node: torch.fx.Node) -> None:
        if node.op == "placeholder":
            return
        if node.op == "output":
            returned = node.args[0]
            parts = returned if isinstance(returned, tuple | list) else (returned,)
            self.outputs = tuple(self.argument(part, node) for part in parts)
        elif node.op == "get_attr":
            self.get_attr(node)
        else:
            self.nodes.append(self.operation(node))

    def get_attr(self, node: torch.fx.Node) -> None:
        path = str(node.target)
        value = attribute(self.gm, path)
        if isinstance(value, torch.fx.GraphModule):
            self.bodies[node.name] = self.body(value, path)
            return
        value_type = _node_type(node) if _has_value(node) else value_type_of_attribute(value)
        constant = Node(node.name, "constant", (self.prefix + path,), type=value_type, location=node_location(node.meta))
        self.nodes.append(constant)

    def body(self, module: torch.fx.GraphModule, path: str) -> Symbol:
        """Import a submodule once; its symbol."""
        if id(module) not in self.body_names:
            name = path.replace(".", "_")
            while name in self.subgraphs:
                name += "_"
            importer = _Importer(module, name, self.phase, self.forward_names, f"{self.prefix}{path}.")
            self.subgraphs[name] = importer.run(None, 0)
            self.body_names[id(module)] = name
        return Symbol(f"@{self.body_names[id(module)]}")

    def operation(self, node: torch.fx.Node) -> Node:
        op = op_name(node, self.gm)
        args = tuple(self.argument(argument, node) for argument in node.args)
        kwargs = tuple((key, self.argument(value, node)) for key, value in node.kwargs.items())
        if op == "higher_order.invoke_subgraph" and len(args) >= 2 and isinstance(args[0], Symbol):
            # invoke_subgraph(body, identifier, operands...): the identifier only keys torch's own cache.
            op, args, kwargs = "call", (args[0], *args[2:]), ()
        elif node.op == "call_module":
            module = self.gm.get_submodule(str(node.target))
            if not isinstance(module, torch.fx.GraphModule) or kwargs:
                raise CaptureError(
                    f"the graph calls module {node.target} as a whole",
                    where=_place(node),
                    remedy="capture with inline_inbuilt_nn_modules (the default) or through AOTAutograd",
                )
            op, args = "call", (self.body(module, str(node.target)), *args)
        elif op == "_operator.getitem" and _is_part(node):
            op = "getitem"
        value_type = _node_type(node)
        if op == "call" and not isinstance(value_type, TupleType):
            value_type = self.subgraph_type(args[0])
        return Node(
            node.name,
            op,
            args,
            kwargs,
            value_type,
            _location(node),
            forward=self.forward_name(node),
        )

    def subgraph_type(self, target: Argument) -> Type:
        subgraph = self.subgraphs[target.text[1:]] if isinstance(target, Symbol) else None
        if subgraph is None:
            return OpaqueType("unknown")
        table = subgraph.by_name()
        items = [table[output.name].type if isinstance(output, Ref) else NoneType() for output in subgraph.outputs]
        return TupleType(tuple(item if item is not None else OpaqueType("unknown") for item in items))

    def forward_name(self, node: torch.fx.Node) -> str:
        number = node.meta.get("seq_nr")
        backward = self.phase == "backward" or (self.phase == "joint" and is_backward(node.meta))
        if not isinstance(number, int) or not backward:
            return ""
        return self.forward_names.get(number, "")

    def argument(self, argument: Any, node: torch.fx.Node) -> Argument:
        if isinstance(argument, torch.fx.Node):
            return self.bodies.get(argument.name) or Ref(argument.name)
        if isinstance(argument, tuple | list):
            items = tuple(self.argument(item, node) for item in argument)
            return (Symbol("list"), *items) if isinstance(argument, list) and _keeps_lists(node) else items
        if isinstance(argument, Mapping):
            pairs = ((self.argument(key, node), self.argument(value, node)) for key, value in argument.items())
            return (Symbol("dict"), *pairs)
        if isinstance(argument, slice):
            return (Symbol("slice"), *(self.argument(x, node) for x in (argument.start, argument.stop, argument.step)))
        try:
            return import_argument(argument)
        except (TypeError, ExpressionError) as error:
            raise CaptureError(
                f"argument {argument!r} of {node.name} ({node.target}) has no form in the IR: {error}",
                where=_place(node),
                remedy="keep this op out of the captured region",
            ) from error


# Arguments -----------------------------------------------------------------------------------------------------------


def import_argument(value: Any) -> Argument:
    """A plain constant argument. Raises TypeError for a class that has no form in the IR."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int) and type(value) is int:
        return value
    if isinstance(value, float | complex):
        return type(value)(value)
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return _symbolic(value)
    if isinstance(value, sympy.Basic):
        return canonical(value)  # type: ignore[arg-type, no-any-return]
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return Symbol(str(value))
    if isinstance(value, torch.device):
        return Symbol(f"device({value})")
    if value is Ellipsis:
        return Symbol("...")
    if isinstance(value, type):
        return Symbol(f"class {value.__module__}.{value.__qualname__}")
    if isinstance(value, torch.Generator):
        return Symbol(f"generator({value.device})")
    if isinstance(value, int):
        # An IntEnum or a bool-like subclass, such as torch's reduction and backend enumerations.
        return int(value)
    if callable(value) and getattr(value, "__name__", ""):
        return Symbol(f"function {qualified_name(value)}")
    if hasattr(value, "__name__") or hasattr(value, "__class__"):
        return Symbol(f"object {type(value).__module__}.{type(value).__qualname__}")
    raise TypeError(f"class {type(value).__name__}")


def _symbolic(value: Any) -> Any:
    """A SymInt, SymFloat or SymBool as a number or a canonical expression."""
    constant = value.node.maybe_as_int() if isinstance(value, torch.SymInt) else None
    return constant if constant is not None else canonical(value.node.expr)


# Types ---------------------------------------------------------------------------------------------------------------


def value_type(value: Any) -> Type:
    """Type of a fake (or real) value: tensors, numbers, tuples of these, None; anything else is opaque."""
    if isinstance(value, torch.Tensor):
        return _tensor_type(value)
    if isinstance(value, bool):
        return ScalarType("bool")
    if isinstance(value, int):
        return ScalarType("int", int(value))
    if isinstance(value, float):
        return ScalarType("float", sympy.Float(value))
    if isinstance(value, torch.SymInt):
        return ScalarType("int", _symbolic(value))
    if isinstance(value, torch.SymFloat):
        return ScalarType("float", _float_expression(value))
    if isinstance(value, torch.SymBool):
        return ScalarType("bool", _float_expression(value))
    if isinstance(value, tuple | list):
        return TupleType(tuple(value_type(item) for item in value))
    if value is None:
        return NoneType()
    return OpaqueType(f"{type(value).__module__}.{type(value).__qualname__}")


def value_type_of_attribute(value: Any) -> Type:
    """Type of what a get_attr node names."""
    return value_type(value)


def _float_expression(value: Any) -> Size | None:
    expression = canonical(value.node.expr)
    return sympy.Float(expression) if isinstance(expression, float) else expression


def _tensor_type(tensor: torch.Tensor) -> Type:
    dtype = SHORT_DTYPE.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None or tensor.layout != torch.strided:
        return OpaqueType(f"torch.Tensor({str(tensor.dtype).removeprefix('torch.')}, {tensor.layout})")
    shape = tuple(_size(size) for size in tensor.shape)
    return TensorType(dtype, shape, str(tensor.device), tuple(_size(stride) for stride in tensor.stride()))


def _size(size: Any) -> Size:
    if type(size) is int:
        return size
    return _symbolic(size)  # type: ignore[no-any-return]


def _has_value(node: torch.fx.Node) -> bool:
    return "val" in node.meta or "example_value" in node.meta


def _node_type(node: torch.fx.Node) -> Type:
    if "val" in node.meta:
        return value_type(node.meta["val"])
    if "example_value" in node.meta:
        return value_type(node.meta["example_value"])
    return OpaqueType("unknown") if node.users else NoneType()


def _role(node: torch.fx.Node, phase: str) -> str:
    """What an input is, guessed from AOTAutograd's names."""
    value = node.meta.get("val", node.meta.get("example_value"))
    if isinstance(value, int | float | torch.SymInt | torch.SymFloat | torch.SymBool):
        return "symbol"
    if str(node.target).startswith("tangents"):
        return "tangent"
    if "seed" in str(node.target) and "rng" in str(node.target):
        return "seed"
    if phase == "backward":
        return "saved"
    return "parameter" if isinstance(value, torch.nn.Parameter) else "input"


# Names ---------------------------------------------------------------------------------------------------------------


def op_name(node: torch.fx.Node, gm: torch.fx.GraphModule | None = None) -> str:
    """``aten.mm.default``, ``higher_order.cond``, ``_operator.add``, ``torch.nn.functional.silu``, ``method.view``."""
    target = node.target
    if node.op == "call_method":
        return f"method.{target}"
    if node.op == "call_module":
        return "call"
    namespace = getattr(target, "namespace", None)
    if isinstance(target, torch._ops.OpOverload):
        return f"{namespace}.{target._schema.name.split('::')[1]}.{target._overloadname}"
    if isinstance(target, torch._ops.OpOverloadPacket):
        return target._qualified_op_name.replace("::", ".")
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order.{target.name()}"
    return qualified_name(target)


def qualified_name(target: Any) -> str:
    """``module.name`` of a function; torch's built-ins, which do not say their module, are looked up."""
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", type(target).__name__)
    name = name.rsplit(".", 1)[-1].replace("<lambda>", "lambda")
    module = getattr(target, "__module__", None)
    if isinstance(module, str) and module:
        return f"{module}.{name}"
    for owner, prefix in ((torch, "torch"), (torch.Tensor, "torch.Tensor"), (operator, "_operator")):
        if getattr(owner, name, None) is target:
            return f"{prefix}.{name}"
    return f"unknown.{name}"


def _is_part(node: torch.fx.Node) -> bool:
    """Whether ``operator.getitem`` reads a part of a multi-output op, not elements of a tensor or list of sizes."""
    source = node.args[0]
    if not isinstance(source, torch.fx.Node) or type(node.args[1]) is not int:
        return False
    value_type = _node_type(source)
    if isinstance(value_type, TupleType):
        return 0 <= node.args[1] < len(value_type.items)
    # The type of an op without metadata is not known; only multi-output ops are indexed by a plain number there.
    return isinstance(value_type, OpaqueType) and value_type.name == "unknown"


def _keeps_lists(node: torch.fx.Node) -> bool:
    """Whether a list must stay a list: ``x[[0, 1]]`` is not ``x[0, 1]``. Ops with a schema take both."""
    return node.op == "call_method" or node.target in (operator.getitem, operator.setitem)


def _location(node: torch.fx.Node) -> Location:
    """A node's location. AOTAutograd writes mutated inputs back at the graph's end, without a trace: these copies stand
    where the value that they write was made."""
    location = node_location(node.meta)
    if not location.file and node.target is torch.ops.aten.copy_.default and isinstance(node.args[1], torch.fx.Node):
        return node_location(node.args[1].meta)
    return location


def _place(node: torch.fx.Node) -> str:
    location = node_location(node.meta)
    return f"{location.file}:{location.line}" if location.file else f"FX node {node.name}"
