"""``effcc plan --memory-budget`` and ``--pareto``: activations planned on captured joint graphs, for any device.

The joint graphs pass here while the model is captured. A first plan keeps what torch keeps; where it is over the
budget, the graph that saves most has to do with as much less, and the plan is made again, until it fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec

from . import torch_internals
from .cost_model.devices import Device
from .cost_model.tensors import Bindings
from .errors import BudgetError, EffccError
from .formatting import bytes_text
from .frontend.fx_import import from_fx
from .ir.plan import Plan
from .joint_split import prefetches, split_saving, values_saved
from .passes.activation.candidates import Candidate, Key
from .passes.activation.choice import ActivationChoice, describe
from .passes.activation.host_link import host_link
from .passes.activation.problem import joint_problem
from .passes.activation.search import ActivationSearch
from .token_rows import RowGraph

if TYPE_CHECKING:
    import torch.fx as fx

    from .frontend.capture import Captured, CapturedFrame

#: How often the plan is made again.
ROUNDS = 12
#: How often more is kept where there is room left, and the share of the budget that makes it worthwhile.
LOOSENINGS, WORTHWHILE = 3, 0.01
#: Seconds for the proof that nothing is much smaller than the least budget that a refusal names.
PROOF_SECONDS = 10.0
#: Points of a Pareto curve.
POINTS = 16


@dataclass
class JointGraph:
    """One joint graph with its choices. ``limit``: bytes that its simulated peak may reach, None while all is kept."""

    module: fx.GraphModule
    search: ActivationSearch
    outputs: int
    static: list[int]
    limit: int | None = None
    chosen: Candidate | None = None

    def split(self) -> tuple[fx.GraphModule, fx.GraphModule]:
        assert self.chosen is not None
        chosen = self.chosen
        problem, ahead = self.search.problem, prefetches(self.search.problem, chosen)
        swapped, shares = chosen.swapped, chosen.shares
        return split_saving(self.module, problem, chosen.saved, self.outputs, self.static, swapped, ahead, shares)

    @property
    def saved_bytes(self) -> int:
        kept = self.chosen or self.search.plain
        return sum(self.search.problem.values[v].bytes for v in kept.saved)


@dataclass
class BudgetPlanner:
    """Collects the joint graphs of a capture (as its ``partition``), and plans them within a budget."""

    device: Device
    bindings: Bindings = field(default_factory=dict)
    #: Whether values may be swapped to the host.
    swap: bool = False
    #: Whether the graphs may be captured in a way that needs less, so that the floor is not looked for.
    otherwise: Callable[[], bool] = bool
    graphs: list[JointGraph | None] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def partition(
        self,
        gm: fx.GraphModule,
        joint_inputs: Any,
        *,
        num_fwd_outputs: int,
        static_lifetime_input_indices: Sequence[int] | None = None,
        **others: Any,
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """AOTAutograd's ``partition_fn``: torch's split, with the joint graph remembered."""
        static = list(static_lifetime_input_indices or [])
        plannable = torch_internals.prepare_joint(gm)
        joint = torch_internals.copy_graph(gm)
        split = torch_internals.minimum_cut_partition(
            gm,
            joint_inputs,
            prepared=True,
            num_fwd_outputs=num_fwd_outputs,
            static_lifetime_input_indices=static,
            **others,
        )
        if not plannable:
            self.notes.append("activations are saved as torch chooses: the model has checkpoints or effects of its own")
            self.graphs.append(None)
            return split
        try:
            problem = joint_problem(
                from_fx(joint, "joint", "joint", roles=self._roles(joint)),
                self.device,
                num_fwd_outputs,
                bindings=self.bindings,
                backward_only=torch_internals.backward_only_nodes(joint),
                outside_loss=True,
                rows=RowGraph(joint).facts() if self.swap else None,
            )
        except EffccError as error:
            self.notes.append(f"activations are saved as torch chooses: {error.message}")
            self.graphs.append(None)
            return split
        link = host_link(self.device) if self.swap else None
        search = ActivationSearch(problem, values_saved(split[0], problem, num_fwd_outputs), link)
        self.graphs.append(JointGraph(joint, search, num_fwd_outputs, static))
        return split

    def _roles(self, joint: fx.GraphModule) -> list[str]:
        inputs = joint.graph.find_nodes(op="placeholder")
        return ["input" if torch_internals.is_primal(node) else "tangent" for node in inputs]

    def plan(self, captured: Captured, budget: int, make: Callable[[Captured], Plan]) -> tuple[Captured, Plan]:
        """The plan within ``budget`` bytes and the capture that it is of.

        ``make`` plans a capture. Raises BudgetError with the least budget that works and a bound below which none can.
        """
        least = made = make(captured)
        # Where the optimizer's step alone is above the budget, the least that works is what it needs.
        aim = max(budget, _beside_graphs(made))
        for _ in range(ROUNDS):
            over = _peak(made) - aim
            if over <= 0 and aim == budget:
                return self._loosen(captured, made, budget, make)
            if over <= 0:
                raise floor_error(made, budget, self._bound(made))
            if not self._tighten(over):
                break
            captured = self._split_again(captured)
            made = make(captured)
            least = min(least, made, key=_peak)
        if self.otherwise():
            raise floor_error(least, budget, 0)
        if self._choose_least():
            least = min(least, make(self._split_again(captured)), key=_peak)
        raise floor_error(least, budget, self._bound(least))

    def _loosen(
        self, captured: Captured, made: Plan, budget: int, make: Callable[[Captured], Plan]
    ) -> tuple[Captured, Plan]:
        """Where the plan needs less than the simulation said, let the graph keep as much more."""
        for _ in range(LOOSENINGS):
            slack = budget - made.peak.get("device", 0)
            graph = max(
                (g for g in self.graphs if g is not None and g.chosen is not None and g.limit is not None),
                key=lambda g: -g.saved_bytes,
                default=None,
            )
            if graph is None or graph.limit is None or slack < budget * WORTHWHILE:
                break
            before = graph.limit, graph.chosen
            graph.limit += slack
            graph.chosen = graph.search.within(graph.limit)
            if graph.chosen is None or (before[1] is not None and graph.chosen.key == before[1].key):
                graph.limit, graph.chosen = before
                break
            other = self._split_again(captured)
            plan = make(other)
            if plan.peak.get("device", 0) > budget or plan.seconds >= made.seconds:
                graph.limit, graph.chosen = before
                break
            captured, made = other, plan
        return captured, made

    def _tighten(self, over: int) -> bool:
        """Take ``over`` bytes from the graph that saves most and can do with less."""
        for graph in sorted(filter(None, self.graphs), key=lambda g: -g.saved_bytes):
            current = graph.chosen or graph.search.plain
            limit = current.peak - over
            if limit < graph.search.steps[-1].peak and current.key == graph.search.least.key:
                continue
            found = graph.search.within(limit) or graph.search.least
            if found.key == current.key:
                found = graph.search.least
            graph.limit, graph.chosen = limit, found
            return True
        return False

    def _choose_least(self) -> bool:
        """Let every graph do with as little as it can. Returns whether any did not yet."""
        changed = False
        for graph in filter(None, self.graphs):
            smallest = graph.search.smallest
            if (graph.chosen or graph.search.plain).key != smallest.key:
                graph.limit, graph.chosen, changed = smallest.peak, smallest, True
        return changed

    def _split_again(self, captured: Captured) -> Captured:
        training = [i for i, frame in enumerate(captured.frames) if frame.backward is not None]
        frames: list[CapturedFrame] = list(captured.frames)
        for index, graph in zip(training, self.graphs, strict=True):
            again = frames[index].split_again
            if graph is not None and graph.chosen is not None and again is not None:
                frames[index] = replace(again(*graph.split()), split_again=again)
        return replace(captured, frames=tuple(frames))

    def _bound(self, plan: Plan) -> int:
        """A peak that no choice can be below: what the optimizer's step needs, or the simulation's bound, with what the
        plan holds all along in place of what the joint graph does."""
        beside = _beside_graphs(plan)
        graphs = [graph for graph in self.graphs if graph is not None]
        if len(graphs) != 1 or beside >= _peak(plan):
            return beside
        last = len(plan.steps)
        held = sum(
            buffer.bytes
            for buffer in plan.buffers
            if buffer.tier == "device" and buffer.lower == 0 and buffer.upper >= last and buffer.role != "output"
        )
        search = graphs[0].search
        return max(beside, search.prove_floor(PROOF_SECONDS) - search.problem.constant + held)

    def choices(self, budget: int | None) -> list[ActivationChoice]:
        """What was chosen for each joint graph."""
        found = []
        for graph in filter(None, self.graphs):
            search = graph.search
            chosen = graph.chosen or search.plain
            rule = "keep" if graph.chosen is None else "planned"
            bound = search.bound(graph.limit) if graph.limit is not None else None
            floor = search.quick_floor_bound if graph.chosen is None else search.floor_bound
            found.append(describe(search.problem, chosen, search.plain, rule, budget, bound, floor))
        return found


def _peak(plan: Plan) -> int:
    return plan.peak.get("device", 0)


def _beside_graphs(plan: Plan) -> int:
    """Most bytes in use while neither a forward nor a backward runs: what is saved changes nothing there."""
    from .summary import live_use

    use = live_use(plan)
    return max((use[i] for i, step in enumerate(plan.steps) if step.phase == "optimizer"), default=0)


def floor_error(plan: Plan, budget: int, bound: int) -> BudgetError:
    """``plan`` is the smallest that was found; no choice of what is kept has a peak below ``bound``."""
    from .summary import summarize

    peak = _peak(plan)
    held = "; ".join(f"{bytes_text(h.bytes)} {h.role} {h.what}" for h in summarize(plan).holders[:3])
    optimizer = _beside_graphs(plan) >= peak
    what = "the optimizer's step needs" if optimizer else "the step needs"
    proven = f" No choice of what is kept gets below {bytes_text(bound)}." if bound else ""
    less = "An optimizer with less state" if optimizer else "A smaller batch"
    return BudgetError(
        f"{what} {bytes_text(peak)} whatever is recomputed, more than the memory budget of "
        f"{bytes_text(budget)}.{proven}",
        where=f"the peak on {plan.device}, where most is held by: {held}",
        remedy=f"The least budget that works is {peak} bytes ({bytes_text(peak)}). {less} or a narrower dtype needs "
        "less.",
    )


class ParetoPoint(msgspec.Struct, frozen=True):
    """Peak in bytes and predicted seconds of a step; ``bound``: no choice within that peak is faster."""

    peak: int
    seconds: float
    bound: float
    saved_bytes: int


def pareto_curve(planner: BudgetPlanner, plan: Plan) -> list[ParetoPoint]:
    """Time against memory of the model's largest joint graph, from keeping all to the floor. ``plan`` keeps all; what
    it counts beyond the simulation is added to every point."""
    graphs = [graph for graph in planner.graphs if graph is not None]
    if not graphs:
        return []
    search = max(graphs, key=lambda graph: graph.saved_bytes).search
    offset = plan.peak.get("device", 0) - search.plain.peak
    top, low = search.plain.peak, search.least.peak
    found: dict[Key, ParetoPoint] = {}
    for index in range(POINTS):
        limit = top - (top - low) * index // (POINTS - 1)
        chosen = search.within(limit)
        if chosen is None or chosen.key in found:
            continue
        extra = chosen.seconds - search.plain.seconds
        found[chosen.key] = ParetoPoint(
            chosen.peak + offset,
            plan.seconds + extra,
            plan.seconds + min(extra, search.bound(limit) - search.plain.seconds),
            sum(search.problem.values[v].bytes for v in chosen.saved),
        )
    return list(found.values())
