"""``ir.Graph`` -> ``torch.fx.GraphModule``, with fake tensors of the node types in ``meta["val"]``.

Running the module with real tensors gives what the FX graph gave that the graph was imported from.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch.fx.traceback import NodeSource

from ..errors import ExportError
from ..ir.graph import CASCADE_OP, Argument, Graph, Node, Ref, Symbol
from ..ir.types import ScalarType, TensorType, TupleType
from .cascade_op import cascade_text
from .fake_values import FakeValues
from .fx_targets import op_target

__all__ = ["export_argument", "to_fx"]


def to_fx(
    graph: Graph,
    fake_mode: Any = None,
    shape_env: Any = None,
    *,
    constants: Mapping[str, Any] | None = None,
    hints: Mapping[str, int] | None = None,
    calls: str = "invoke_subgraph",
    with_values: bool = True,
) -> torch.fx.GraphModule:
    """The graph as an FX graph module; its outputs are returned as a tuple.

    args:
        constants: name -> tensor of the graph's ``constant`` nodes.
        hints: example values of the size symbols, for ``shape_env``; 8 for those that are not named.
        calls: a ``call`` becomes ``invoke_subgraph`` (what Inductor takes) or a plain ``module`` call.
        with_values: leave fake tensors in ``meta["val"]``.

    Raises ``ExportError`` for an op that torch does not know or a constant that is not given.
    """
    if calls not in ("invoke_subgraph", "module"):
        raise ExportError(f"calls='{calls}' is not known", remedy="use 'invoke_subgraph' or 'module'")
    fakes = FakeValues(hints, fake_mode, shape_env) if with_values else None
    return _Exporter(graph, fakes, dict(constants or {}), calls).run()


class _Exporter:
    def __init__(self, graph: Graph, fakes: FakeValues | None, constants: dict[str, Any], calls: str) -> None:
        self.graph, self.fakes, self.constants, self.calls = graph, fakes, constants, calls
        self.root = torch.nn.Module()
        self.fx = torch.fx.Graph()
        self.values: dict[str, torch.fx.Node] = {}
        self.types = {node.name: node.type for node in graph.nodes if isinstance(node.type, TupleType)}
        self.sizes: dict[sympy.Symbol, torch.fx.Node] = {}
        #: Subgraph -> the attribute that holds it.
        self.bodies: dict[str, str] = {}

    def run(self) -> torch.fx.GraphModule:
        for name, subgraph in self.graph.subgraphs.items():
            attribute = self.bodies[name] = _identifier(name, set(self.bodies.values()))
            self.root.add_module(attribute, _Exporter(subgraph, self.fakes, self.constants, self.calls).run())
        for node in self.graph.nodes:
            made = self.node(node)
            self.values[node.name] = made
            self.describe(node, made)
        outputs = tuple(self.argument(output, None) for output in self.graph.outputs)
        result = self.fx.output(outputs)
        result.meta["val"] = tuple(
            output.meta.get("val") if isinstance(output, torch.fx.Node) else output for output in outputs
        )
        self.fx.lint()
        return torch.fx.GraphModule(self.root, self.fx, class_name=_identifier(self.graph.name, set()))

    def node(self, node: Node) -> torch.fx.Node:
        if node.op == "input":
            return self.create("placeholder", node.name, (), {}, node)
        if node.op == "constant":
            return self.constant(node)
        if node.op == CASCADE_OP:
            return self.cascade(node)
        args = [self.argument(argument, node) for argument in node.args]
        kwargs = {name: self.argument(value, node) for name, value in node.kwargs}
        if node.op == "call":
            return self.call(node, args)
        if node.op.startswith("method."):
            return self.create("call_method", tensor_method(node), tuple(args), kwargs, node)
        target = operator.getitem if node.op == "getitem" else op_target(node.op, _where(node))
        return self.create("call_function", target, tuple(args), kwargs, node)

    def call(self, node: Node, args: list[Any]) -> torch.fx.Node:
        body, *operands = args
        if self.calls == "module":
            self.fx.erase_node(body)
            return self.create("call_module", body.target, tuple(operands), {}, node)
        target = torch.ops.higher_order.invoke_subgraph
        return self.create("call_function", target, (body, str(body.target), *operands), {}, node)

    def cascade(self, node: Node) -> torch.fx.Node:
        name, *operands = node.args
        assert isinstance(name, Symbol)
        text = cascade_text(self.graph.cascades[name.text[1:]])
        arguments = (text, [self.argument(operand, node) for operand in operands])
        return self.create("call_function", torch.ops.effcc.cascade.default, arguments, {}, node)

    def constant(self, node: Node) -> torch.fx.Node:
        name = str(node.args[0])
        if name not in self.constants:
            raise ExportError(
                f"the tensor of constant '{name}' (%{node.name}) is not given",
                where=_where(node),
                remedy="pass it in constants={name: tensor}",
            )
        attribute = _identifier(name, set())
        while hasattr(self.root, attribute) and getattr(self.root, attribute) is not self.constants[name]:
            attribute += "_"
        value = self.constants[name]
        if isinstance(value, torch.nn.Parameter):
            self.root.register_parameter(attribute, value)
        elif isinstance(value, torch.Tensor):
            if not hasattr(self.root, attribute):
                self.root.register_buffer(attribute, value, persistent=False)
        else:
            setattr(self.root, attribute, value)
        return self.create("get_attr", attribute, (), {}, node)

    def create(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], node: Node
    ) -> torch.fx.Node:
        made: torch.fx.Node = self.fx.create_node(kind, target, args, kwargs, name=node.name)
        return made

    def describe(self, node: Node, made: torch.fx.Node) -> None:
        """Metadata as AOTAutograd leaves it: values, source lines, module path. ``from_node`` is what comments in
        generated code name."""
        if made.op == "call_function":
            made.meta["from_node"] = [NodeSource(made, "effcc")]
        if self.fakes is not None and node.type is not None:
            made.meta["val"] = self.part(node, made) if node.op == "getitem" else self.fakes.of(node.type)
        location = node.location
        if location.file:
            made.meta["stack_trace"] = (
                f'File "{location.file}", line {location.line}, in forward\n    {location.source}\n'
            )
        if location.module:
            made.meta["nn_module_stack"] = {location.module: (location.module, torch.nn.Module)}
        if node.op == "input":
            self.remember_sizes(node, made)

    def part(self, node: Node, made: torch.fx.Node) -> Any:
        """The value of a part is the same object as in the whole, as AOTAutograd leaves it."""
        assert self.fakes is not None
        source, index = made.args[0], made.args[1]
        whole = source.meta.get("val") if isinstance(source, torch.fx.Node) else None
        whole_type = self.types.get(node.args[0].name) if isinstance(node.args[0], Ref) else None
        known = isinstance(whole, tuple) and isinstance(whole_type, TupleType) and isinstance(index, int)
        if known and whole_type.items[index] == node.type:  # type: ignore[union-attr, index]
            return whole[index]  # type: ignore[index]
        return self.fakes.of(node.type)

    def remember_sizes(self, node: Node, made: torch.fx.Node) -> None:
        """Inputs from which a size symbol can be read: numbers, and dimensions of tensors."""
        if isinstance(node.type, ScalarType) and isinstance(node.type.value, sympy.Symbol):
            self.sizes.setdefault(node.type.value, made)

    # Arguments --------------------------------------------------------------------------------------------------------

    def argument(self, argument: Argument, node: Node | None) -> Any:
        if isinstance(argument, Ref):
            return self.values[argument.name]
        if isinstance(argument, tuple):
            return self.sequence(argument, node)
        if isinstance(argument, Symbol):
            return self.subgraph(argument) if argument.text.startswith("@") else export_argument(argument, node)
        if isinstance(argument, sympy.Basic):
            return self.expression(argument, node)
        return argument

    def sequence(self, items: tuple[Argument, ...], node: Node | None) -> Any:
        head = items[0].text if items and isinstance(items[0], Symbol) else ""
        if head == "dict":
            pairs = [item for item in items[1:] if isinstance(item, tuple) and len(item) == 2]
            return {self.argument(key, node): self.argument(value, node) for key, value in pairs}
        if head == "slice":
            return slice(*(self.argument(item, node) for item in items[1:]))
        if head == "list":
            return [self.argument(item, node) for item in items[1:]]
        return tuple(self.argument(item, node) for item in items)

    def subgraph(self, symbol: Symbol) -> torch.fx.Node:
        name = symbol.text[1:]
        if name not in self.bodies:
            raise ExportError(
                f"there is no subgraph @{name} in graph @{self.graph.name}", remedy="verify the graph first"
            )
        return self.fx.get_attr(self.bodies[name])

    def expression(self, expression: sympy.Basic, node: Node | None) -> Any:
        """A size computed from the graph's inputs, with Python operators."""
        if isinstance(expression, sympy.Integer):
            return int(expression)
        if isinstance(expression, sympy.Float | sympy.Rational):
            return float(expression)
        if isinstance(expression, sympy.Symbol):
            return self.size_symbol(expression, node)
        arguments = [self.expression(argument, node) for argument in expression.args]
        function = _SIZE_OPERATORS.get(type(expression).__name__)
        if function is None:
            raise ExportError(
                f"the size {expression} uses {type(expression).__name__}, which cannot be computed in the graph",
                where=_where(node),
                remedy="pass the size as an input of the graph",
            )
        result = arguments[0]
        for argument in arguments[1:]:
            result = self.fx.call_function(function, (result, argument))
        return result

    def size_symbol(self, symbol: sympy.Symbol, node: Node | None) -> Any:
        if symbol not in self.sizes:
            for source in self.graph.inputs:
                if isinstance(source.type, TensorType) and symbol in source.type.shape:
                    dimension = source.type.shape.index(symbol)
                    size = torch.ops.aten.sym_size.int
                    self.sizes[symbol] = self.fx.call_function(size, (self.values[source.name], dimension))
                    if self.fakes is not None:
                        self.sizes[symbol].meta["val"] = self.fakes.size(symbol)
                    break
            else:
                raise ExportError(
                    f"no input of graph @{self.graph.name} has the size {symbol}",
                    where=_where(node),
                    remedy="pass the size as an input of the graph",
                )
        return self.sizes[symbol]


_SIZE_OPERATORS: dict[str, Any] = {
    "Add": operator.add, "Mul": operator.mul, "Pow": operator.pow, "PowByNatural": operator.pow,
    "FloorDiv": operator.floordiv, "CleanDiv": operator.floordiv, "Mod": operator.mod, "PythonMod": operator.mod,
    "Max": torch.sym_max, "Min": torch.sym_min, "IntTrueDiv": operator.truediv, "FloatTrueDiv": operator.truediv,
}  # fmt: skip


def export_argument(symbol: Symbol, node: Node | None = None) -> Any:
    """The torch constant that a symbol names. Raises ``ExportError`` where it has none outside of its process."""
    text = symbol.text
    if text.startswith("torch."):
        value = getattr(torch, text.removeprefix("torch."), None)
        if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
            return value
    elif text.startswith("device(") and text.endswith(")"):
        try:
            return torch.device(text[len("device(") : -1])
        except RuntimeError as error:
            raise ExportError(f"{text} is not a device", where=_where(node), remedy="name one, as cuda:0") from error
    elif text == "...":
        return ...
    raise ExportError(
        f"'{text}' has no value here",
        where=_where(node),
        remedy="ops with such arguments run only from the graph that they were captured in",
    )


def _where(node: Node | None) -> str:
    if node is None or not node.location.file:
        return ""
    return f"{node.location.file}:{node.location.line}"


def _identifier(name: str, taken: set[str]) -> str:
    """A Python identifier like ``name`` that is not taken."""
    cleaned = "".join(c if c.isalnum() and c.isascii() else "_" for c in name)
    cleaned = cleaned if cleaned and not cleaned[0].isdigit() else f"graph_{cleaned}"
    while cleaned in taken:
        cleaned += "_"
    return cleaned


#: Methods that reach outside of the tensor: files, other processes, the module system.
_REACH_OUT = frozenset(
    ("from_file", "share_memory_", "module_load", "register_hook", "to_mkldnn", "storage", "untyped_storage")
)


def tensor_method(node: Node) -> str:
    """The method of torch.Tensor that a ``method.name`` op calls. Raises ExportError for what text must not call."""
    name = node.op.removeprefix("method.")
    if name.startswith("_") or name in _REACH_OUT or not callable(getattr(torch.Tensor, name, None)):
        raise ExportError(
            f"%{node.name} = {node.op} is no method of tensors that a graph may call",
            remedy="Write it as the aten op that it stands for.",
        )
    return name
