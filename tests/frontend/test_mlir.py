"""MLIR out and in: ``--emit mlir``, and a torch-dialect file as the model of a plan. Needs the extra ``mlir``, except
for the error without it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import models
import pytest
import torch
from effcc.errors import CaptureError, MissingExtraError, ModelFileError, OptionError
from effcc.frontend.capture import Captured, capture
from effcc.frontend.mlir import emit_mlir
from effcc.frontend.model_file import load_model_file
from effcc.ir.graph import Graph
from effcc.ir.parser import parse_graph
from effcc.ir.printer import print_graph
from effcc.ir.types import TensorType
from effcc.ir.verifier import verify
from torch import nn

needs_mlir = pytest.mark.skipif(importlib.util.find_spec("torch_mlir") is None, reason="needs the extra mlir")

ZOO_FILE = """
import models
model = lambda: models.build({name!r}).model
example_inputs = lambda: models.build({name!r}).inputs
loss = models.loss_of
targets = lambda: (models.build({name!r}).target,)
"""


@pytest.fixture
def zoo_file(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / f"{request.param}.py"
    path.write_text(ZOO_FILE.format(name=request.param))
    return path


def read(path: Path, *, train: bool = False, optimizer: str | None = None) -> Captured:
    return capture(load_model_file(str(path)), train=train, optimizer=optimizer)


PRODUCTS = tuple(f"aten.{name}.default" for name in ("mm", "addmm", "bmm", "convolution"))


def products(graph: Graph) -> list[tuple[object, ...]]:
    """Shapes of all matrix products and convolutions, in order."""
    return [node.type.shape for node in graph.nodes if node.op in PRODUCTS and isinstance(node.type, TensorType)]


# Without the extra ---------------------------------------------------------------------------------------------------


@pytest.fixture
def without_torch_mlir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_mlir", None)
    monkeypatch.setitem(sys.modules, "torch_mlir.fx", None)


@pytest.mark.usefixtures("without_torch_mlir")
@pytest.mark.parametrize("zoo_file", ["resnet"], indirect=True)
def test_without_torch_mlir_the_error_names_the_extra(zoo_file: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingExtraError, match=r"effcc\[mlir\]"):
        emit_mlir(str(zoo_file), tmp_path / "plan.effcc", False)
    assert not list(tmp_path.glob("*.mlir"))
    graph = tmp_path / "graph.mlir"
    graph.write_text("module {}\n")
    with pytest.raises(MissingExtraError, match=r"effcc\[mlir\]"):
        read(graph)


# Out -----------------------------------------------------------------------------------------------------------------


@needs_mlir
@pytest.mark.parametrize("zoo_file", ["gpt2", "resnet"], indirect=True)
def test_a_training_step_in_both_dialects(zoo_file: Path, tmp_path: Path) -> None:
    emitted = emit_mlir(str(zoo_file), tmp_path / "out" / "plan.effcc", True)
    assert emitted.not_lowered == ()
    text = emitted.torch_dialect.read_text()
    assert emitted.torch_dialect.name == "plan.mlir"
    assert "func.func @forward_0(" in text and "func.func @backward_0(" in text and "torch.aten." in text
    assert emitted.linalg is not None and emitted.linalg.name == "plan.linalg.mlir"
    lowered = emitted.linalg.read_text()
    assert "linalg.generic" in lowered and "torch.aten." not in lowered
    assert "@forward_0(" in lowered and "@backward_0(" in lowered


@needs_mlir
def test_a_function_that_cannot_be_lowered_is_named(tmp_path: Path) -> None:
    """The torch dialect is written all the same, with what can be lowered of the rest."""
    (tmp_path / "eig.py").write_text(
        "import torch\nclass M(torch.nn.Module):\n    def forward(self, x):\n        return torch.linalg.eigvalsh(x)\n"
        "model = M\nexample_inputs = (torch.eye(4),)\n"
    )
    emitted = emit_mlir(str(tmp_path / "eig.py"), tmp_path / "eig.effcc", False)
    assert emitted.torch_dialect.exists() and emitted.linalg is None
    ((name, why),) = emitted.not_lowered
    assert name == "inference_0" and "eigh" in why and "eig.py:4" in why
    assert why in str(emitted)


# In ------------------------------------------------------------------------------------------------------------------


@needs_mlir
@pytest.mark.parametrize("zoo_file", ["gpt2", "llama", "resnet"], indirect=True)
@pytest.mark.parametrize("train", [False, True])
def test_what_was_written_is_read_back(zoo_file: Path, tmp_path: Path, train: bool) -> None:
    """The same products of the same shapes, parameters, saved values and source lines as the Python model's."""
    emitted = emit_mlir(str(zoo_file), tmp_path / "plan.effcc", train)
    captured = read(emitted.torch_dialect, train=train, optimizer="adamw" if train else None)
    original = capture(load_model_file(str(zoo_file)), train=train, optimizer="adamw" if train else None)
    (frame,) = captured.frames
    for graph in captured.graphs:
        verify(graph)
        assert parse_graph(print_graph(graph)) == graph
        ops = [node for node in graph.nodes if node.op not in ("input", "getitem", "constant")]
        assert sum(bool(node.location.file) for node in ops) >= 0.95 * len(ops)
    sizes = [entry for entry in original.state.entries if entry.kind != "buffer"]
    found = [entry for entry in captured.state.entries if entry.kind != "buffer"]
    assert {(e.kind, e.name, e.bytes) for e in found} == {(e.kind, e.name, e.bytes) for e in sizes}
    parameters = sum(p.numel() for p in models.build(captured_name(zoo_file)).model.parameters())
    assert captured.state.parameters == 4 * parameters
    if train:
        assert frame.backward is not None and frame.forward.saved > 0
        forward = frame.forward.by_name()
        saved = [output.name for output in frame.forward.outputs[-frame.forward.saved :]]
        taken = [node for node in frame.backward.inputs if node.role != "tangent"]
        assert [forward[name].type.shape for name in saved] == [node.type.shape for node in taken]
    if captured_name(zoo_file) == "resnet":
        assert products(frame.forward) == products(original.frames[0].forward)


def captured_name(path: Path) -> str:
    return path.stem


@needs_mlir
def test_a_graph_of_torch_mlirs_own_exporter(tmp_path: Path) -> None:
    from torch_mlir import fx

    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    for form in ("raw", "torch"):
        path = tmp_path / f"{form}.mlir"
        path.write_text(str(fx.export_and_import(model, torch.randn(5, 8), output_type=form)))
        (frame,) = read(path).frames
        assert products(frame.forward) == [(5, 32), (5, 4)]
        assert [node.type.shape for node in frame.forward.inputs if node.role == "input"] == [(5, 8)]
        weights = {node.type.shape for node in frame.forward.inputs if node.role == "parameter"}
        assert weights == {(32, 8), (32,), (4, 32), (4,)}


HAND_WRITTEN = """
module {
  func.func @main(%x: !torch.vtensor<[4,8],f32>, %w: !torch.vtensor<[8,2],bf16>) -> !torch.vtensor<[2,4],f32> {
    %none = torch.constant.none
    %false = torch.constant.bool false
    %six = torch.constant.int 6
    %zero = torch.constant.int 0
    %one = torch.constant.int 1
    %f = torch.aten.to.dtype %w, %six, %false, %false, %none :
      !torch.vtensor<[8,2],bf16>, !torch.int, !torch.bool, !torch.bool, !torch.none -> !torch.vtensor<[8,2],f32>
    %y = torch.aten.mm %x, %f : !torch.vtensor<[4,8],f32>, !torch.vtensor<[8,2],f32> -> !torch.vtensor<[4,2],f32>
    %t = torch.aten.transpose.int %y, %zero, %one :
      !torch.vtensor<[4,2],f32>, !torch.int, !torch.int -> !torch.vtensor<[2,4],f32>
    return %t : !torch.vtensor<[2,4],f32>
  }
}
"""


@needs_mlir
def test_types_strides_and_aliases_come_from_the_ops(tmp_path: Path) -> None:
    path = tmp_path / "hand.mlir"
    path.write_text(HAND_WRITTEN)
    (frame,) = read(path).frames
    lines = [line.split("  loc(")[0].strip() for line in print_graph(frame.forward).splitlines()]
    assert lines[1:-1] == [
        "%arg0_1: f32[4,8] = input()  role(input)",
        "%arg1_1: bf16[8,2] = input()  role(input)",
        "%convert_element_type: f32[8,2] = prims.convert_element_type.default(%arg1_1, torch.float32)",
        "%mm: f32[4,2] = aten.mm.default(%arg0_1, %convert_element_type)",
        "%permute: f32[2,4]{1,2} = aten.permute.default(%mm, [1, 0])",
        "alias %permute of %mm",
        "return (%permute)",
    ]


@needs_mlir
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (("torch.aten.mm", "torch.aten.nothing"), ModelFileError, "not MLIR that torch-mlir reads"),
        (("module {", "module { foo"), ModelFileError, "not MLIR that torch-mlir reads"),
        ((HAND_WRITTEN, "module {}"), ModelFileError, "holds no function"),
        (("[4,8]", "[?,8]"), CaptureError, "unknown size"),
        (("[4,8]", "[4,9]"), CaptureError, "cannot be called as the file does"),
        (("@main(", "@main(%q: !torch.vtensor<[1],!torch.qint8>, "), CaptureError, "has no form here"),
    ],
)
def test_a_file_that_cannot_be_planned(
    tmp_path: Path, change: tuple[str, str], error: type[Exception], message: str
) -> None:
    path = tmp_path / "hand.mlir"
    path.write_text(HAND_WRITTEN.replace(*change))
    with pytest.raises(error, match=message):
        read(path)


@needs_mlir
def test_what_a_finished_graph_does_not_offer(tmp_path: Path) -> None:
    path = tmp_path / "hand.mlir"
    path.write_text(HAND_WRITTEN)
    with pytest.raises(CaptureError, match="holds no backward"):
        read(path, train=True)
    with pytest.raises(OptionError, match="finished graph"):
        capture(load_model_file(str(path)), dtype="bf16")
    with pytest.raises(ModelFileError, match="planned, not run"):
        load_model_file(str(path)).build_model()
