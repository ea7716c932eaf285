"""Context parallelism: a training step on one rank of a sequence that is split over devices.

The model is captured twice, for a whole sequence and for one part; ``runtime.context_parallel`` makes this rank's step
from the two. No edits to the model, and nothing in it is looked for by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from .errors import PipelineError
from .frontend.fx_import import from_fx
from .ir.graph import Graph
from .runtime.context_parallel.exchange import SequenceGroup
from .runtime.context_parallel.rewrite import part_of_step
from .runtime.pipeline.step_graph import StepGraph, export_step


def split_sequence(
    step: torch.nn.Module,
    arguments: Sequence[Any],
    parts: int,
    *,
    group: SequenceGroup | None = None,
    form: str = "ring",
    sequence: int | None = None,
) -> StepGraph:
    """The graph of this rank's part of ``step``, whose result is the loss: a cross-entropy of the tokens.

    Args:
        arguments: of one microbatch, whole sequences on every rank; tensors are cut in the dimensions (but the first)
            that have ``sequence`` tokens, by default the second dimension of the first table of integers.
        parts: ranks that share a sequence; ``group`` are these, None to look at the graph only.
        form: ``ring`` or ``tree``, see ``runtime.context_parallel.exchange``.

    Raises PipelineError naming what cannot be split.
    """
    tokens = sequence if sequence is not None else _tokens(arguments)
    if tokens % parts:
        raise PipelineError(
            f"{parts} ranks do not divide a sequence of {tokens} tokens", remedy="pad it, or choose a divisor for cp"
        )
    cut = tuple(_first_part(each, tokens, parts) for each in arguments)
    whole, part = export_step(step, tuple(arguments)), export_step(step, cut)
    return part_of_step(whole, part, parts, _import, group, form)


def _import(module: GraphModule) -> Graph:
    return from_fx(module, "attention", "inference")


def _tokens(arguments: Sequence[Any]) -> int:
    for each in arguments:
        if isinstance(each, torch.Tensor) and each.dim() == 2 and not each.is_floating_point():
            return int(each.shape[1])
    raise PipelineError("no input is a table of tokens", remedy="say how long the sequence is: sequence=...")


def _first_part(value: Any, tokens: int, parts: int) -> Any:
    if isinstance(value, torch.Tensor):
        for dimension in range(1, value.dim()):
            if value.shape[dimension] == tokens:
                value = value.narrow(dimension, 0, tokens // parts)
        value = value.contiguous()
    return value
