"""Put the experts of a transformers model where a placement says, and run it on all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ...errors import ExpertParallelError
from ..mesh_layout import MeshLayout, summed
from ..rank_watch import RankWatch
from .coherent import CoherentForward
from .exchange import Wire
from .experts import ParallelExperts
from .layout import digest, layouts
from .predicted_bytes import ModelSizes, predict_bytes

MODES = ("home", "coherent", "auto")


class ExpertParallel:
    """A model whose experts are spread over the ranks of a group. Call it on this rank's own sequences.

    - ``home``: a token's attention stays on the rank its sequence came to; each MoE layer sends it to its experts and
      back (two exchanges). Any model whose MoE blocks call ``experts(hidden, indices, weights)``.
    - ``coherent``: a token stays where (most of) its last experts were; keys and values are gathered on all ranks. One
      exchange a layer for top-1 routing, two otherwise. Mixtral and Qwen3-MoE without padding and without a cache.
    - ``auto``: the first call runs at home and counts; later ones use the mode for which fewer bytes are predicted.
    """

    def __init__(
        self, model: torch.nn.Module, wire: Wire, blocks: dict[str, ParallelExperts], mode: str,
        replicas: dist.ProcessGroup | None = None,
    ) -> None:  # fmt: skip
        self.model, self.wire, self.blocks, self.mode = model, wire, blocks, mode
        #: The processes that hold the same experts, where there are several.
        self.replicas = replicas
        self.coherent = CoherentForward(model, blocks, wire) if mode != "home" and _supported(model) else None
        if mode == "coherent" and self.coherent is None:
            raise ExpertParallelError(
                f"{type(model).__name__} cannot run context-coherent", where="parallelize_experts",
                remedy="Mixtral and Qwen3-MoE of transformers can; use mode='home'",
            )  # fmt: skip
        self.chosen = mode if mode != "auto" else "home" if self.coherent is None else ""

    @property
    def bytes_sent(self) -> int:
        """By this rank to others, in both directions of all exchanges so far."""
        return self.wire.sent

    def __call__(self, input_ids: torch.Tensor, **more: Any) -> Any:
        """What the model returns for this rank's sequences; in coherent mode an object with ``logits``."""
        if self.chosen == "coherent":
            assert self.coherent is not None
            if more:
                raise ExpertParallelError(
                    f"the coherent mode takes input_ids alone, not {', '.join(more)}", remedy="use mode='home'"
                )
            return self.coherent(input_ids)
        outputs = self.model(input_ids=input_ids, **more)
        if not self.chosen:
            self.chosen = self._cheaper()
        return outputs

    def choices(self) -> torch.Tensor:
        """[tokens of all ranks, layers, k] experts of the last forward, gathered, tokens in order of their ranks."""
        chosen = []
        for block in self.blocks.values():
            assert block.choices is not None
            chosen.append(block.choices)
        own = torch.stack(chosen, dim=1).cpu()
        gathered: list[Any] = [None] * self.wire.ranks
        self.wire.watch.collective(
            "gathering what was routed where", lambda: dist.all_gather_object(gathered, own, group=self.wire.group)
        )
        self.homes = torch.repeat_interleave(torch.arange(self.wire.ranks), torch.tensor([len(g) for g in gathered]))
        return torch.cat(gathered)

    def predicted(self, choices: torch.Tensor, homes: torch.Tensor) -> dict[str, int]:
        """Bytes that all ranks send together in one forward of either mode, for tokens routed so."""
        sizes = ModelSizes.of(self.model, next(iter(self.blocks.values())).weight_itemsize)
        layouts_ = [block.layout for block in self.blocks.values()]
        return {mode: predict_bytes(choices, homes, layouts_, self.wire.ranks, sizes, mode) for mode in MODES[:2]}

    def _cheaper(self) -> str:
        choices = self.choices()
        predicted = self.predicted(choices, self.homes)
        return min(predicted, key=lambda mode: (predicted[mode], mode != "home"))

    def reduce_gradients(self) -> None:
        """After the backward of each rank's share of the loss: add up the gradients of what all ranks have, and of the
        copies of each expert. Each rank's loss must be its part of the sum (or its mean, times its share of tokens)."""
        mine = {id(p) for block in self.blocks.values() for p in block.experts.parameters()}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and id(parameter) not in mine:
                self._sum(parameter, f"adding the gradients of {name}", self.wire.watch.group)
        for name, block in self.blocks.items():
            if self.replicas is not None:
                for parameter in block.experts.parameters():
                    self._sum(parameter, f"adding the gradients of {name} over replicas", self.replicas)
            if len(block.layout.ranks[0]) == 1:
                continue
            experts = len(block.layout.copies)
            for parameter in block.experts.parameters():
                whole = parameter.new_zeros((experts, *parameter.shape[1:]))
                if parameter.grad is not None:
                    whole[list(block.held)] = parameter.grad
                self._all_reduce(whole, f"adding the gradients of the copies of {name}", self.wire.group)
                parameter.grad = whole[list(block.held)].clone()

    def _sum(self, parameter: torch.nn.Parameter, step: str, group: dist.ProcessGroup) -> None:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        self._all_reduce(parameter.grad, step, group)

    def _all_reduce(self, value: torch.Tensor, step: str, group: dist.ProcessGroup) -> None:
        self.wire.watch.collective(step, lambda: summed(value, group))

    @contextlib.contextmanager
    def counting(self) -> Iterator[Callable[[], int]]:
        """A function that says how many bytes this rank has sent since."""
        begin = self.wire.sent
        yield lambda: self.wire.sent - begin


def parallelize_experts(
    model: torch.nn.Module,
    slots: Sequence[Sequence[int]],
    *,
    group: dist.ProcessGroup | None = None,
    mesh: DeviceMesh | None = None,
    ranks: int | None = None,
    mode: str = "auto",
    time_limit: float = 60.0,
) -> ExpertParallel:
    """Replace the experts of each MoE block of ``model``, in place, by those of this rank. Called on all ranks at once.

    Args:
        slots: [layers][slots] experts in device order, as ``effcc place-experts --json`` prints them.
        group: the processes that share the experts; all, if None.
        mesh: instead of a group, over all processes, with axes ``ep`` (they share the experts) and ``dp`` (replicas of
            that); each process has sequences of its own, and ``reduce_gradients`` adds up over all of them.
        ranks: that the placement was made for; checked, if given.
        mode: ``home``, ``coherent`` or ``auto``, see ExpertParallel.
        time_limit: seconds after which a rank that does not answer ends the others, which then name it.

    Raises:
        ExpertParallelError: the placement does not fit the model or the group, or differs between ranks.
    """
    if mode not in MODES:
        raise ExpertParallelError(f"unknown mode {mode!r}", remedy=f"known: {', '.join(MODES)}")
    if not dist.is_initialized():
        raise ExpertParallelError(
            "there is no process group", remedy="call torch.distributed.init_process_group first (torchrun)"
        )
    if group is not None and mesh is not None:
        raise ExpertParallelError("both a group and a mesh", remedy="give one of them")
    layout = MeshLayout.of(mesh, "ep", ExpertParallelError) if mesh is not None else None
    world = dist.get_world_size(group) if layout is None else layout.ranks
    if ranks is not None and ranks != world:
        raise ExpertParallelError(
            f"the placement is for {ranks} ranks, the group has {world}",
            remedy=f"start {ranks} processes, or place anew with --ranks {world}",
        )
    watch = RankWatch(
        time_limit, ExpertParallelError,
        "see that rank's own output; a larger time limit is an argument of parallelize_experts", group,
    )  # fmt: skip
    watch.check_equal(
        "placement, mode or model", digest(slots, mode, _shapes(model)),
        "give all ranks the same placement file and build the same model on each",
    )  # fmt: skip
    found = _moe_blocks(model)
    if len(found) != len(slots):
        raise ExpertParallelError(
            f"the placement has {len(slots)} layers, the model has {len(found)} MoE layers",
            remedy="give a placement made from a trace of this model",
        )
    own, replicas = watch.group, None
    if layout is not None and layout.replicas > 1:
        patience = timedelta(seconds=time_limit)
        row = layout.row_group(patience)
        assert row is not None
        own, replicas = row, layout.replica_group(patience)
    wire = Wire(own, watch)
    blocks = {}
    for (name, block), chosen in zip(found.items(), slots, strict=True):
        placed = layouts([chosen], world, _count(block.experts))[0]
        blocks[name] = block.experts = ParallelExperts(block.experts, placed, wire, name)
    return ExpertParallel(model, wire, blocks, mode, replicas)


def _moe_blocks(model: torch.nn.Module) -> dict[str, Any]:
    """Modules whose child ``experts`` holds all experts in parameters of shape [experts, ...]."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        if isinstance(experts, torch.nn.Module) and _count(experts):
            found[name] = module
    if not found:
        raise ExpertParallelError(
            f"{type(model).__name__} has no MoE layer whose experts can be spread",
            remedy="its blocks need a child `experts` with parameters [experts, ...], as transformers' Mixtral has",
        )
    return found


def _count(experts: torch.nn.Module) -> int:
    sizes = {int(p.shape[0]) for p in experts.parameters(recurse=False) if p.dim() >= 2}
    named = int(getattr(experts, "num_experts", 0) or 0)
    return named if named in sizes else 0


def _shapes(model: torch.nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


def _supported(model: torch.nn.Module) -> bool:
    return type(model).__name__ in ("MixtralForCausalLM", "Qwen3MoeForCausalLM")
