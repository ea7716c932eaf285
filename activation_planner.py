"""``memory_budget`` while a graph is compiled: what its forward saves is chosen on the joint graph.

The choice is made by a simulation of the step's memory, which the compiled code may not meet exactly (the region
compiler fuses as it likes). So the plan of what was compiled has the last word: where it needs more than the budget,
the graph is compiled again with as much less to aim at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch.fx as fx

from . import torch_internals
from .codegen.kernel_order import little_memory
from .codegen.library_workspace import traced_workspaces
from .codegen.wrapper_memory import reordered_bytes
from .cost_model.devices import Device
from .errors import EffccError
from .frontend.fx_import import from_fx
from .held_elsewhere import Elsewhere
from .joint_split import prefetches, split_saving, values_saved
from .passes.activation.candidates import Key
from .passes.activation.choice import ActivationChoice, describe
from .passes.activation.host_link import host_link
from .passes.activation.problem import JointProblem, joint_problem
from .passes.activation.search import ActivationSearch
from .token_rows import RowGraph

#: Buffers of a backward that lie between ops of one kernel at most, where neither needs the other: fewer than a
#: transformer's layer has.
NEAR = 16
#: Seconds for the proof that nothing is much smaller than the least budget that a refusal names.
PROOF_SECONDS = 15.0
#: How often a graph is compiled again because the compiled code needs more than the simulation said.
MOST_ATTEMPTS = 6


class NothingFitsError(Exception):
    """No choice of what is kept fits, but more could be fused."""


class OverBudgetError(Exception):
    """The compiled step needs ``peak`` bytes, more than the budget; the next attempt may do better."""

    def __init__(self, peak: int) -> None:
        super().__init__(f"{peak} bytes")
        self.peak = peak


@dataclass
class ActivationPlanner:
    """Splits the joint graphs of one model so that the step stays within ``budget`` bytes."""

    budget: int
    device: Callable[[], Device]
    #: Role of each input of Dynamo's graph.
    roles: Sequence[str] = ()
    #: What the process holds besides the graph.
    elsewhere: Elsewhere = field(default_factory=Elsewhere)
    #: Whether values may be swapped to the host.
    swap: bool = False
    #: By how many bytes compiled code has exceeded what was simulated.
    excess: int = 0
    choice: ActivationChoice | None = None
    notes: list[str] = field(default_factory=list)
    #: Peaks that may not be chosen again: they were compiled, and did not fit.
    refused: list[Key] = field(default_factory=list)
    exhausted: bool = False
    #: Whether freed memory is given back at once, not held for the next value of its size: smaller, and slower where
    #: the system has to clear pages.
    frugal: bool = False
    #: Whether the graphs may be compiled in a way that needs less, so that the floor is not looked for.
    otherwise: Callable[[], bool] = bool
    #: The least that a compiled step needed so far.
    least: int | None = None
    #: Where nothing fits: bytes that no choice can be below.
    proven: int = 0
    #: The search of the last attempt, for which problem, and what torch keeps of it.
    known: tuple[JointProblem, frozenset[int], ActivationSearch] | None = None

    def partition(
        self,
        gm: fx.GraphModule,
        joint_inputs: Any,
        *,
        num_fwd_outputs: int,
        static_lifetime_input_indices: Sequence[int] | None = None,
        **others: Any,
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Torch's ``partition_fn``."""
        static = list(static_lifetime_input_indices or [])

        def by_torch(why: str = "") -> tuple[fx.GraphModule, fx.GraphModule]:
            if why:
                self.notes.append(f"activations are saved as torch chooses: {why}")
            return torch_internals.minimum_cut_partition(
                gm, joint_inputs, num_fwd_outputs=num_fwd_outputs, static_lifetime_input_indices=static, **others
            )

        self.choice = None
        if not torch_internals.prepare_joint(gm):
            return by_torch("the model has checkpoints or effects of its own")
        try:
            problem = self.problem(gm, num_fwd_outputs)
        except EffccError as error:
            return by_torch(error.message)
        split = torch_internals.minimum_cut_partition(
            torch_internals.copy_graph(gm),
            joint_inputs,
            prepared=True,
            num_fwd_outputs=num_fwd_outputs,
            static_lifetime_input_indices=static,
            **others,
        )
        search = self._search(problem, values_saved(split[0], problem, num_fwd_outputs))
        plain = search.plain
        if plain.key not in self.refused and plain.peak + self.excess <= self.budget:
            self.choice = describe(problem, plain, plain, "keep", self.budget)
            return split
        limit = self.budget - self.excess
        chosen = None if self.exhausted else search.within(limit, self.refused)
        if chosen is None and self.otherwise():
            raise NothingFitsError
        if chosen is None:
            # Nothing is said to fit: the compiled code of the smallest has the last word, and says what the floor is.
            self.exhausted = True
            chosen = search.smallest
            self.proven = max(self.proven, search.prove_floor(PROOF_SECONDS))
        self.choice = describe(problem, chosen, plain, "planned", self.budget, search.bound(limit), search.floor_bound)
        return split_saving(
            gm,
            problem,
            chosen.saved,
            num_fwd_outputs,
            static,
            chosen.swapped,
            prefetches(problem, chosen),
            chosen.shares,
        )

    def _search(self, problem: JointProblem, kept: frozenset[int]) -> ActivationSearch:
        """The search for this problem; that of the attempt before knows what it has found."""
        if self.known is None or self.known[:2] != (problem, kept):
            link = host_link(self.device()) if self.swap else None
            self.known = problem, kept, ActivationSearch(problem, kept, link)
        return self.known[2]

    def problem(self, gm: fx.GraphModule, num_fwd_outputs: int) -> JointProblem:
        inputs = gm.graph.find_nodes(op="placeholder")
        primals = [node for node in inputs if torch_internals.is_primal(node)]
        known = list(self.roles) if len(self.roles) == len(primals) else ["input"] * len(primals)
        roles = iter(known)
        named = [next(roles) if torch_internals.is_primal(node) else "tangent" for node in inputs]
        graph = from_fx(gm, "joint", "joint", roles=named)
        own = traced_workspaces(gm)
        return joint_problem(
            graph,
            self.device(),
            num_fwd_outputs,
            backward_only=torch_internals.backward_only_nodes(gm),
            outside=self.elsewhere.bytes,
            outside_loss=True,
            workspaces=lambda node, table: own.get(node.name, reordered_bytes(node, table)),
            rows=RowGraph(gm).facts() if self.swap else None,
        )

    def fusions(self, phase: str) -> AbstractContextManager[Any]:
        """Inside, what is computed again for one layer does not become a kernel with another layer's: its results would
        wait for their turn in memory that the simulation does not count. Nor do a product's operands wait for what it
        is added to, and kernels run in an order of little memory. Results are written over all that the simulation
        says, in the forward too. Where all counts, nothing is fused across a library's calls, and no random numbers are
        stored."""
        if phase == "inference" or self.choice is None or self.choice.rule != "planned":
            return nullcontext()
        stack = ExitStack()
        stack.enter_context(torch_internals.written_over_through_rows())
        if phase == "forward":
            return stack
        stack.enter_context(torch_internals.fusions_within(NEAR, between_calls=self.exhausted))
        stack.enter_context(torch_internals.products_within(NEAR))
        stack.enter_context(little_memory())
        if self.exhausted:
            stack.enter_context(torch_internals.inlined_random())
        return stack

    def exceeded(self, peak: int) -> bool:
        """The compiled step needs ``peak`` bytes, everything counted. Returns whether another attempt is worth it."""
        self.least = peak if self.least is None else min(self.least, peak)
        # What is compiled may need a little less than the simulation says, and what is there is no proof's match.
        self.proven = min(self.proven, self.least)
        if self.choice is None:
            return False
        if not self.frugal:
            self.frugal = True
            return True
        if self.exhausted:
            return False
        self.refused.append((self.choice.saved, self.choice.swapped, self.choice.shares))
        self.excess = max(self.excess, peak - self.choice.simulated_peak)
        return True
