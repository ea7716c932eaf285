"""The plan: what runs, in which order, on which stream, and where every byte lives.

A plan is data. Times are seconds, sizes bytes, offsets bytes from the start of the tier's arena. Positions count steps:
a buffer is live at positions ``lower <= p < upper`` of the whole timeline (forward, then backward, then optimizer); the
position of a step is its place in ``Plan.steps``, which is the order of issue.

Placed buffers lie in an arena, one per tier and pool (``arena_key``). An arena is held in full from the first ``lower``
to the last ``upper`` of its buffers, so the use of a tier at a position is the arenas held there plus the unplaced
buffers live there, and ``Plan.peak`` is the greatest such use.
"""

from __future__ import annotations

import msgspec

#: What a step does. ``outside``: what the caller runs between two graphs, as far as its memory counts.
STEP_KINDS = (
    "region", "kernel", "library", "swap_out", "swap_in", "recompute", "collective", "optimizer", "free", "outside",
)  # fmt: skip
#: Why a buffer is held.
BUFFER_ROLES = ("parameter", "gradient", "optimizer", "buffer", "input", "output", "saved", "scratch", "workspace")
TIERS = ("scratchpad", "device", "host", "disk")


class Buffer(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of memory. ``offset`` is None for what the plan counts but does not place (parameters, graph outputs)."""

    id: int
    name: str
    bytes: int
    lower: int
    upper: int
    role: str
    tier: str = "device"
    offset: int | None = None
    alignment: int = 64
    #: Which arena of the tier holds it, where a tier has several (``saved``, ``scratch``). Empty: the tier's only one.
    pool: str = ""
    #: Where the memory comes from: user's source line and module path of the op that makes it.
    source: str = ""
    module: str = ""
    dtype: str = ""
    shape: tuple[int, ...] = ()
    #: What may be done with a saved tensor between forward and backward: keep, recompute, swap.
    decision: str = "keep"

    @property
    def arena_key(self) -> str:
        """Key of the buffer's arena in ``Plan.arena``: ``device``, or ``device/saved`` where the tier has pools."""
        return f"{self.tier}/{self.pool}" if self.pool else self.tier


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of a stream's list. ``reads`` and ``writes`` are buffer ids."""

    id: int
    kind: str
    name: str
    phase: str
    stream: str = "compute"
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    frees: tuple[int, ...] = ()
    depends: tuple[int, ...] = ()
    #: Predicted begin and length; floating-point operations and bytes moved that they are made of.
    start: float = 0.0
    seconds: float = 0.0
    flop: int = 0
    bytes_moved: int = 0
    #: Region or subgraph this step runs, equal for repeats of one layer.
    region: str = ""
    #: Names of the ops of its graph, or subgraph, that the step computes; none where the generated code does not say.
    ops: tuple[str, ...] = ()
    source: str = ""
    module: str = ""
    #: Index of the device (rank) whose stream it is; streams of one name on two devices are two streams.
    device: int = 0
    #: Steps of one collective, one a device, share a name here: they begin together when all have arrived.
    rendezvous: str = ""


class Solver(msgspec.Struct, frozen=True, kw_only=True):
    """How a decision was made: the solver's name, its value and bound, and the seed that repeats it."""

    name: str
    problem: str
    value: float
    bound: float
    seconds: float = 0.0
    seed: int = 0

    @property
    def gap(self) -> float:
        """Relative distance of the value from the bound, 0 when proven optimal."""
        return 0.0 if self.value <= 0 else max(0.0, (self.value - self.bound) / self.value)


class GraphPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One captured graph (a model has several when Dynamo breaks it): identity and where its steps lie."""

    name: str
    #: Device-neutral structural hash of the captured graph, and one per op, to name the first that differs.
    graph_hash: str
    op_hashes: tuple[str, ...] = ()
    #: Positions of its first and last step (a graph's forward and backward may enclose those of other graphs).
    first_step: int = 0
    last_step: int = 0


class InputSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What the model is called with: sizes in elements, as text because a size may be symbolic (``s0``, ``2*s0``)."""

    name: str
    dtype: str
    shape: tuple[str, ...] = ()


class TradePoint(msgspec.Struct, frozen=True, kw_only=True):
    """What one peak would cost: a step's seconds, a bound that no choice is below, the bytes kept for the backward."""

    peak: int
    seconds: float
    bound: float
    saved_bytes: int


class CascadeVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a group of dependent reductions is one kernel (``fused``), ``could be``, or is ``not``, and why.

    ``tensor`` is the largest of the group, ``graph`` where it was found first.
    """

    verdict: str
    tensor: str
    why: str
    source: str = ""
    module: str = ""
    graph: str = ""


class Alternative(msgspec.Struct, frozen=True, kw_only=True):
    """One way to do it: what it takes in the unit of its decision, by prediction or (``measured``) by the clock."""

    what: str
    value: float
    measured: bool = False


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """A choice of the schedule: ``kind`` of choice, what it is about, the alternatives that were weighed, and which was
    taken (by ``what``). ``unit`` is ``bytes`` or ``seconds``; no alternative at all is below ``bound``, if one is
    known."""

    kind: str
    subject: str
    chosen: str
    alternatives: tuple[Alternative, ...]
    unit: str = "seconds"
    bound: float | None = None


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """An execution plan for one device."""

    model: str
    device: str
    training: bool
    graphs: tuple[GraphPlan, ...]
    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    #: Predicted length of a step in seconds; highest use of each tier; size of each arena (see ``Buffer.arena_key``).
    seconds: float
    peak: dict[str, int]
    arena: dict[str, int]
    budget: int | None = None
    solvers: tuple[Solver, ...] = ()
    #: (op, reason, source line) of each op that does not run the planned way.
    fallbacks: tuple[tuple[str, str, str], ...] = ()
    dtype: str = ""
    optimizer: str = ""
    notes: tuple[str, ...] = ()
    inputs: tuple[InputSpec, ...] = ()
    #: Time against memory, where it was asked for.
    curve: tuple[TradePoint, ...] = ()
    #: Which reductions could be one kernel, where it was asked for: in the graphs as ``torch.compile`` would fuse them.
    cascades: tuple[CascadeVerdict, ...] = ()
    #: What the schedule was chosen from, where it was recorded.
    decisions: tuple[Decision, ...] = ()
