"""The plan while it is made: its memory and steps, and what a process holds besides its graphs' values."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..cost_model.devices import Device
from ..cost_model.region_memory import KernelOrder
from ..cost_model.simulator import simulate
from ..ir.graph import Graph, Node
from ..ir.plan import Buffer, GraphPlan, Step

#: (name, bytes, module path).
StateEntry = tuple[str, int, str]

#: Roles whose memory an allocation plan places; the rest is held by the user or the optimizer.
PLACED_ROLES = {"saved": "saved", "scratch": "scratch", "workspace": "scratch"}


@dataclass(frozen=True)
class StateBytes:
    """What a training process holds besides the graphs' own values. ``gradients`` are only needed for parameters whose
    gradient no given backward graph computes."""

    parameters: tuple[StateEntry, ...] = ()
    gradients: tuple[StateEntry, ...] = ()
    optimizer: tuple[StateEntry, ...] = ()
    buffers: tuple[StateEntry, ...] = ()


@dataclass
class Memory:
    """A buffer while the plan is made. ``lower`` is -1 until a step touches it; ``kept`` ones live to the end."""

    name: str
    bytes: int
    role: str
    lower: int = -1
    upper: int = 0
    kept: bool = False
    dtype: str = ""
    shape: tuple[int, ...] = ()
    source: str = ""
    module: str = ""

    def alike(self, other: Memory) -> bool:
        """Of one size and dtype. Shapes may differ: an output may be a view of what is stored."""
        return (self.bytes, self.dtype) == (other.bytes, other.dtype)


@dataclass
class PlanBuilder:
    memory: list[Memory] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    graphs: list[GraphPlan] = field(default_factory=list)
    #: Outputs of graphs so far that no later graph took as an input (graphs are joined where Dynamo broke the model).
    handed: list[int] = field(default_factory=list)
    #: Seconds of the host's call of a graph, which its first step has to wait for, and of each parameter in a training
    #: step: half of them before the forward, half of them for its gradient.
    graph_call: float = 0.0
    parameter_call: float = 0.0
    #: How kernels of regions were ordered, by region.
    orders: dict[str, KernelOrder] = field(default_factory=dict)
    #: Memory of a graph's input -> memory of its gradient, for inputs that another graph made.
    gradient_of: dict[int, int] = field(default_factory=dict)

    def call_seconds(self, graph: Graph) -> float:
        """Seconds of the host's call of a graph."""
        given = (node.name for node in graph.inputs if node.role == "parameter")
        handled = graph.outputs if graph.phase == "backward" else tuple(given)
        return self.graph_call + len(handled) * self.parameter_call / 2

    def take_handed(self, wanted: Memory) -> int | None:
        """The earliest output of the same type that an earlier graph handed out, once."""
        for identity in self.handed:
            if self.memory[identity].alike(wanted):
                self.handed.remove(identity)
                return identity
        return None

    def add(self, memory: Memory) -> int:
        self.memory.append(memory)
        return len(self.memory) - 1


class Holdings:
    """Parameters, buffers and optimizer state: live from begin to end, matched to the graphs' inputs."""

    def __init__(self, builder: PlanBuilder, state: StateBytes) -> None:
        self.builder = builder
        self.by_name: dict[str, int] = {}
        self.by_bytes: dict[tuple[str, int], list[int]] = {}
        self.gradients: list[int] = []
        self.gradient_modules = {name: module for name, _, module in state.gradients}
        self.taken: set[int] = set()
        self.optimizer = [self._hold("optimizer", entry) for entry in state.optimizer]
        self.parameters = [self._hold("parameter", entry) for entry in state.parameters]
        self.buffers = [self._hold("buffer", entry) for entry in state.buffers]

    def _hold(self, role: str, entry: StateEntry) -> int:
        name, size, module = entry
        identity = self.builder.add(Memory(name, size, role, lower=0, kept=True, module=module))
        if role != "optimizer":
            self.by_name[_plain(name)] = identity
            self.by_bytes.setdefault((role, size), []).append(identity)
        return identity

    def of_input(self, node: Node, size: int) -> int:
        """The held memory that an input node stands for: by name, else the next unused one of that size, else (where
        the state lists none of that size) memory of its own."""
        named = self.by_name.get(_plain(node.location.module), self.by_name.get(_plain(node.name)))
        if named is not None and self.builder.memory[named].role == node.role:
            self.taken.add(named)
            return named
        alike = self.by_bytes.get((node.role, size), [])
        free = next((identity for identity in alike if identity not in self.taken), None)
        if free is not None:
            self.taken.add(free)
            return free
        if alike:
            return alike[-1]
        module = node.location.module
        identity = self.builder.add(Memory(module or node.name, size, node.role, lower=0, kept=True, module=module))
        (self.parameters if node.role == "parameter" else self.buffers).append(identity)
        return identity


def _plain(name: str) -> str:
    """A name without what capture adds: ``L__self___layers_0_weight`` and ``layers.0.weight`` are one."""
    for prefix in ("l_self_modules_", "l__self___", "l_self_", "self."):
        if name.lower().startswith(prefix):
            name = name[len(prefix) :]
            break
    name = name.replace("_modules_", ".").replace("_parameters_", ".").replace("_buffers_", ".")
    return name.replace("_", ".").strip(".").lower()


def close_plan(builder: PlanBuilder, device: Device) -> tuple[tuple[Step, ...], list[Buffer]]:
    """Close lifetimes and say at which step each buffer is freed."""
    count = len(builder.steps)
    buffers: list[Buffer] = []
    frees: list[list[int]] = [[] for _ in range(count)]
    for identity, entry in enumerate(builder.memory):
        lower = max(entry.lower, 0)
        upper = count if entry.kept else max(entry.upper, min(lower + 1, count))
        if lower >= upper:  # handed to a backward that has no step
            continue
        if not entry.kept:
            frees[upper - 1].append(identity)
        buffers.append(
            Buffer(
                id=identity,
                name=entry.name,
                bytes=entry.bytes,
                lower=lower,
                upper=upper,
                role=entry.role,
                alignment=device.alignment,
                pool=PLACED_ROLES.get(entry.role, ""),
                source=entry.source,
                module=entry.module,
                dtype=entry.dtype,
                shape=entry.shape,
            )
        )
    timeline = simulate(builder.steps)
    steps = tuple(
        Step(
            id=step.id,
            kind=step.kind,
            name=step.name,
            phase=step.phase,
            stream=step.stream,
            reads=step.reads,
            writes=step.writes,
            frees=tuple(freed),
            depends=step.depends,
            start=start,
            seconds=step.seconds,
            flop=step.flop,
            bytes_moved=step.bytes_moved,
            region=step.region,
            ops=step.ops,
            source=step.source,
            module=step.module,
            device=step.device,
            rendezvous=step.rendezvous,
        )
        for step, start, freed in zip(builder.steps, timeline.start, frees, strict=True)
    )
    return steps, buffers
