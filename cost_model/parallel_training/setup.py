"""What a training step is asked to be: model, mesh, microbatches, what is recomputed, how state is kept."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import OptionError
from .mesh import Mesh
from .shape import TransformerShape

RECOMPUTE = ("none", "selective", "full")
#: Bytes of an element.
DTYPES = {"f32": 4, "bf16": 2, "f16": 2}


@dataclass(frozen=True)
class Training:
    """One training step.

    ``samples`` in each of ``microbatches`` that a data rank runs in turn. ``recompute``: ``selective`` repeats the
    attention's inner products (Korthikanti et al., 2022), ``full`` each layer from its input. ``interleave``: stages of
    each pipeline rank. ``zero``: 0 replicates the optimizer over ``dp``, 1 shards its state, 2 gradients too; ``fsdp``
    shards everything. ``fused_attention``: one kernel that writes no scores. ``overlap``: gradients are reduced beside
    the backward. ``sharded_transfers``: each tensor rank sends its share to the next stage (always so with
    ``sequence_parallel``). ``states``: optimizer's f32 numbers
    for each parameter; ``gradient``: bytes that its gradient is kept and summed in.
    ``asynchronous_sums``: the tensor group's backward sums run beside the weights' gradients; ``fused_accumulation``:
    products add to the gradients of the microbatches before, with no kernel more (both are Megatron-LM's defaults).
    """

    shape: TransformerShape
    mesh: Mesh
    samples: int = 1
    microbatches: int = 1
    recompute: str = "none"
    sequence_parallel: bool = True
    interleave: int = 1
    zero: int = 0
    dtype: str = "bf16"
    fused_attention: bool = True
    overlap: bool = True
    sharded_transfers: bool = True
    states: int = 2
    gradient: int = 4
    asynchronous_sums: bool = True
    fused_accumulation: bool = True

    def __post_init__(self) -> None:
        """Raises OptionError for what cannot be run."""
        shape, mesh = self.shape, self.mesh
        checks = (
            (self.recompute in RECOMPUTE, f"recompute is {self.recompute!r}", f"one of {', '.join(RECOMPUTE)}"),
            (self.dtype in DTYPES, f"dtype {self.dtype!r} is not trained in", f"one of {', '.join(DTYPES)}"),
            (self.samples > 0 and self.microbatches > 0, "a step has at least one sample", "give positive numbers"),
            (shape.heads % mesh.tp == 0, f"tp={mesh.tp} does not divide {shape.heads} heads", "choose a divisor"),
            (
                shape.layers % (mesh.pp * self.interleave) == 0 or self.interleave == 1,
                f"{shape.layers} layers are no multiple of {mesh.pp} ranks x {self.interleave} stages",
                "choose another interleaving",
            ),
            (mesh.pp <= shape.layers, f"pp={mesh.pp} is more than {shape.layers} layers", "use fewer stages"),
            (self.interleave == 1 or mesh.pp > 1, "stages are interleaved without a pipeline", "give pp=2 or more"),
            (mesh.ep == 1 or (shape.experts > 0 and shape.experts % mesh.ep == 0),
             f"ep={mesh.ep} does not divide {shape.experts} experts", "choose a divisor"),
            (shape.sequence % mesh.cp == 0, f"cp={mesh.cp} does not divide {shape.sequence} tokens",
             "choose a divisor"),
            (self.zero in (0, 1, 2), f"zero is {self.zero}", "0, 1 or 2; fsdp shards the parameters as well"),
        )  # fmt: skip
        for right, what, remedy in checks:
            if not right:
                raise OptionError(what, remedy=remedy)

    @property
    def tokens(self) -> int:
        """Of a microbatch, on one rank."""
        return self.samples * self.shape.sequence // self.mesh.cp

    @property
    def element(self) -> int:
        """Bytes of an activation's element."""
        return DTYPES[self.dtype]

    @property
    def batch(self) -> int:
        """Samples of the step, of all ranks."""
        return self.samples * self.microbatches * self.mesh.data

    @property
    def layers_of_rank(self) -> int:
        """Of the rank with the most."""
        return -(-self.shape.layers // self.mesh.pp)

    @property
    def sequence_shards(self) -> int:
        """Ranks that share what lies between the tensor-parallel regions."""
        return self.mesh.tp if self.sequence_parallel else 1
