"""Statistics of nothing. Inductor's Welford reduction starts from mean 0, and over no elements that is what it returns,
where eager gives NaN (torch 2.13)."""

from __future__ import annotations

import operator

import torch
import torch.fx as fx

from .sizes import size_hint


def fill_empty_statistics(module: fx.GraphModule) -> None:
    """Rewrite in place, for an operand with a size of 0.

    rewrite: ``aten.var_mean.correction(x, dims)[i]`` -> ``aten.full(shape, nan)``
    """
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.var_mean.correction):
        operand = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
        if not isinstance(operand, torch.Tensor) or all(size_hint(size) != 0 for size in operand.shape):
            continue
        for part in list(node.users):
            if part.target is not operator.getitem:
                continue
            value = part.meta["val"]
            with module.graph.inserting_before(part):
                filled = module.graph.call_function(
                    torch.ops.aten.full.default,
                    (list(value.shape), float("nan")),
                    {"dtype": value.dtype, "device": value.device, "pin_memory": False},
                )
            filled.meta = dict(part.meta)
            part.replace_all_uses_with(filled)
            module.graph.erase_node(part)
