"""Graphs of plain PyTorch functions with the value of every node, and the check of a raised cascade against them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy
import torch
from effcc.frontend.fx_import import from_fx
from effcc.ir.cascade_interpreter import evaluate
from effcc.ir.fused_cascade import TensorView
from effcc.ir.graph import Graph
from effcc.passes.raising.choose import Choice, choose
from effcc.passes.raising.group import Group
from effcc.passes.raising.raise_graph import Raised, raise_graph
from functorch.compile import aot_function
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import default_partition
from torch._inductor.decomposition import select_decomp_table

#: Everything that can be fused is, however little there is to gain: what is tested is that it is right.
EVERYTHING = Choice(gain=0.0, saved_bytes=0)


@dataclass(frozen=True)
class Run:
    """A captured graph and the value of each of its nodes in one run, as numpy arrays."""

    phase: str
    graph: Graph
    values: Mapping[str, Any]


class _Recorder(torch.fx.Interpreter):
    def __init__(self, gm: torch.fx.GraphModule) -> None:
        super().__init__(gm)
        self.values: dict[str, Any] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        found = super().run_node(n)
        self.values[n.name] = found
        return found


def record(
    function: Callable[..., torch.Tensor], inputs: Sequence[Any], *, decomposed: bool = True, model: bool = False
) -> list[Run]:
    """The graphs of ``function(*inputs)``: one inference graph, or, if an input asks for a gradient, the joint graph,
    the forward and the backward. ``decomposed``: with Inductor's decompositions, else with those of AOTAutograd alone.
    ``model``: the function holds a model with parameters, and is traced by Dynamo (which takes longer)."""
    runs: list[tuple[str, torch.fx.GraphModule, dict[str, Any]]] = []
    joints: list[torch.fx.GraphModule] = []
    train = model or any(isinstance(item, torch.Tensor) and item.requires_grad for item in inputs)

    def compiler(phase: str) -> Callable[..., Any]:
        def compile_graph(gm: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
            def call(args: list[Any]) -> Any:
                recorder = _Recorder(gm)
                found = recorder.run(*args)
                runs.append((phase, gm, recorder.values))
                return found

            call._boxed_call = True  # type: ignore[attr-defined]
            return call

        return compile_graph

    def partition(gm: torch.fx.GraphModule, args: Any, **options: Any) -> Any:
        joints.append(gm)
        return default_partition(gm, args, **options)

    options = {
        "fw_compiler": compiler("forward" if train else "inference"),
        "bw_compiler": compiler("backward"),
        "partition_fn": partition,
        "decompositions": select_decomp_table() if decomposed else {},
    }
    if model:
        torch._dynamo.reset()
        output = torch.compile(function, backend=aot_autograd(**options))(*inputs)
    else:
        output = aot_function(function, **options)(*inputs)
    if train:
        output.backward(torch.randn_like(output))
    forwards = [values for phase, _, values in runs if phase == "forward"]
    for joint, forward in zip(joints, forwards, strict=True):
        nodes = joint.graph.find_nodes(op="placeholder")
        # Any tangents will do: the joint graph is run by itself.
        values = [
            torch.randn(node.meta["val"].shape, dtype=node.meta["val"].dtype)
            if node.name.startswith("tangents")
            else forward[node.name]
            for node in nodes
        ]
        recorder = _Recorder(joint)
        recorder.run(*values)
        runs.append(("joint", joint, recorder.values))
    if model:
        torch._dynamo.reset()
    return [
        Run(phase, from_fx(gm, "graph", phase), {name: _array(value) for name, value in values.items()})
        for phase, gm, values in runs
    ]


def _array(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or value.is_meta:
        return value
    return value.detach().to(torch.float64).numpy()


# Checks --------------------------------------------------------------------------------------------------------------


def check_raised(run: Run, tolerance: float = 1e-9, keep: Sequence[str] = ()) -> tuple[Raised, int]:
    """Every tensor of the raised cascade is the graph value that it says, NaNs included. Also: how many were compared.

    The cascade is evaluated in float64 from its leaves' eager values; ``run`` was made in float64.
    """
    raised = raise_graph(run.graph, keep=keep)
    used = set(raised.cascade.tensors)
    inputs = {
        name: run.values[tensor.nodes[0]].reshape(tensor.sizes)
        for name, tensor in raised.tensors.items()
        if tensor.leaf and name in used
    }
    found = evaluate(raised.cascade, inputs, {name: int(size) for name, size in raised.sizes.items()})
    compared = 0
    for name, tensor in raised.tensors.items():
        if tensor.leaf or not tensor.nodes or name not in found:
            continue
        assert_close(
            found[name], run.values[tensor.nodes[0]].reshape(tensor.sizes), f"{name} in {run.phase}", tolerance
        )
        compared += 1
    return raised, compared


def assert_close(found: Any, wanted: Any, what: str, tolerance: float) -> None:
    """Equal NaNs and infinities; else an error of at most ``tolerance``, relative to the largest number."""
    assert np.array_equal(np.isnan(found), np.isnan(wanted)), f"{what}: NaNs differ"
    infinite = np.isinf(wanted)
    assert np.array_equal(found[infinite], wanted[infinite]), f"{what}: infinities differ"
    finite = np.isfinite(wanted)
    scale = 1 + np.max(np.abs(wanted[finite]), initial=0)
    error = np.max(np.abs(found[finite] - wanted[finite]), initial=0) / scale
    assert error <= tolerance, f"{what}: error {error}"


def check_groups(run: Run, choice: Choice = EVERYTHING, tolerance: float = 1e-9) -> tuple[Group, ...]:
    """Every group's fused cascade, as written and rewritten, gives its results from its operands' eager values."""
    groups = choose(raise_graph(run.graph), choice).groups
    hidden: dict[str, Any] = {}
    for group in groups:
        values = {**hidden, **run.values}
        operands = [values[name] for name in group.operands]
        for cascade in (group.fused.cascade, group.rewriting.cascade):
            inputs = {view.tensor: take_view(operands[view.position], view) for view in group.fused.inputs}
            found = evaluate(cascade, inputs, {name: int(size) for name, size in group.fused.sizes.items()})
            for view in group.fused.outputs:
                name, value = group.results[view.position], found[view.tensor]
                if name in run.values:
                    wanted = take_view(run.values[name], view)
                    assert_close(value, wanted, f"{group.name}: {name} in {run.phase}", tolerance)
                else:
                    hidden[name] = value.reshape([int(size) for size in group.fused.results[view.position].shape])
        for rest in group.rests:
            value = hidden[rest.result].sum(tuple(range(rest.count)))
            wanted = run.values[rest.value]
            assert_close(value.reshape(wanted.shape), wanted, f"{group.name}: {rest.value}", tolerance)
    return groups


def take_view(array: Any, view: TensorView) -> Any:
    """The elements of an operand that are the view's tensor, as an array of the tensor's ranks."""
    if not view.index:
        return array
    sizes = [int(size) for size in view.sizes]
    grids = np.meshgrid(*(np.arange(size) for size in sizes), indexing="ij") if view.ranks else []
    places = [
        np.broadcast_to(np.asarray(sympy.lambdify(view.ranks, at, "numpy")(*grids)), tuple(sizes)) for at in view.index
    ]
    return array[tuple(places)]
