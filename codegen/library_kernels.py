"""Choose the library of each matrix product: BLAS (``aten.mm``) or oneDNN, by measurement.

On some machines they differ by a factor of two in float32 (an AMD EPYC with AVX-512 runs MKL at 215 GFLOP/s and oneDNN
at 480 on two cores), and neither always wins, so the candidates are timed for each distinct product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, TypeGuard

import torch
import torch.fx as fx

from .sizes import same_size, size_hint, size_hints

#: m, k, n, strides of the left operand, strides of the right operand.
Product: TypeAlias = tuple[int, int, int, tuple[int, int], tuple[int, int]]
#: Product -> "onednn" or "blas".
GemmChoice: TypeAlias = Callable[[int, int, int, tuple[int, int], tuple[int, int]], str]

_aten = torch.ops.aten


@torch.library.custom_op("effcc::onednn_linear", mutates_args=(), device_types="cpu")
def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ weight.t() + bias`` by oneDNN, float32, any strides. x: [m, k], weight: [n, k], bias: [n]."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


@onednn_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def use_library_kernels(module: fx.GraphModule, choose: GemmChoice) -> dict[str, str]:
    """Rewrite ``mm`` and ``addmm`` in place where oneDNN is chosen. Returns node name -> library.

    rewrite: ``aten.mm(a, b)`` -> ``effcc.onednn_linear(a, aten.permute(b, [1, 0]), None)``
    """
    chosen: dict[str, str] = {}
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target not in (_aten.mm.default, _aten.addmm.default):
            continue
        parts = product_parts(node)
        if parts is None:
            continue
        left, right, bias = parts
        sizes = product_of(left, right)
        if sizes is None:
            continue
        library = choose(*sizes)
        chosen[node.name] = library
        if library != "onednn":
            continue
        with module.graph.inserting_before(node):
            weight = transposed(module.graph, right)
            product = module.graph.call_function(torch.ops.effcc.onednn_linear.default, (left, weight, bias))
            product.meta = dict(node.meta)
        node.replace_all_uses_with(product)
        module.graph.erase_node(node)
    if chosen:
        module.graph.eliminate_dead_code()
        module.recompile()
    return chosen


def measure_products(module: fx.GraphModule, choose: GemmChoice) -> None:
    """Have all products of a forward measured, and those that its backward will have, while the processor is free of
    the compilers that are about to be started."""
    for body in [item for item in module.modules() if isinstance(item, fx.GraphModule)]:
        for target in (_aten.mm.default, _aten.addmm.default):
            for node in body.graph.find_nodes(op="call_function", target=target):
                parts = product_parts(node)
                product = product_of(parts[0], parts[1]) if parts is not None else None
                if product is None:
                    continue
                m, k, n, left, right = product
                choose(*product)
                # The operands' gradients: dy @ b.t(), and a.t() @ dy or its transpose, as the weight lies.
                choose(m, n, k, (n, 1), (right[1], right[0]))
                if right[0] == 1:
                    choose(n, m, k, (1, n), left)
                else:
                    choose(k, m, n, (left[1], left[0]), (n, 1))


def product_of(left: fx.Node, right: fx.Node) -> Product | None:
    a, b = left.meta["val"], right.meta["val"]
    sizes = size_hints((a.shape[0], a.shape[1], b.shape[1], *a.stride(), *b.stride()))
    if sizes is None:
        return None
    m, k, n, *steps = sizes
    return m, k, n, (steps[0], steps[1]), (steps[2], steps[3])


def product_parts(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """Left, right and bias of a product that oneDNN can run: float32 on CPU, nothing empty, a plain row bias."""
    if node.target is _aten.mm.default:
        left, right = node.args
        bias = None
    else:
        if node.kwargs or len(node.args) != 3:
            return None
        bias, left, right = node.args
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    values = [left.meta.get("val"), right.meta.get("val"), node.meta.get("val")]
    if isinstance(bias, fx.Node):
        values.append(bias.meta.get("val"))
    tensors = [value for value in values if runs_in_onednn(value)]
    if len(tensors) < len(values):
        return None
    _, weight, result, *row = tensors
    if any(one.dim() != 1 or not same_size(one.shape[0], weight.shape[1]) for one in row):
        return None
    if not same_size(result.stride(), (result.shape[1], 1)):
        return None
    return left, right, bias if isinstance(bias, fx.Node) else None


def runs_in_onednn(value: object) -> TypeGuard[torch.Tensor]:
    """Whether the value of a node is a float32 tensor on CPU that is not empty."""
    return (
        isinstance(value, torch.Tensor)
        and value.dtype == torch.float32
        and value.device.type == "cpu"
        and all(size_hint(size) not in (0, None) for size in value.shape)
    )


def transposed(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """``node`` transposed, without a second transposition where it is one already."""
    if node.target is _aten.permute.default and list(node.args[1]) in ([1, 0], [-1, -2]):  # type: ignore[arg-type]
        return node.args[0]  # type: ignore[return-value]
    result = graph.call_function(_aten.permute.default, (node, [1, 0]))
    result.meta = {"val": node.meta["val"].permute(1, 0)}
    if "stack_trace" in node.meta:
        result.meta["stack_trace"] = node.meta["stack_trace"]
    return result
