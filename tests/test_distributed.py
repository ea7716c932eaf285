"""Compiled models in several processes over gloo: data parallel (DDP), fully sharded (FSDP2), DTensor, random numbers.

Each process compares with an eager copy of the same training; the parent sees the distances.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from subprocesses import STEP, run_ranks

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")

HEAD = (
    STEP
    + """
import os
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()

def train(model, call, steps=3):
    # Different rows on each rank, the same for the compiled model and for the eager one.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(100 + rank)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(4, 8, dtype=torch.float64, generator=generator)
        call(x).square().mean().backward()
        optimizer.step()

def finish(**more):
    tell(rank=rank, **more)
    dist.barrier()
    dist.destroy_process_group()
"""
)


def in_processes(code: str, cache: Path, count: int = 2) -> list[Any]:
    """``code`` after HEAD in ``count`` ranks; what each tells."""
    found = run_ranks(HEAD + code, cache, count, 500)
    assert sorted(each["rank"] for each in found) == list(range(count))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("order", ["DDP inside", "DDP outside"])
def test_data_parallel(tmp_path: Path, order: str) -> None:
    """``torch.compile(DDP(model))``, which Dynamo cuts into a graph for each bucket of gradients; ``DDP(compiled)``."""
    found = in_processes(
        f"""
torch.manual_seed(0)
plain = Tower().double()
model = copy.deepcopy(plain)
if {order == "DDP inside"}:
    dist._DEFAULT_FIRST_BUCKET_BYTES = 512
    run = torch.compile(DistributedDataParallel(model, bucket_cap_mb=0.001), backend="effcc")
else:
    run = DistributedDataParallel(torch.compile(model, backend="effcc"))
train(model, run)
train(plain, DistributedDataParallel(plain))
pairs = list(zip(model.parameters(), plain.parameters(), strict=True))
flat = torch.cat([p.detach().flatten() for p in model.parameters()])
other = flat.clone()
dist.broadcast(other, 0)
finish(distance=max((a - b).abs().max().item() for a, b in pairs), apart=(flat - other).abs().max().item())
""",
        tmp_path,
    )
    for each in found:
        assert each["distance"] < 1e-12 and each["apart"] == 0
        assert each["graphs"] > 0 and each["fallbacks"] == []


@pytest.mark.slow
def test_accumulation_without_synchronisation(tmp_path: Path) -> None:
    """``no_sync``: two local backwards, then one that adds the gradients of all ranks."""
    found = in_processes(
        """
torch.manual_seed(0)
plain = Tower().double()
model = copy.deepcopy(plain)
calls = [torch.compile(DistributedDataParallel(model), backend="effcc"), DistributedDataParallel(plain)]
torch.manual_seed(rank)
batches = [torch.randn(4, 8, dtype=torch.float64) for _ in range(3)]
for call in calls:
    for index, x in enumerate(batches):
        with call.no_sync() if index < 2 else contextlib.nullcontext():
            call(x).square().mean().backward()
pairs = list(zip(model.parameters(), plain.parameters(), strict=True))
finish(distance=max((a.grad - b.grad).abs().max().item() for a, b in pairs))
""".replace("torch.manual_seed(0)", "import contextlib\ntorch.manual_seed(0)", 1),
        tmp_path,
    )
    for each in found:
        assert each["distance"] < 1e-12 and each["graphs"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("what", ["model", "layers"])
def test_fully_sharded(tmp_path: Path, what: str) -> None:
    """FSDP2 (``fully_shard``): parameters are DTensors, gathered before each layer. The whole model compiled, or its
    layers. Its hooks break graphs, which is torch's own way."""
    found = in_processes(
        f"""
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

torch.manual_seed(0)
plain = Tower().double()
model = copy.deepcopy(plain)
mesh = init_device_mesh("cpu", (world,))
for layer in model.layers:
    if {what == "layers"}:
        layer.compile(backend="effcc")
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
run = torch.compile(model, backend="effcc") if {what == "model"} else model
train(model, run)
train(plain, DistributedDataParallel(plain))
pairs = list(zip(model.parameters(), plain.parameters(), strict=True))
finish(distance=max((a.full_tensor() - b).abs().max().item() for a, b in pairs))
""",
        tmp_path,
    )
    for each in found:
        assert each["distance"] < 1e-12 and each["graphs"] > 0


@pytest.mark.slow
def test_tensor_parallel(tmp_path: Path) -> None:
    """DTensor: the two products of each layer split by columns and by rows over the ranks."""
    found = in_processes(
        """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

torch.manual_seed(0)
plain = Tower().double()
model = copy.deepcopy(plain)
mesh = init_device_mesh("cpu", (world,))
for layer in model.layers:
    parallelize_module(layer, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
run = torch.compile(model, backend="effcc")
torch.manual_seed(5)
x = torch.randn(4, 8, dtype=torch.float64)
found, wanted = run(x), plain(x)
found.square().sum().backward()
wanted.square().sum().backward()
whole = lambda value: value.full_tensor() if isinstance(value, DTensor) else value
pairs = [(found, wanted), *((a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))]
finish(distance=max((whole(a) - b).abs().max().item() for a, b in pairs))
""",
        tmp_path,
    )
    for each in found:
        assert each["distance"] < 1e-11 and each["graphs"] > 0


@pytest.mark.slow
def test_collectives_and_random_numbers(tmp_path: Path) -> None:
    """An all-reduce inside the graph; dropout draws other masks on each rank, and the same ones for the same seed."""
    found = in_processes(
        """
import torch.distributed._functional_collectives as collectives

def run(x):
    total = collectives.all_reduce(x * (rank + 1), "sum", dist.group.WORLD)
    return total.sin(), torch.nn.functional.dropout(torch.ones(64, dtype=torch.float64), 0.5)

call = torch.compile(run, backend="effcc", fullgraph=True)
x = torch.arange(4, dtype=torch.float64)
masks = []
for seed in (rank, rank, 10 + rank):
    torch.manual_seed(seed)
    total, mask = call(x)
    masks.append((mask != 0).tolist())
wanted = (x * sum(range(1, world + 1))).sin()
finish(distance=(total - wanted).abs().max().item(), masks=masks)
""",
        tmp_path,
    )
    for each in found:
        assert each["distance"] < 1e-14 and each["graphs"] > 0
        assert each["masks"][0] == each["masks"][1] != each["masks"][2]
        assert 10 < sum(each["masks"][0]) < 54
    assert found[0]["masks"][0] != found[1]["masks"][0]
