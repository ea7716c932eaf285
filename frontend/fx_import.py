"""FX graphs (Dynamo's, AOTAutograd's joint, forward, backward and inference graphs, torch.export's) -> ``ir.Graph``.

Every value keeps its FX name. Types come from the fake tensors that tracing leaves in ``node.meta``; nothing is run.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import CaptureError
from ..ir.expressions import ExpressionError
from ..ir.fused_cascade import FusedCascade
from ..ir.graph import CASCADE_OP, Alias, Argument, Graph, Location, Node, Ref, Symbol
from ..ir.parser import parse_fused_cascade
from ..ir.types import NoneType, OpaqueType, TupleType, Type
from .fx_aliases import node_aliases
from .fx_locations import ForwardOps, is_backward, location_like, node_location
from .fx_values import import_argument, qualified_name, value_type

#: Functions whose string argument is a device type.
_NAMES_A_DEVICE = ("torch.amp.autocast_mode._enter_autocast",)
_DEVICE_NAME = re.compile(r"(cpu|cuda|xpu|mps|hip|mtia|meta)(:[0-9]+)?")

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
    origin = gm if phase == "joint" else forward
    return _Importer(gm, name, phase, None if origin is None else ForwardOps(origin)).run(roles, saved)


def tensor_constants(gm: torch.fx.GraphModule) -> dict[str, Any]:
    """Name -> tensor (or other object) of each ``constant`` that ``from_fx`` makes of a module and its submodules."""
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
    forward_ops: ForwardOps | None
    prefix: str = ""
    nodes: list[Node] = field(default_factory=list)
    outputs: tuple[Argument, ...] = ()
    aliases: list[Alias] = field(default_factory=list)
    subgraphs: dict[str, Graph] = field(default_factory=dict)
    cascades: dict[str, FusedCascade] = field(default_factory=dict)
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
            cascades=self.cascades,
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
            caller = next(iter(node.users), None)
            self.bodies[node.name] = self.body(value, path, caller)
            return
        found = _node_type(node) if _has_value(node) else value_type(value)
        location = node_location(node.meta)
        self.nodes.append(Node(node.name, "constant", (self.prefix + path,), type=found, location=location))

    def body(self, module: torch.fx.GraphModule, path: str, caller: torch.fx.Node | None) -> Symbol:
        """Import a submodule once; its symbol. ``caller`` is the first node that calls it."""
        if id(module) not in self.body_names:
            name = path.replace(".", "_")
            while name in self.subgraphs:
                name += "_"
            origin = module if self.phase == "joint" else self.forward_body(caller)
            ops = ForwardOps(origin) if isinstance(origin, torch.fx.GraphModule) else origin
            importer = _Importer(module, name, self.phase, ops, f"{self.prefix}{path}.")
            self.subgraphs[name] = importer.run(None, 0)
            self.body_names[id(module)] = name
        return Symbol(f"@{self.body_names[id(module)]}")

    def operation(self, node: torch.fx.Node) -> Node:
        op = op_name(node, self.gm)
        args = tuple(self.argument(argument, node) for argument in node.args)
        kwargs = tuple((key, self.argument(value, node)) for key, value in node.kwargs.items())
        if op in _NAMES_A_DEVICE or (node.op == "call_method" and node.target == "to"):
            args = tuple(_as_device(argument) for argument in args)
        kwargs = tuple((key, _as_device(value) if key == "device" else value) for key, value in kwargs)
        if op == CASCADE_OP:
            args = (self.cascade(str(node.args[0])), *args[1])  # type: ignore[misc]
        elif op == "higher_order.invoke_subgraph" and len(args) >= 2 and isinstance(args[0], Symbol):
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
            op, args = "call", (self.body(module, str(node.target), node), *args)
        elif op == "_operator.getitem" and _is_part(node):
            op = "getitem"
        found = _node_type(node)
        if op == "call" and not isinstance(found, TupleType):
            found = self.subgraph_type(args[0])
        forward, origin = self.provenance(node)
        location = _location(node)
        if forward and self.forward_ops is not None:
            location = location_like(location, self.forward_ops.nodes[forward].meta)
        return Node(node.name, op, args, kwargs, found, location, forward=forward, origin=origin)

    def cascade(self, text: str) -> Symbol:
        """The fused cascade that an op names by its text."""
        fused = parse_fused_cascade(text)
        for name, known in self.cascades.items():
            if known == fused:
                return Symbol(f"@{name}")
        name = f"cascade_{len(self.cascades)}"
        self.cascades[name] = fused
        return Symbol(f"@{name}")

    def subgraph_type(self, target: Argument) -> Type:
        subgraph = self.subgraphs[target.text[1:]] if isinstance(target, Symbol) else None
        if subgraph is None:
            return OpaqueType("unknown")
        table = subgraph.by_name()
        items = [table[output.name].type if isinstance(output, Ref) else NoneType() for output in subgraph.outputs]
        return TupleType(tuple(item if item is not None else OpaqueType("unknown") for item in items))

    def provenance(self, node: torch.fx.Node) -> tuple[str, str]:
        """``Node.forward`` and ``Node.origin``: a backward op's forward op, and whether it is that op again."""
        backward = self.phase == "backward" or (self.phase == "joint" and is_backward(node.meta))
        if self.forward_ops is None or not backward:
            return "", ""
        name = self.forward_names.get(node.name, "")
        return name, f"remat(%{name})" if name and self.forward_ops.repeats(node) else ""

    @functools.cached_property
    def forward_names(self) -> Mapping[str, str]:
        return {} if self.forward_ops is None else self.forward_ops.names_for(self.gm)

    def forward_body(self, caller: torch.fx.Node | None) -> ForwardOps | None:
        """The forward ops behind the body that a backward op calls."""
        if self.phase != "backward" or self.forward_ops is None or caller is None:
            return None
        return self.forward_ops.body_of(self.forward_names.get(caller.name, ""))

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


def _as_device(argument: Argument) -> Argument:
    """A device that is named by a string (``device="cuda"``) as every other device."""
    if isinstance(argument, str) and _DEVICE_NAME.fullmatch(argument):
        return Symbol(f"device({argument})")
    return argument


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
        return f"higher_order.{target.name()}"  # type: ignore[no-untyped-call]
    return qualified_name(target)


def _is_part(node: torch.fx.Node) -> bool:
    """Whether ``operator.getitem`` reads a part of a multi-output op, not elements of a tensor or list of sizes."""
    source = node.args[0]
    if not isinstance(source, torch.fx.Node) or type(node.args[1]) is not int:
        return False
    value = source.meta.get("val", source.meta.get("example_value"))
    if isinstance(value, tuple | list):  # the type of a layer's many outputs is not worked out again for each of them
        return 0 <= node.args[1] < len(value)
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
