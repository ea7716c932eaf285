"""Which values of an FX graph share storage, and which ops write to it: from op schemas, else from the fake tensors."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch

from ..ir.graph import Alias

#: Ops whose result is a view although their schema does not say so.
_UNDECLARED_VIEWS = ("aten::_unsafe_view",)

#: Methods that move a tensor, or hand it on as it is where it already lies there: on which machine is no fact of the
#: graph's structure.
_MOVES = ("to", "cuda", "cpu")
_IN_PLACE_OPERATORS = frozenset(
    "setitem iadd isub imul itruediv ifloordiv imod ipow iand ior ixor imatmul ilshift irshift".split()
)


def node_aliases(gm: torch.fx.GraphModule, known: set[str]) -> Iterator[Alias]:
    """Facts in node order, each once; the base is an operand of the node. Only values in ``known`` are named."""
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        seen: dict[tuple[str, str], bool] = {}
        for base, writes in _facts(node):
            key = (node.name, base.name)
            if base.name in known and node.name in known and base is not node:
                seen[key] = seen.get(key, False) or writes
        for (name, base_name), writes in seen.items():
            yield Alias(name, base_name, writes)


def _facts(node: torch.fx.Node) -> Iterator[tuple[torch.fx.Node, bool]]:
    """(operand, whether it is written) for each operand that the node's value shares storage with or writes."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        yield from _schema_facts(node, target)
    elif target is operator.getitem:
        yield from _part_facts(node)
    elif isinstance(target, torch._ops.HigherOrderOperator):
        yield from _higher_order_facts(node, target)
    else:
        yield from _storage_facts(node)


def _schema_facts(node: torch.fx.Node, target: Any) -> Iterator[tuple[torch.fx.Node, bool]]:
    schema = target._schema
    returned = set()
    for result in schema.returns:
        returned |= _alias_sets(result)
    for index, parameter in enumerate(schema.arguments):
        value = node.args[index] if index < len(node.args) else node.kwargs.get(parameter.name)
        writes = parameter.alias_info is not None and parameter.alias_info.is_write
        sets = _alias_sets(parameter)
        # "Tensor(a -> *) self ... -> Tensor(a)[]": the parts of a returned list share storage with it.
        if writes or sets & returned or "*" in sets:
            for operand in _operands(value):
                yield operand, writes
    if schema.name in _UNDECLARED_VIEWS and isinstance(node.args[0], torch.fx.Node):
        yield node.args[0], False


def _alias_sets(parameter: Any) -> set[str]:
    info = parameter.alias_info
    return set() if info is None else set(info.before_set) | set(info.after_set)


def _part_facts(node: torch.fx.Node) -> Iterator[tuple[torch.fx.Node, bool]]:
    """A part of a list of views (split, unbind) shares storage with what was split."""
    source = node.args[0]
    if not isinstance(source, torch.fx.Node):
        return
    target = source.target
    if isinstance(target, torch._ops.OpOverload):
        returns = target._schema.returns
        number = node.args[1]
        index = number if isinstance(number, int) and len(returns) > 1 else 0
        if index < len(returns) and returns[index].alias_info is not None:
            yield source, False
    elif not isinstance(target, torch._ops.HigherOrderOperator):
        yield from _storage_facts(node)


def _higher_order_facts(node: torch.fx.Node, target: Any) -> Iterator[tuple[torch.fx.Node, bool]]:
    """User Triton kernels may write to any tensor that they are given."""
    if target.name() == "triton_kernel_wrapper_mutation":
        for operand in _operands(node.kwargs.get("kwargs")):
            if isinstance(_value(operand), torch.Tensor):
                yield operand, True


def _storage_facts(node: torch.fx.Node) -> Iterator[tuple[torch.fx.Node, bool]]:
    """Functions and methods without a schema (Dynamo's graphs): compare the fake tensors' storages."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op == "call_method" and name in _MOVES and _names_device(node):
        return
    if getattr(node.target, "__module__", "") == "_operator":
        in_place = name in _IN_PLACE_OPERATORS
    else:
        in_place = name.endswith("_") and not name.endswith("__")
    own = _storage(_value(node))
    for position, operand in enumerate(_operands((node.args, node.kwargs))):
        writes = in_place and position == 0
        if writes or (own is not None and own == _storage(_value(operand))):
            yield operand, writes


def _names_device(node: torch.fx.Node) -> bool:
    arguments = (*node.args[1:], *node.kwargs.values())
    return node.target != "to" or any(isinstance(value, torch.device | str) for value in arguments)


def _operands(value: Any) -> list[torch.fx.Node]:
    found: list[torch.fx.Node] = []
    torch.fx.node.map_arg(value, found.append)
    return found


def _value(node: torch.fx.Node) -> Any:
    return node.meta.get("val", node.meta.get("example_value"))


def _storage(value: Any) -> Any:
    while isinstance(value, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)  # inside vmap and the like
    if isinstance(value, torch.Tensor) and value.layout == torch.strided and not _is_wrapper(value):
        return value.untyped_storage()._cdata
    return None


def _is_wrapper(value: torch.Tensor) -> bool:
    """A tensor subclass that holds other tensors has no storage of its own."""
    return hasattr(type(value), "__tensor_flatten__")
