"""Plans made offline, for another device, accepted where they fit and refused by name where they do not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import effcc
import models
import pytest
import torch
import torch.nn.functional as F
from effcc.backend import input_role
from effcc.errors import PlanError
from effcc.frontend.capture import capture
from effcc.frontend.fx_import import from_fx
from effcc.frontend.model_file import ModelSpec
from effcc.frontend.repeated_modules import trace_repeated_modules_once
from effcc.ir.graph import Graph
from effcc.ir.parser import parse_graph
from effcc.ir.plan_file import load_plan
from effcc.ir.printer import print_graph
from effcc.ir.structural_hash import graph_hash, op_hashes
from effcc.plan_matching import check_plan
from subprocesses import run
from torch import nn

pytestmark = pytest.mark.usefixtures("clean_compiler")

DATA = Path(__file__).parent / "data"


class Recorded(nn.Module):
    """A language model whose code reads its inputs' device: positions, masks, autocast. ``data/cuda_capture.ir`` is its
    Dynamo graph in training as a CUDA machine would see it; no machine with a GPU has confirmed that yet
    (``test_record_the_capture`` does)."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mix, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            heads = self.mix(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask=mask)
            return x + F.dropout(self.out(mixed.transpose(1, 2).flatten(-2)), 0.1, self.training)

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(32, 16), nn.Embedding(12, 16)
        self.layers = nn.ModuleList([Recorded.Layer() for _ in range(3)])
        self.head = nn.Linear(16, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        mask = places[:, None] >= places
        x = self.tokens(ids) + self.places(places) + torch.zeros(16).to(ids.device)
        for layer in self.layers:
            x = layer(x, mask)
        with torch.autocast(ids.device.type, dtype=torch.bfloat16):
            return self.head(x)


def recorded_spec() -> ModelSpec:
    return ModelSpec("recorded", Recorded, lambda: ((torch.zeros(2, 12, dtype=torch.long),), {}))


def zoo_spec(name: str) -> ModelSpec:
    def inputs() -> tuple[tuple[()], dict[str, torch.Tensor]]:
        return (), models.build(name).inputs

    return ModelSpec(name, lambda: models.build(name).model, inputs)


def graphs_of_torch_compile(spec: ModelSpec, *, train: bool) -> list[Graph]:
    """What the backend is handed when the real model runs on real inputs."""
    found = []

    @trace_repeated_modules_once
    def spy(gm: torch.fx.GraphModule, inputs: Any, **_: Any) -> Callable[..., Any]:
        roles = [input_role(node) for node in gm.graph.find_nodes(op="placeholder")]
        found.append(from_fx(gm, "captured", "joint", roles=roles))
        return gm.forward

    args, kwargs = spec.example_inputs()
    with torch.enable_grad() if train else torch.no_grad():
        torch.compile(spec.build_model().train(train), backend=spy)(*args, **kwargs)
    return found


def offline(spec: ModelSpec, *, train: bool, device: str = "cuda") -> list[Graph]:
    return [frame.dynamo for frame in capture(spec, train=train, device=device).frames]


# Structure -----------------------------------------------------------------------------------------------------------

NAMES = [pytest.param(name, marks=() if name == "gpt2" else pytest.mark.slow) for name in (*models.ZOO, "recorded")]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_offline_capture_is_what_torch_compile_captures(name: str, train: bool) -> None:
    spec = recorded_spec() if name == "recorded" else zoo_spec(name)
    here = graphs_of_torch_compile(spec, train=train)
    torch._dynamo.reset()
    there = offline(spec, train=train)
    assert [op_hashes(graph) for graph in here] == [op_hashes(graph) for graph in there]
    assert [graph_hash(graph) for graph in here] == [graph_hash(graph) for graph in there]


def cuda_capture() -> Graph:
    return parse_graph((DATA / "cuda_capture.ir").read_text())


def test_a_capture_for_cuda_is_equal_in_structure() -> None:
    recorded = cuda_capture()
    text = print_graph(recorded)
    assert "@cuda:0" in text and "device(cuda:0)" in text and "cpu" not in text
    (here,) = offline(recorded_spec(), train=True, device="cpu")
    assert "cuda" not in print_graph(here)
    assert op_hashes(here) == op_hashes(recorded)
    assert graph_hash(here) == graph_hash(recorded)


@pytest.mark.skipif("EFFCC_RECORD" not in os.environ, reason="set EFFCC_RECORD=1 on a CUDA machine to record again")
def test_record_the_capture() -> None:
    spec = recorded_spec()
    (ids,), _ = spec.example_inputs()
    moved = ModelSpec("recorded", lambda: Recorded().cuda(), lambda: ((ids.cuda(),), {}))
    (graph,) = graphs_of_torch_compile(moved, train=True)
    (DATA / "cuda_capture.ir").write_text(print_graph(graph))


@pytest.mark.slow
def test_inference_and_training_are_told_apart() -> None:
    """Dropout, and in-place statistics, make other graphs of one model."""
    for spec in (recorded_spec(), zoo_spec("resnet")):
        (training,), (inference,) = (offline(spec, train=train) for train in (True, False))
        assert graph_hash(training) != graph_hash(inference)


# Plans ---------------------------------------------------------------------------------------------------------------

MODEL_FILE = """
import torch
from models import Tower
model = lambda: Tower(width=16, depth=4)
example_inputs = (torch.randn(6, 16),)
wide = lambda: Tower(width=24, depth=4)
wide_inputs = (torch.randn(6, 24),)
deep = lambda: Tower(width=16, depth=5)
"""


@pytest.fixture(scope="module")
def plan_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan for an H200, made by a process of its own, in which nothing is hashed as here."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "tower.py").write_text(MODEL_FILE)
    file, plan = str(folder / "tower.py"), str(folder / "tower.effcc")
    code = f"import effcc; effcc.plan({file!r}, train=True, device='h200').save({plan!r}); print('{{}}')"
    run(code, folder / "cache", {"PYTHONHASHSEED": "4711", "EFFCC_CACHE_DIR": os.environ["EFFCC_CACHE_DIR"]})
    return folder / "tower.effcc"


def trained(model: nn.Module, x: torch.Tensor, **compile_options: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    output = torch.compile(model, **compile_options)(x)
    output.square().sum().backward()
    return output.detach(), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_a_plan_for_another_device_is_accepted(plan_path: Path) -> None:
    planned = load_plan(plan_path).plan
    assert planned.device == "h200"
    model, x = models.Tower(width=16, depth=4), torch.randn(6, 16)
    wanted = trained(model, x, backend="eager")
    for parameter in model.parameters():
        parameter.grad = None
    found = trained(model, x, backend="effcc", options={"plan": str(plan_path)})
    torch.testing.assert_close(found, wanted)
    reports = effcc.reports()
    assert len(reports) == 2 and all(report.plan == planned for report in reports)


@pytest.mark.slow
def test_the_budget_of_a_plan_is_kept_where_it_runs(tmp_path: Path) -> None:
    """Values are recomputed as the plan says, without the option being given again."""
    x = torch.randn(2048, 32)

    def build() -> nn.Module:
        return nn.Sequential(*(models.Block(32) for _ in range(3)))

    free = effcc.plan(build(), (x,), train=True)
    budget = int(free.plan.peak["device"] * 0.8)
    planned = effcc.plan(build(), (x,), train=True, memory_budget=budget)
    planned.save(tmp_path / "p.effcc")
    trained(build(), x, backend="effcc", options={"plan": str(tmp_path / "p.effcc")})
    choice = effcc.reports()[-1].activation
    assert choice is not None and choice.saved_bytes < choice.plain_saved_bytes


@pytest.mark.parametrize(
    ("model", "width", "where"),
    [
        (lambda: models.Tower(width=24, depth=4), 24, "input %l_x_: f32[6,24]"),
        (lambda: models.Tower(width=16, depth=5), 16, "%l_self_modules_"),
        (lambda: nn.Sequential(nn.Linear(16, 4), nn.Tanh()), 16, "%l_fn_modules_0_parameters_weight_: f32[4,16]"),
    ],
)
def test_a_plan_for_another_model_is_refused(
    plan_path: Path, model: Callable[[], nn.Module], width: int, where: str
) -> None:
    with pytest.raises(Exception, match="made for another graph") as caught:
        trained(model(), torch.randn(6, width), backend="effcc", options={"plan": str(plan_path)})
    inner = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(inner, PlanError)
    assert where in inner.message and str(plan_path) in inner.where


def test_the_first_op_that_differs_is_named() -> None:
    """Of a model that differs in one activation, the activation, with its line."""

    class Other(models.Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(self.dropout(F.silu(self.up(self.norm(x)))))

    def build() -> nn.Module:
        tower = models.Tower(width=16, depth=2)
        tower.layers[1] = Other(16)
        return tower

    x = torch.randn(6, 16)
    planned = effcc.plan(models.Tower(width=16, depth=2), (x,), train=True).plan
    (graph,) = offline(ModelSpec("other", build, lambda: ((x,), {})), train=True)
    with pytest.raises(
        PlanError, match=r"op %\w+.* = torch.nn.functional.silu at \S*test_plan_matching.py:\d+ differs"
    ):
        check_plan(planned, graph)
    (longer,) = offline(ModelSpec("longer", lambda: nn.Sequential(build()), lambda: ((x,), {})), train=True)
    with pytest.raises(PlanError, match="silu"):
        check_plan(planned, longer)


def test_a_graph_that_ends_early_or_late_is_refused() -> None:
    x = torch.randn(6, 16)
    short, long = (nn.Sequential(nn.Linear(16, 16), *[nn.Tanh()] * count) for count in (1, 2))
    graphs = [offline(ModelSpec("m", lambda m=model: m, lambda: ((x,), {})), train=True)[0] for model in (short, long)]
    with pytest.raises(PlanError, match="1 more op"):
        check_plan(effcc.plan(long, (x,), train=True).plan, graphs[0])
    with pytest.raises(PlanError, match=r"op %\w+.*tanh.* comes after the last op"):
        check_plan(effcc.plan(short, (x,), train=True).plan, graphs[1])


def test_a_plan_made_on_cpu_fits_the_recorded_cuda_capture() -> None:
    planned = effcc.plan(Recorded(), (torch.zeros(2, 12, dtype=torch.long),), train=True, device="h200")
    recorded = cuda_capture()
    assert check_plan(planned.plan, recorded).graph_hash == graph_hash(recorded)
    changed = print_graph(recorded).replace("_operator.ge(", "_operator.gt(", 1)
    with pytest.raises(PlanError, match=r"op %mask: b1\[12,12\]@cuda:0 = _operator.gt at .* differs"):
        check_plan(planned.plan, parse_graph(changed))
