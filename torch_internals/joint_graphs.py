"""Joint graphs of forward and backward: passes over them, and splitting them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .settings import inductor_settings


def joint_partitioner(partition: Callable[..., Any] | None) -> contextlib.AbstractContextManager[Any]:
    """Inside, Inductor splits joint graphs by ``partition(gm, joint_inputs, *, num_fwd_outputs, ...)``, after its own
    joint-graph passes. None leaves torch's minimum cut in place."""
    if partition is None:
        return contextlib.nullcontext()
    from torch._inductor.custom_graph_pass import CustomPartitionerFn

    class Partitioner(CustomPartitionerFn):  # type: ignore[misc]
        def __call__(self, gm: torch.fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Any:
            return partition(gm, joint_inputs, **kwargs)

        def uuid(self) -> Any:
            # What is saved shows in the forward and backward graphs, which the code cache goes by.
            return b"effcc activation planning"

    return inductor_settings({"custom_partitioner_fn": Partitioner()})


def minimum_cut_partition(
    gm: torch.fx.GraphModule, joint_inputs: Any, *, prepared: bool = False, **kwargs: Any
) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
    """Torch's own choice of what is saved: forward and backward modules. It rewrites ``gm``. ``prepared``: the graph
    has been through ``prepare_joint``, and common subexpressions are not looked for again."""
    import torch._functorch.config as functorch_config
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    with functorch_config.patch(cse=False) if prepared else contextlib.nullcontext():
        return min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)


def knapsack_partition(
    gm: torch.fx.GraphModule, joint_inputs: Any, budget: float, solver: str = "dp", **kwargs: Any
) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
    """Torch's choice for its relative ``activation_memory_budget``, 0 to 1, by its ``solver`` (dp, ilp, greedy). It
    rewrites ``gm``."""
    import torch._functorch.config as functorch_config

    with functorch_config.patch(activation_memory_budget=budget, activation_memory_budget_solver=solver):
        return minimum_cut_partition(gm, joint_inputs, **kwargs)


def prepare_joint(gm: torch.fx.GraphModule) -> bool:
    """What torch does to a joint graph before it splits it: no dead code, common subexpressions merged. False for a
    graph that only torch can split: it has user checkpoints, effect tokens or state that is handed to the backward."""
    from torch._functorch import config, partitioners
    from torch._functorch.compile_utils import fx_graph_cse

    gm.graph.eliminate_dead_code()
    if config.cse:
        gm.graph = fx_graph_cse(gm.graph)
    gm.recompile()
    return not any(
        partitioners.must_recompute(node)
        or partitioners.is_with_effects(node)
        or partitioners._is_backward_state(node)
        or node.meta.get("recompute") is not None
        for node in gm.graph.nodes
    )


def backward_only_nodes(gm: torch.fx.GraphModule) -> list[str]:
    """Nodes of a joint graph that torch says must run in the backward (writes into inputs, mostly)."""
    from torch._functorch import partitioners

    return [node.name for node in gm.graph.nodes if partitioners._must_be_in_backward(node)]


def split_joint(
    gm: torch.fx.GraphModule, saved: Sequence[torch.fx.Node], num_fwd_outputs: int, static_inputs: Sequence[int]
) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
    """Forward and backward of a joint graph that keeps just ``saved`` (inputs among them) for the backward, which
    computes what else it needs of the forward again, right before its first use. ``gm`` stays as it is."""
    from torch._functorch import partitioners
    from torch._functorch.compile_utils import raise_getitems
    from torch.fx._lazy_graph_module import _LazyGraphModule, _use_lazy_graph_module

    primals = [node for node in gm.graph.find_nodes(op="placeholder") if partitioners._is_primal(node)]
    with _use_lazy_graph_module(True):  # their Python code is made when they are first run
        forward, backward = partitioners._extract_fwd_bwd_modules(
            gm,
            list(saved),
            saved_sym_nodes=[],
            num_fwd_outputs=num_fwd_outputs,
            static_lifetime_input_nodes=partitioners.OrderedSet(primals[index] for index in static_inputs),
        )
    _gradients_last(backward.graph, [node for node in backward.graph.nodes if partitioners._is_tangent(node)])
    backward = _LazyGraphModule.from_graphmodule(partitioners.reordering_to_mimic_autograd_engine(backward))
    for module in (forward, backward):
        for node in module.graph.nodes:
            node.meta = dict(node.meta)
    return raise_getitems(forward), raise_getitems(backward)


def _gradients_last(graph: torch.fx.Graph, tangents: Sequence[torch.fx.Node]) -> None:
    """Put what depends on the gradients given behind all else, in place. Torch's reordering leaves all that stands
    behind the first such node in its order, and moves to where it is needed only what is before; a rewritten graph may
    have that node anywhere."""
    late = set(tangents)
    (output,) = graph.find_nodes(op="output")
    for node in list(graph.nodes):
        if node.op != "output" and node not in late and not late.isdisjoint(node.all_input_nodes):
            late.add(node)
            output.prepend(node)


def is_primal(node: torch.fx.Node) -> bool:
    from torch._functorch import partitioners

    return bool(partitioners._is_primal(node) or partitioners._is_fwd_seed_offset(node))


def copy_graph(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The same graph in a new module, with metadata of its own; submodules are shared."""
    from torch.fx._lazy_graph_module import _make_graph_module

    graph = torch.fx.Graph()
    old = gm.graph.output_node()
    copies: dict[torch.fx.Node, torch.fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, copies))
    graph.output_node().meta = dict(old.meta)
    for node in graph.nodes:
        node.meta = dict(node.meta)
    return _make_graph_module(gm, graph)


def lazy_copy(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A module of its own for the graph of ``gm``, whose Python code is made when it is first run."""
    from torch.fx._lazy_graph_module import _LazyGraphModule

    return _LazyGraphModule(gm, gm.graph)


def joint_pass(run: Callable[[torch.fx.Graph], None] | None, key: str) -> contextlib.AbstractContextManager[Any]:
    """Inside, Inductor calls ``run`` on every joint and inference graph, bodies of repeated layers included, before its
    own passes. ``key`` stands for it in cache keys."""
    if run is None:
        return contextlib.nullcontext()
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Pass(CustomGraphPass):  # type: ignore[misc]
        def __call__(self, graph: torch.fx.Graph) -> None:
            run(graph)

        def uuid(self) -> Any:
            return key.encode()

    return inductor_settings({"joint_custom_pre_pass": Pass()})


def first_look(graph: torch.fx.Graph, key: str) -> bool:
    """Whether a joint pass meets these ops for the first time: of a repeated layer's body, the forward and the backward
    come by once more after it was partitioned."""
    ops = [node for node in graph.nodes if node.op == "call_function"]
    fresh = not any(key in node.meta for node in ops)
    for node in ops:
        node.meta[key] = True
    return fresh


def stable_topological_sort(graph: torch.fx.Graph) -> None:
    """Values before their uses, else the order that the graph has."""
    from torch._inductor.pattern_matcher import stable_topological_sort as sort

    sort(graph)
