"""A captured training step's graph, and its vocabulary layers: where the input is looked up and the loss is taken.

The graph is ``torch.export``'s, before autograd: differentiable ATen ops, parameters and buffers as inputs, the loss as
the output. Nothing is asked of the model's code; what is looked for are two ops: an ``embedding`` of an input's
indices, and a ``linear`` whose rows go to ``cross_entropy_loss`` and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ...errors import PipelineError
from ...formatting import first_line

aten = torch.ops.aten
#: Ops that move rows about and leave the last dimension alone (where their arguments do).
_ROW_OPS = (
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.alias.default, aten.slice.Tensor,
    aten.contiguous.default, aten.clone.default, aten.unsqueeze.default,
)  # fmt: skip
_IGNORED = (aten._assert_tensor_metadata.default,)


@dataclass(frozen=True)
class StepGraph:
    """``parameters`` and ``buffers``: placeholder -> path in the model; ``inputs``: placeholders of what the step is
    called with, in order; ``constants``: placeholder -> tensor."""

    module: GraphModule
    parameters: Mapping[str, str]
    buffers: Mapping[str, str]
    inputs: tuple[str, ...]
    constants: Mapping[str, torch.Tensor]

    @property
    def nodes(self) -> list[Node]:
        return [node for node in self.module.graph.nodes if node.target not in _IGNORED]

    @property
    def result(self) -> Node:
        """The step's one output, the loss."""
        output = next(node for node in self.module.graph.nodes if node.op == "output")
        results = output.args[0]
        if not isinstance(results, list | tuple) or len(results) != 1 or not isinstance(results[0], Node):
            raise PipelineError("the step returns more than its loss", remedy="return the loss alone")
        return results[0]


@dataclass(frozen=True)
class LossHead:
    """The loss is ``cross_entropy_loss`` of the rows ``rows`` and the targets ``targets``."""

    node: Node
    rows: Node
    targets: Node
    ignore_index: int
    label_smoothing: float
    mean: bool


@dataclass(frozen=True)
class OutputHead:
    """The logits are ``linear(hidden, weight)``; ``moved`` are the ops between them and the loss, in order."""

    loss: LossHead
    linear: Node
    hidden: Node
    weight: str
    moved: tuple[Node, ...]
    size: int


@dataclass(frozen=True)
class InputHead:
    """``node`` looks up rows of ``weight`` for the indices ``indices``; no gradient goes to row ``padding``."""

    node: Node
    indices: Node
    weight: str
    size: int
    padding: int


def export_step(step: torch.nn.Module, arguments: tuple[Any, ...]) -> StepGraph:
    """The graph of ``step(*arguments)``, whose result is the loss. ``arguments`` are those of one microbatch. Raises
    PipelineError when torch cannot export it."""
    try:
        with torch.enable_grad():
            program = torch.export.export(step, arguments, strict=False)
    except (RuntimeError, ValueError, TypeError) as error:  # what torch.export raises is one of these
        raise PipelineError(
            f"the step cannot be exported: {first_line(error)}", remedy="see torch.export for what it asks"
        ) from error
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        name = next(iter({**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}.values()))
        raise PipelineError(
            f"the step writes into {name}, which microbatches would share", remedy="keep buffers as they are"
        )
    constants = {name: program.constants[path] for name, path in signature.inputs_to_lifted_tensor_constants.items()}
    return StepGraph(
        program.graph_module,
        dict(signature.inputs_to_parameters),
        dict(signature.inputs_to_buffers),
        tuple(name for name in signature.user_inputs if isinstance(name, str)),
        constants,
    )


def loss_head(graph: StepGraph) -> LossHead | None:
    """The loss, where it is a cross-entropy; None for another."""
    node = graph.result
    if node.target is not aten.cross_entropy_loss.default:
        return None
    given = dict(
        zip(("self", "target", "weight", "reduction", "ignore_index", "label_smoothing"), node.args, strict=False)
    )
    given |= node.kwargs
    if given.get("weight") is not None or given.get("reduction", 1) not in (1, 2):
        return None
    rows, targets = given["self"], given["target"]
    if not isinstance(rows, Node) or not isinstance(targets, Node) or targets.meta["val"].is_floating_point():
        return None
    ignore = given.get("ignore_index", -100)
    smoothing = given.get("label_smoothing", 0.0)
    assert isinstance(ignore, int) and isinstance(smoothing, float)
    return LossHead(node, rows, targets, ignore, smoothing, bool(given.get("reduction", 1) == 1))


def output_head(graph: StepGraph) -> OutputHead:
    """The output layer. Raises PipelineError saying why it cannot be sharded."""
    loss = loss_head(graph)
    if loss is None:
        raise PipelineError(
            "the output layer cannot be sharded: the step's result is not a cross-entropy of class indices",
            remedy="return torch.nn.functional.cross_entropy of the logits",
        )
    moved: list[Node] = []
    node = loss.rows
    while node.target in _ROW_OPS or _same_type(node):
        _only_user(node, "the logits", loss.node if not moved else moved[-1])
        moved.append(node)
        before = node.args[0]
        assert isinstance(before, Node)
        node = before
    if node.target is not aten.linear.default or (len(node.args) > 2 and node.args[2] is not None):
        raise PipelineError(
            f"the output layer cannot be sharded: the loss's input comes from {node.target}, not a linear without bias",
            where=where_in_model(node),
            remedy="keep only reshapes and slices of rows between the output layer and the loss",
        )
    _only_user(node, "the logits", moved[-1] if moved else loss.node)
    hidden, weight = node.args[:2]
    assert isinstance(hidden, Node) and isinstance(weight, Node)
    if weight.name not in graph.parameters:
        raise PipelineError(
            "the output layer's weight is computed", where=where_in_model(node), remedy="use a parameter"
        )
    size = int(weight.meta["val"].shape[0])
    for each in moved:
        if each.meta["val"].shape[-1] != size:
            raise PipelineError(
                f"the output layer cannot be sharded: {each.target} changes the vocabulary's dimension",
                where=where_in_model(each),
                remedy="leave the logits' last dimension alone",
            )
    return OutputHead(loss, node, hidden, weight.name, tuple(reversed(moved)), size)


def input_head(graph: StepGraph, size: int) -> InputHead:
    """The lookup of ``size`` rows by an input. Raises PipelineError when there is none."""
    for node in graph.nodes:
        if node.target is not aten.embedding.default:
            continue
        weight, indices = node.args[:2]
        assert isinstance(weight, Node) and isinstance(indices, Node)
        if weight.name in graph.parameters and int(weight.meta["val"].shape[0]) == size:
            padding = node.args[2] if len(node.args) > 2 else -1
            assert isinstance(padding, int)
            return InputHead(node, indices, weight.name, size, padding)
    raise PipelineError(
        f"the input embedding cannot be sharded: no parameter with {size} rows is looked up",
        remedy="shard S and T alone",
    )


def free_nodes(graph: StepGraph) -> set[Node]:
    """What does not depend on any parameter: masks, positions, targets. Every rank computes these itself."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.name not in graph.parameters:
                found.add(node)
        elif node.op in ("get_attr", "call_function") and all(each in found for each in node.all_input_nodes):
            found.add(node)
    return found


def _same_type(node: Node) -> bool:
    """Whether it is a conversion to the type that the value has."""
    if node.target not in (aten.to.dtype, aten.to.dtype_layout) or not isinstance(node.args[0], Node):
        return False
    return bool(node.args[0].meta["val"].dtype == node.meta["val"].dtype)


def _only_user(node: Node, what: str, user: Node) -> None:
    others = [each for each in node.users if each is not user and each.target not in _IGNORED]
    if others:
        raise PipelineError(
            f"the output layer cannot be sharded: {what} are also read by {others[0].target}",
            where=where_in_model(others[0]),
            remedy="compute that from the last hidden state, or do without vocabulary parallelism",
        )


def where_in_model(node: Node) -> str:
    """The line of the model that a node comes from, else its name."""
    trace = str(node.meta.get("stack_trace") or "").strip().splitlines()
    return trace[-2].strip() if len(trace) > 1 else node.name
