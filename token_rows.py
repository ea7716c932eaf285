"""Which values of a joint graph can be computed for some tokens alone, and the ops that do so.

Tokens are the rows of the model's matrix products: the leading dimensions of a tensor whose sizes multiply to their
number (``[batch, length, width]`` or ``[batch * length, width]``). An op is *row-wise* where a row of its result
depends on that row of some operands, and on others as a whole (weights): pointwise ops, products with a weight,
reductions and softmax over later dimensions, views that leave the rows as they are.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree

from . import torch_internals
from .cost_model.op_classes import kind_of
from .passes.activation.token_shares import TokenRows

_aten = torch.ops.aten
#: Views that only regroup dimensions, if rows stay rows.
_REGROUPING = frozenset(
    {_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default, _aten.unsqueeze.default,
     _aten.squeeze.dim, _aten.squeeze.dims, _aten.squeeze.default}
)  # fmt: skip
_COPYING = frozenset(
    {_aten.clone.default, _aten._to_copy.default, torch.ops.prims.convert_element_type.default, _aten.alias.default,
     _aten.detach.default}
)  # fmt: skip
#: Ops over the dimensions that their second argument names.
_OVER_DIMENSIONS = frozenset(
    {_aten.sum.dim_IntList, _aten.mean.dim, _aten.amax.default, _aten.amin.default, _aten.var.correction,
     _aten.var_mean.correction, _aten.logsumexp.default, _aten._softmax.default, _aten._log_softmax.default}
)  # fmt: skip
#: Op -> which argument holds the rows of a product with a weight.
_PRODUCTS = {_aten.mm.default: 0, _aten.addmm.default: 1}


class RowGraph:
    """The row-wise ops of a joint graph. ``tokens``: number of rows, 0 where it has no matrix products."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        counted: Counter[int] = Counter()
        for node in gm.graph.nodes:
            if node.target in _PRODUCTS and (shape := shape_of(node)) is not None:
                counted[shape[0]] += math.prod(shape)
        self.tokens = max(counted, key=lambda rows: (counted[rows], rows), default=0)
        self._built: dict[tuple[fx.Node, int], fx.Node] = {}
        self._rows_read: dict[fx.Node, tuple[fx.Node, ...] | None] = {}

    def facts(self) -> TokenRows:
        """By name: which results are row-wise, and what ops read by rows."""
        by_rows: dict[str, frozenset[str]] = {}
        divisible: set[str] = set()
        for node in self.gm.graph.nodes:
            rows = self.rows_read(node)
            if rows is None or node.target in _REGROUPING or node.target is operator.getitem:
                continue
            bases = {base.name for base in map(self._base, rows) if base is not None}
            whole = {_source(other).name for other in node.all_input_nodes if other not in rows}
            by_rows[node.name] = frozenset(bases - whole)
            if shape_of(node) is not None:
                divisible.add(node.name)
        return TokenRows(self.tokens, by_rows, frozenset(divisible))

    def leading(self, node: fx.Node) -> int | None:
        """How many dimensions of a result are its rows; None where it has no rows, or they do not lie one by one."""
        shape = shape_of(node)
        if shape is None or not node.meta["val"].is_contiguous():
            return None
        rows = 1
        for count, size in enumerate(shape, 1):
            rows *= size
            if rows == self.tokens:
                return count
        return None

    def rows_read(self, node: fx.Node) -> tuple[fx.Node, ...] | None:
        """Operands that a row-wise op reads by rows; None for other ops."""
        if node not in self._rows_read:
            self._rows_read[node] = self._find_rows(node)
        return self._rows_read[node]

    def _find_rows(self, node: fx.Node) -> tuple[fx.Node, ...] | None:
        if node.op != "call_function" or self.tokens < 2:
            return None
        if node.target is operator.getitem:
            source = node.args[0]
            return (source,) if isinstance(source, fx.Node) and self._item_is_row_wise(source, node) else None
        own = self._result_rows(node)
        if own is None:
            return None
        if node.target in _REGROUPING or node.target in _OVER_DIMENSIONS:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            leading = self.leading(source)
            if leading is None:
                return None
            if node.target in _OVER_DIMENSIONS and (self._later_dimensions(node, source, leading) is None):
                return None
            return (source,)
        if node.target in _PRODUCTS:
            rows = node.args[_PRODUCTS[node.target]]
            bias = shape_of(node.args[0]) if node.target is _aten.addmm.default else ()
            fits = isinstance(rows, fx.Node) and self.leading(rows) == 1 and bias is not None and len(bias) <= 1
            return (rows,) if fits and isinstance(rows, fx.Node) else None
        pointwise = node.target in _COPYING or torch.Tag.pointwise in getattr(node.target, "tags", ())
        return self._broadcast(node, own) if pointwise else None

    def tail(self, node: fx.Node, start: int, at_hand: Collection[fx.Node]) -> fx.Node:
        """Nodes that compute the rows of a row-wise op from ``start`` on, ``[tokens - start, ...]``, from the same rows
        of what is ``at_hand`` (which is the same in all calls; the op's own result does not count)."""
        rows = self.rows_read(node)
        if rows is None:
            raise ValueError(f"{node} is not row-wise")
        return self._again(node, rows, start, at_hand)

    def _part(self, node: fx.Node, start: int, at_hand: Collection[fx.Node]) -> fx.Node:
        """The rows from ``start`` on of what such an op reads, each made once."""
        if (node, start) not in self._built:
            rows = None if node in at_hand else self.rows_read(node)
            made = self._sliced(node, start) if rows is None else self._again(node, rows, start, at_hand)
            self._built[node, start] = made
        return self._built[node, start]

    # --- which ops are row-wise

    def _result_rows(self, node: fx.Node) -> int | None:
        value = node.meta.get("val")
        if isinstance(value, tuple | list):
            return 0 if node.target in _OVER_DIMENSIONS else None
        return self.leading(node)

    def _item_is_row_wise(self, source: fx.Node, item: fx.Node) -> bool:
        return self.rows_read(source) is not None and self.leading(item) is not None

    def _later_dimensions(self, node: fx.Node, source: fx.Node, leading: int) -> list[int] | None:
        """The dimensions that an op goes over, counted in its operand's rows; None where rows are among them."""
        shape = shape_of(source)
        given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        if shape is None or given is None:
            return None
        dims = [given] if isinstance(given, int) else list(given)  # type: ignore[arg-type]
        known = [int(dim) % len(shape) for dim in dims if isinstance(dim, int)]
        return [dim - leading + 1 for dim in known] if known and all(dim >= leading for dim in known) else None

    def _broadcast(self, node: fx.Node, leading: int) -> tuple[fx.Node, ...] | None:
        shape = shape_of(node)
        assert shape is not None
        trailing = len(shape) - leading
        rows: list[fx.Node] = []
        for operand in node.all_input_nodes:
            own = shape_of(operand)
            if own is None:
                return None
            before = own[: max(0, len(own) - trailing)]
            if math.prod(before) == 1:
                continue
            if before != shape[:leading] or self.leading(operand) != leading:
                return None
            rows.append(operand)
        return tuple(rows) or None

    def _base(self, node: fx.Node) -> fx.Node | None:
        """What a view that leaves rows as they are is a view of; None for other views."""
        while node.target in _REGROUPING and self.rows_read(node) is not None:
            node = node.args[0]  # type: ignore[assignment]
        return node if _source(node) is node else None

    # --- the ops for some rows

    def _sliced(self, node: fx.Node, start: int) -> fx.Node:
        shape, leading = shape_of(node), self.leading(node)
        assert shape is not None and leading is not None
        rows = self._add(node, _aten.view.default, (node, [self.tokens, *shape[leading:]]))
        return self._add(node, _aten.slice.Tensor, (rows, 0, start, self.tokens))

    def _again(self, node: fx.Node, rows: tuple[fx.Node, ...], start: int, at_hand: Collection[fx.Node]) -> fx.Node:
        tails = {operand: self._part(operand, start, at_hand) for operand in rows}
        if node.target is operator.getitem:
            return self._add(node, operator.getitem, (next(iter(tails.values())), node.args[1]))
        leading = self.leading(rows[0])
        assert leading is not None
        shape = shape_of(node)
        if node.target in _REGROUPING:
            assert shape is not None
            own = self.leading(node)
            return self._add(node, _aten.view.default, (tails[rows[0]], [self.tokens - start, *shape[own:]]))
        if node.target in _OVER_DIMENSIONS:
            dims = self._later_dimensions(node, rows[0], leading)
            assert dims is not None
            given = node.args[1] if len(node.args) > 1 else node.kwargs["dim"]
            over = dims[0] if isinstance(given, int) else dims
            kwargs = {key: value for key, value in node.kwargs.items() if key != "dim"}
            return self._add(node, node.target, (tails[rows[0]], over, *node.args[2:]), kwargs)
        if node.target in _PRODUCTS:
            args = [tails.get(each, each) if isinstance(each, fx.Node) else each for each in node.args]
            return self._add(node, node.target, tuple(args), dict(node.kwargs))
        assert shape is not None
        trailing = len(shape) - leading

        def operand(value: Any) -> Any:
            if not isinstance(value, fx.Node):
                return value
            own = shape_of(value)
            if value in tails or own is None or len(own) <= trailing:
                return tails.get(value, value)
            return self._add(node, _aten.view.default, (value, list(own[len(own) - trailing :])))

        everything: Any = (node.args, node.kwargs)
        args, kwargs = torch.fx.map_arg(everything, operand)
        return self._add(node, node.target, args, kwargs)

    def _add(self, part_of: fx.Node, target: Any, args: Any, kwargs: dict[str, Any] | None = None) -> fx.Node:
        """A node before the graph's output, which computes a part of another one's result."""
        (output,) = self.gm.graph.find_nodes(op="output")
        with self.gm.graph.inserting_before(output):
            made = self.gm.graph.call_function(target, args, kwargs or {})
        made.meta = {key: value for key, value in part_of.meta.items() if key not in ("val", "tensor_meta")}
        values = torch.fx.map_arg((made.args, made.kwargs), lambda operand: operand.meta["val"])
        tensor = next(value for value in pytree.tree_leaves(values) if isinstance(value, torch.Tensor))
        made.meta["val"] = torch_internals.fake_result(lambda _: target(*values[0], **values[1]), tensor)
        return made


def shape_of(node: Any) -> tuple[int, ...] | None:
    """Sizes of a node's result; None where it is no tensor, or its sizes are not numbers."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor) or not all(isinstance(size, int) for size in value.shape):
        return None
    return tuple(value.shape)


def _source(node: fx.Node) -> fx.Node:
    """What a view is a view of, whatever it does."""
    while kind_of(str(node.target)) == "view" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node
