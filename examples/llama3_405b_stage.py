"""One device's share of Llama-3-405B at sequence length 8192: a middle stage of pp=16, one rank of tp=8.

effcc plan examples/llama3_405b_stage.py --train --dtype bf16 --device h100 --memory-budget 17GiB

126 layers over 16 stages are 8 layers a stage at most (Grattafiori et al., The Llama 3 Herd of Models, 2024, table 3
and section 3.3). A rank of tp=8 has 16 of the 128 query heads, one of the 8 key heads and 6656 of the 53248 features of
the MLP; what the ranks compute in parts is added up by an all-reduce in the forward (after attention and after the MLP)
and in the backward (before them; Shoeybi et al., Megatron-LM, 2019). Optimizer state is sharded over the data-parallel
replicas and not counted. Other microbatches that the pipeline has under way hold, each, what this one saves; the budget
is what they leave.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import all_reduce
from torch.nn import functional

HIDDEN, HEAD, HEADS, KEY_HEADS, MLP, LAYERS = 16384, 128, 128, 8, 53248, 8
TENSOR_PARALLEL, SEQUENCE = 8, 8192


def ranks() -> dist.ProcessGroup:
    """Eight ranks of which this process is the first and the others are not there: nothing is sent while a plan is
    made."""
    if not dist.is_initialized():
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=TENSOR_PARALLEL)
    return dist.group.WORLD


class AddForward(torch.autograd.Function):
    """The sum over the ranks; its gradient is the same on all."""

    @staticmethod
    def forward(ctx, x):
        return all_reduce(x, "sum", ranks())

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class AddBackward(torch.autograd.Function):
    """The same on all ranks; its gradient is the sum over them."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return all_reduce(gradient.contiguous(), "sum", ranks())


def rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    half = torch.cat((-x[..., HEAD // 2 :], x[..., : HEAD // 2]), -1)
    return x * angles.cos() + half * angles.sin()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        heads, key_heads = HEADS // TENSOR_PARALLEL, KEY_HEADS // TENSOR_PARALLEL
        self.attention_norm, self.mlp_norm = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.query = nn.Linear(HIDDEN, heads * HEAD, bias=False)
        self.key = nn.Linear(HIDDEN, key_heads * HEAD, bias=False)
        self.value = nn.Linear(HIDDEN, key_heads * HEAD, bias=False)
        self.out = nn.Linear(heads * HEAD, HIDDEN, bias=False)
        self.gate = nn.Linear(HIDDEN, MLP // TENSOR_PARALLEL, bias=False)
        self.up = nn.Linear(HIDDEN, MLP // TENSOR_PARALLEL, bias=False)
        self.down = nn.Linear(MLP // TENSOR_PARALLEL, HIDDEN, bias=False)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, HEAD)).transpose(1, 2)

    def forward(self, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        h = AddBackward.apply(self.attention_norm(x))
        q, k, v = self.heads(self.query(h)), self.heads(self.key(h)), self.heads(self.value(h))
        o = functional.scaled_dot_product_attention(
            rotated(q, angles), rotated(k, angles), v, is_causal=True, enable_gqa=True
        )
        x = x + AddForward.apply(self.out(o.transpose(1, 2).flatten(2)))
        h = AddBackward.apply(self.mlp_norm(x))
        return x + AddForward.apply(self.down(functional.silu(self.gate(h)) * self.up(h)))


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, angles)
        return x


def model() -> Stage:
    ranks()
    return Stage()


def example_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(1, SEQUENCE, HIDDEN, requires_grad=True), torch.zeros(SEQUENCE, HEAD)


def loss(y: torch.Tensor) -> torch.Tensor:
    """Stands for the stages behind: a gradient of the output's size begins the backward."""
    return y.sum()
