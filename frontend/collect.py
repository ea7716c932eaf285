"""The backend of the offline capture: it keeps what AOTAutograd hands over, and compiles nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._dynamo.utils import counters

from .. import torch_internals
from ..ir.graph import Graph, Location, Node
from .fx_import import from_fx
from .repeated_modules import RegionReport, inline_repeated, report_of_frame
from .without_weights import Weightless

_NUMBERED = re.compile(r"^(?:primals_|arg)(\d+)(?:_1)?$")


@dataclass
class AotGraphs:
    """What AOTAutograd made of one Dynamo graph; ``outputs`` is the number of the forward's own outputs."""

    forward: torch.fx.GraphModule | None = None
    backward: torch.fx.GraphModule | None = None
    inference: torch.fx.GraphModule | None = None
    outputs: int = 0


@dataclass(frozen=True)
class GraphBreak:
    """Where Dynamo ended a graph early, and why."""

    reason: str
    file: str
    line: int


@dataclass(repr=False)
class CollectingBackend:
    """Callable as a Dynamo backend. ``frames`` holds (dynamo, forward, backward, names) for each graph, in order, and
    ``modules`` the FX graphs that the latter two come from. ``regions`` sums up the repeated modules of all graphs;
    ``sizes`` are the values of size symbols."""

    model: torch.nn.Module
    weightless: Weightless
    train: bool
    #: None: Inductor's.
    decompositions: Mapping[Any, Callable[..., Any]] | None = None
    #: Whether mutated inputs are written inside the graphs (``aten.copy_``), or returned first among the outputs.
    writes_inputs: bool = True
    frames: list[tuple[Graph, Graph, Graph | None, dict[str, str]]] = field(default_factory=list)
    modules: list[AotGraphs] = field(default_factory=list)
    graph_breaks: list[GraphBreak] = field(default_factory=list)
    regions: RegionReport = field(default_factory=RegionReport)
    sizes: dict[str, int] = field(default_factory=dict)
    #: Splits joint graphs; None: torch's minimum cut.
    partition: Callable[..., Any] | None = None
    #: For each of ``frames``: (forward module, backward module) -> (forward, backward) as IR, for another split.
    imports: list[Callable[[torch.fx.GraphModule, torch.fx.GraphModule], tuple[Graph, Graph]]] = field(
        default_factory=list
    )

    def __post_init__(self) -> None:
        self.paths: dict[int, tuple[str, str]] = {}
        for name, parameter in self.model.named_parameters():
            self.paths.setdefault(id(parameter), ("parameter", name))
        for name, buffer in self.model.named_buffers():
            self.paths.setdefault(id(buffer), ("buffer", name))
        self.counted_breaks = dict(counters["graph_break"])

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        inline_repeated(gm)
        roles, paths = self._roles(gm)
        index = len(self.frames)
        dynamo = from_fx(gm, f"dynamo_{index}", "joint", roles=roles)
        # AOTAutograd writes into the module it is given; what runs on afterwards is a copy.
        running = torch.fx.GraphModule(gm, gm.graph)
        found = self._aot(gm, example_inputs)
        # Only now: AOTAutograd may have Dynamo start again, and then this call counts for nothing.
        self._note_break(gm)
        self._note_regions()
        self._note_sizes(gm)
        names: dict[str, str] = {}
        backward = None
        if found.forward is not None and found.backward is not None:
            saved = len(_outputs(found.forward)) - found.outputs
            forward = self._import(found.forward, f"forward_{index}", "forward", roles, paths, names, saved)
            backward = self._import(
                found.backward, f"backward_{index}", "backward", roles, paths, names, forward=found.forward
            )
        else:
            module = found.inference if found.inference is not None else found.forward
            assert module is not None
            forward = self._import(module, f"inference_{index}", "inference", roles, paths, names)
        self.frames.append((dynamo, forward, backward, names))

        def import_split(first: torch.fx.GraphModule, second: torch.fx.GraphModule) -> tuple[Graph, Graph]:
            saved = len(_outputs(first)) - found.outputs
            return (
                self._import(first, f"forward_{index}", "forward", roles, paths, names, saved),
                self._import(second, f"backward_{index}", "backward", roles, paths, names, forward=first),
            )

        self.imports.append(import_split)
        self.modules.append(found)
        return self.weightless.runner(running)

    def _aot(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> AotGraphs:
        found = AotGraphs()
        with torch_internals.graph_settings():
            if self.decompositions is None:
                self._as_compiled(gm, example_inputs, found)
            else:
                self._decomposed(gm, example_inputs, found)
        return found

    def _as_compiled(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any], found: AotGraphs) -> None:
        """The graphs that ``torch.compile(backend="effcc")`` compiles: after Inductor's passes on the joint graph."""

        def keep(module: torch.fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
            # Compiling rewrites a graph in place, and torch goes on with the one it gave.
            copy = torch_internals.lazy_copy(module)
            if kwargs.get("is_backward"):
                found.backward = copy
            elif kwargs.get("is_inference"):
                found.inference = copy
            else:
                found.forward = copy
                total = len(_outputs(module))
                found.outputs = total - torch_internals.saved_outputs(total)
            return torch_internals.boxed(module.forward)

        with torch_internals.joint_partitioner(self.partition):
            torch_internals.compile_fx(gm, example_inputs, keep)

    def _decomposed(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any], found: AotGraphs) -> None:
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.partitioners import min_cut_rematerialization_partition

        def keep(slot: str) -> Callable[..., Any]:
            def compiler(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
                setattr(found, slot, module)
                return module.forward

            return compiler

        def partition(joint: torch.fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **kwargs: Any) -> Any:
            found.outputs = num_fwd_outputs  # repeated modules are partitioned first, the whole graph last
            split = self.partition or min_cut_rematerialization_partition
            return split(joint, inputs, num_fwd_outputs=num_fwd_outputs, **kwargs)

        backend = aot_autograd(
            fw_compiler=keep("forward"),
            bw_compiler=keep("backward"),
            inference_compiler=keep("inference"),
            partition_fn=partition,
            decompositions=self.decompositions,
            keep_inference_input_mutations=self.writes_inputs,
        )
        backend(gm, list(example_inputs))

    def _note_break(self, gm: torch.fx.GraphModule) -> None:
        before, self.counted_breaks = self.counted_breaks, dict(counters["graph_break"])
        reason = getattr(gm, "compile_subgraph_reason", None)
        if reason is None or not getattr(reason, "graph_break", False):
            return
        stack = [frame for frame in (reason.user_stack or []) if frame is not None]
        place = stack[-1] if stack else None
        text = str(reason.reason)
        if text == "step_unsupported":
            # Dynamo went back to an earlier statement; why is what it counted last.
            text = next((key for key, count in counters["graph_break"].items() if count > before.get(key, 0)), text)
        headline = next((line.strip() for line in text.splitlines() if line.strip()), "")
        line = (place.lineno or 0) if place else 0
        self.graph_breaks.append(GraphBreak(headline, place.filename if place else "", line))

    def _note_regions(self) -> None:
        """Count the repeated modules of this graph. (A frame may be analysed several times until it yields one.)"""
        found = report_of_frame()
        for total, counts in ((self.regions.calls, found.calls), (self.regions.traces, found.traces)):
            for name, count in counts.items():
                total[name] = total.get(name, 0) + count
        self.regions.rejections += found.rejections

    def _note_sizes(self, gm: torch.fx.GraphModule) -> None:
        """Values of the size symbols, from Dynamo's inputs: each symbol is an input or a dimension of one."""
        for node in gm.graph.find_nodes(op="placeholder"):
            value = node.meta.get("example_value")
            for size in (value, *(value.shape if isinstance(value, torch.Tensor) else ())):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol and size.node.hint is not None:
                    self.sizes[str(size.node.expr)] = int(size.node.hint)

    def _roles(self, gm: torch.fx.GraphModule) -> tuple[list[str], list[str]]:
        """Role and path of each Dynamo placeholder ("" where it is neither parameter nor buffer)."""
        roles, paths = [], []
        for node in gm.graph.find_nodes(op="placeholder"):
            argument = node.meta.get("grapharg")
            example = getattr(argument, "example", None)
            role, path = self.paths.get(id(example), ("input", ""))
            if isinstance(node.meta.get("example_value"), torch.SymInt):
                role = "symbol"
            roles.append(role)
            paths.append(path)
        return roles, paths

    def _import(
        self,
        module: torch.fx.GraphModule,
        name: str,
        phase: str,
        roles: Sequence[str],
        paths: Sequence[str],
        names: dict[str, str],
        saved: int = 0,
        forward: torch.fx.GraphModule | None = None,
    ) -> Graph:
        found_roles = []
        for node in module.graph.find_nodes(op="placeholder"):
            numbered = _NUMBERED.match(node.name)
            index = -1 if numbered is None else int(numbered[1]) - (1 if node.name.startswith("primals") else 0)
            if 0 <= index < len(roles):
                found_roles.append(roles[index])
                if paths[index]:
                    names[node.name] = paths[index]
            else:
                found_roles.append(_other_role(node, phase))
        graph = from_fx(module, name, phase, roles=found_roles, saved=saved, forward=forward)
        return with_paths(graph, names)


def _other_role(node: torch.fx.Node, phase: str) -> str:
    if node.name.startswith("tangents"):
        return "tangent"
    if "rng" in node.name or ("seed" in node.name and phase != "backward"):  # a backward's seeds come from its forward
        return "seed"
    if isinstance(node.meta.get("val"), torch.SymInt):
        return "symbol"
    return "saved" if phase == "backward" else "input"


def _outputs(module: torch.fx.GraphModule) -> Sequence[Any]:
    (output,) = module.graph.find_nodes(op="output")
    returned = output.args[0]
    return returned if isinstance(returned, tuple | list) else (returned,)


def with_paths(graph: Graph, names: Mapping[str, str]) -> Graph:
    """The graph with the path of each parameter and buffer as the module of its input's location."""

    def located(node: Node) -> Node:
        if node.op != "input" or node.name not in names:
            return node
        return replace(node, location=Location(module=names[node.name]))

    return graph.with_nodes(tuple(located(node) for node in graph.nodes))
