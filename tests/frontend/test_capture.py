"""Offline capture: what a model file becomes, with source lines, forward names, repeated layers and no weights."""

from __future__ import annotations

import linecache
import random
import resource
from collections.abc import Iterator
from pathlib import Path

import models
import pytest
import sympy
import torch
from effcc.errors import CaptureError, OptionError
from effcc.frontend.capture import Captured, capture
from effcc.frontend.model_file import ModelSpec, load_model_file
from effcc.frontend.without_weights import Weightless
from effcc.ir.graph import Graph, Node, Symbol
from effcc.ir.parser import parse_graph
from effcc.ir.printer import print_graph
from effcc.ir.types import ScalarType, TensorType, TupleType, Type
from effcc.ir.verifier import verify
from some_by_default import some_by_default
from torch._subclasses.fake_tensor import FakeTensor

REAL_MODELS = ("gpt2", "llama", "resnet")


def zoo_spec(name: str) -> ModelSpec:
    def inputs() -> tuple[tuple[()], dict[str, torch.Tensor]]:
        return (), models.build(name).inputs

    return ModelSpec(name, lambda: models.build(name).model, inputs)


def tower_spec(width: int = 8, depth: int = 4, batch: int = 2) -> ModelSpec:
    return ModelSpec("tower", lambda: models.Tower(width, depth), lambda: ((torch.randn(batch, width),), {}))


def load(path: str) -> ModelSpec:
    with Weightless().building():
        return load_model_file(path)


def written(folder: Path, text: str) -> ModelSpec:
    path = folder / "model_under_test.py"
    path.write_text(text)
    return load(str(path))


def with_bodies(graph: Graph) -> Iterator[Graph]:
    yield graph
    for body in graph.subgraphs.values():
        yield from with_bodies(body)


def every_graph(captured: Captured) -> Iterator[Graph]:
    for frame in captured.frames:
        yield from (frame.dynamo, frame.forward)
        if frame.backward is not None:
            yield frame.backward


def ops(graph: Graph) -> list[Node]:
    return [node for body in with_bodies(graph) for node in body.nodes if node.op not in ("input", "constant")]


def body_called_by(graph: Graph, name: str) -> Graph:
    """The subgraph of the call that ``name``, a call or a part of one, stands for."""
    node = graph.by_name()[name]
    while node.op == "getitem":
        node = graph.by_name()[next(node.operands())]
    assert isinstance(node.args[0], Symbol)
    return graph.subgraphs[node.args[0].text.removeprefix("@")]


def is_real_line(node: Node) -> bool:
    place = node.location
    return bool(place.file) and linecache.getline(place.file, place.line).strip() == place.source != ""


@pytest.fixture(scope="module", params=some_by_default(REAL_MODELS, {"llama"}))
def trained(request: pytest.FixtureRequest) -> Captured:
    return capture(zoo_spec(request.param), train=True)


def test_forward_ops_carry_a_real_source_line(trained: Captured) -> None:
    for frame in trained.frames:
        for graph in (frame.dynamo, frame.forward):
            nodes = ops(graph)
            real = [node for node in nodes if is_real_line(node)]
            assert len(real) >= 0.95 * len(nodes), [node.name for node in nodes if not is_real_line(node)]
            assert not any("/site-packages/torch/" in node.location.file for node in real)
            assert sum(bool(node.location.module) for node in nodes) >= 0.8 * len(nodes)


def test_backward_ops_name_their_forward_op(trained: Captured) -> None:
    for frame in trained.frames:
        assert frame.backward is not None
        pairs = [(frame.forward, frame.backward)]
        for node in frame.backward.nodes:
            if node.op == "call":
                pair = (body_called_by(frame.forward, node.forward), body_called_by(frame.backward, node.name))
                pairs += [pair] if pair not in pairs else []
        assert len(pairs) == 1 + len(frame.backward.subgraphs)
        for forward, backward in pairs:
            own = forward.by_name()
            nodes = [node for node in backward.nodes if node.op not in ("input", "constant")]
            named = [node for node in nodes if node.forward in own]
            assert len(named) >= 0.95 * len(nodes)
            agreeing = [node for node in named if node.location.module in ("", own[node.forward].location.module)]
            assert len(agreeing) >= 0.9 * len(named)
            assert sum(bool(node.location.module) for node in named) >= 0.7 * len(named)


def test_recomputed_ops_say_so(trained: Captured) -> None:
    frame = trained.frames[0]
    assert frame.backward is not None
    forward_ops = {(node.name, node.op) for node in ops(frame.forward)}
    repeated = [node for node in ops(frame.backward) if node.origin]
    assert repeated, "min-cut recomputes some cheap op in each of these models"
    for node in repeated:
        assert node.origin == f"remat(%{node.name})" and node.forward == node.name
        assert (node.name, node.op) in forward_ops


def test_gradients_of_a_matmul_name_the_matmul(tmp_path: Path) -> None:
    text = "import torch\nmodel = lambda: torch.nn.Linear(8, 4, bias=False)\nexample_inputs = (torch.ones(2, 8),)\n"
    captured = capture(written(tmp_path, text + "loss = lambda y: y.square().sum()\n"), train=True)
    (frame,) = captured.frames
    assert frame.backward is not None
    gradients = [node for node in frame.backward.nodes if node.op == "aten.mm.default"]
    (product,) = (node for node in frame.forward.nodes if node.op == "aten.mm.default")
    assert [node.forward for node in gradients] == [product.name]


def test_every_graph_verifies_and_reads_back_equal(trained: Captured) -> None:
    for graph in every_graph(trained):
        verify(graph)
        assert parse_graph(print_graph(graph)) == graph


def test_parameters_keep_their_path(trained: Captured) -> None:
    name = trained.name
    paths = {path for path, _ in models.build(name).model.named_parameters(remove_duplicate=True)}
    frame = trained.frames[0]
    found = {frame.names[node.name] for node in frame.forward.inputs if node.role == "parameter"}
    assert found == paths
    assert {entry.name for entry in trained.state.entries if entry.kind == "parameter"} == paths


# Repeated layers and memory ------------------------------------------------------------------------------------------


def test_a_repeated_layer_is_captured_once() -> None:
    """Six more layers are six more calls of the same body, and not one op more."""
    shallow, deep = (capture(tower_spec(depth=depth), train=True) for depth in (3, 9))
    for frame_of in (lambda one: one.frames[0].forward, lambda one: one.frames[0].backward):
        few, many = frame_of(shallow), frame_of(deep)
        calls = [[node for node in graph.nodes if node.op == "call"] for graph in (few, many)]
        assert len(calls[1]) == len(calls[0]) + 6
        assert len({node.args[0] for node in calls[1]}) == len(many.subgraphs) == 1
        others = [[n.op for n in ops(graph) if n.op not in ("call", "getitem")] for graph in (few, many)]
        assert others[0] == others[1]
    assert deep.regions.calls == {"Block": 9} and deep.regions.traces == shallow.regions.traces


def test_no_weights_are_allocated() -> None:
    built: list[torch.nn.Module] = []

    def build() -> torch.nn.Module:
        built.append(models.Tower(width=8192, depth=4))
        return built[0]

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    spec = ModelSpec("wide", build, lambda: ((torch.randn(64, 8192),), {}))
    captured = capture(spec, train=True, optimizer="adamw", dtype="bf16")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    count = sum(parameter.numel() for parameter in models.Tower(width=64, depth=4).parameters())
    assert all(isinstance(parameter, FakeTensor) for parameter in built[0].parameters() if parameter.numel() > 1 << 15)
    count = sum(parameter.numel() for parameter in built[0].parameters())
    assert count > 1e9
    assert grown < 1e9, "2 GB of bfloat16 weights alone would show"
    assert captured.state.parameters == captured.state.gradients == 2 * count
    tensors = len(list(built[0].parameters()))
    assert captured.state.optimizer == 2 * 2 * count + 4 * tensors, "two moments in bfloat16, a float32 step each"


def test_the_random_state_is_left_alone() -> None:
    torch.manual_seed(random.randrange(1 << 30))
    before = torch.get_rng_state()
    capture(tower_spec(), train=True)
    assert torch.equal(before, torch.get_rng_state())


# Options -------------------------------------------------------------------------------------------------------------


def devices(kind: Type | None) -> set[str]:
    if isinstance(kind, TupleType):
        return {name for item in kind.items for name in devices(item)}
    return {kind.device} if isinstance(kind, TensorType) else set()


def test_the_device_is_written_into_every_type() -> None:
    captured = capture(zoo_spec("llama"), train=True, device="cuda")
    for graph in every_graph(captured):
        nodes = [node for body in with_bodies(graph) for node in body.nodes]
        assert {name for node in nodes for name in devices(node.type)} == {"cuda"}
        assert "device(cpu)" not in print_graph(graph)


def test_inference_has_no_backward_and_no_gradients() -> None:
    captured = capture(tower_spec(), optimizer="adamw")
    assert [frame.backward for frame in captured.frames] == [None]
    assert captured.state.gradients == captured.state.optimizer == 0 and captured.optimizer == ""
    assert [graph.phase for graph in captured.graphs] == ["inference"]


def test_dynamic_sizes_stay_symbolic() -> None:
    captured = capture(tower_spec(batch=6), train=True, dynamic=True)
    sizes = [node.type.value for node in captured.frames[0].forward.inputs if isinstance(node.type, ScalarType)]
    (size,) = (size for size in sizes if isinstance(size, sympy.Symbol))
    assert any(isinstance(n.type, TensorType) and n.type.shape == (size, 8) for n in captured.frames[0].forward.nodes)


def test_a_float_attribute_with_dynamic_sizes(tmp_path: Path) -> None:
    """Dynamo makes a number of the module an input, which the captured step reads with ``item``."""
    text = (
        "import torch\nclass Scaled(torch.nn.Linear):\n    scale = 1.5\n    def __init__(self):\n"
        "        super().__init__(8, 8)\n        self.scaling = 2.5\n"
        "    def forward(self, x):\n        return super().forward(x) * self.scaling\n"
        "model = Scaled\nexample_inputs = (torch.ones(3, 8),)\nloss = lambda y: y.sum()\n"
    )
    spec = written(tmp_path, text)
    (frame,) = capture(spec, train=True, dynamic=True).frames
    assert "aten.mul.Tensor" in [node.op for node in frame.forward.nodes]


def test_dtype_converts_parameters_and_inputs() -> None:
    captured = capture(tower_spec(), dtype="bf16")
    inputs = captured.frames[0].forward.inputs
    assert {node.type.dtype for node in inputs if isinstance(node.type, TensorType)} == {"bf16"}
    with pytest.raises(CaptureError, match="not a floating-point dtype"):
        capture(tower_spec(), dtype="i64")


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(OptionError, match="sgdd"):
        capture(tower_spec(), train=True, optimizer="sgdd")


def test_autocast_of_the_file_and_of_the_code(tmp_path: Path) -> None:
    """Under autocast products are bfloat16, whichever device the code names."""
    head = "import torch\nfrom torch import nn\nexample_inputs = (torch.ones(2, 8),)\n"
    outside = head + "model = lambda: nn.Linear(8, 8)\nautocast = 'bf16'\n"
    inside = (
        head + "class Inside(nn.Linear):\n    def forward(self, x):\n"
        "        with torch.autocast('cuda', dtype=torch.bfloat16):\n            return super().forward(x)\n"
        "model = lambda: Inside(8, 8)\n"
    )
    for text in (outside, inside):
        (frame,) = capture(written(tmp_path, text)).frames
        (product,) = (node for node in frame.forward.nodes if node.op in ("aten.addmm.default", "aten.mm.default"))
        assert isinstance(product.type, TensorType) and product.type.dtype == "bf16"


def test_graph_breaks_give_a_list(tmp_path: Path) -> None:
    text = (
        "import torch\nclass Broken(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)\n    def forward(self, x):\n"
        "        x = self.a(x)\n        torch._dynamo.graph_break()\n        return self.b(torch.relu(x))\n"
        "model = Broken\nexample_inputs = (torch.ones(2, 8),)\nloss = None\n"
    )
    captured = capture(written(tmp_path, text), train=True)
    assert len(captured.frames) == 2
    (found,) = captured.graph_breaks
    assert Path(found.file).name == "model_under_test.py" and "graph_break" in found.reason
    assert text.splitlines()[found.line - 1].strip() == "torch._dynamo.graph_break()"
    assert [graph.name for graph in captured.graphs] == ["forward_0", "forward_1", "backward_1", "backward_0"]
    widths = [frame.forward.by_name()[frame.forward.output_names()[0]].type for frame in captured.frames]
    assert [kind.shape for kind in widths if isinstance(kind, TensorType)] == [(2, 8), (2, 4)]


def test_what_the_model_prints_is_kept_out_of_our_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        "import torch\nprint('loading')\nmodel = lambda: torch.nn.Linear(8, 8)\nexample_inputs = (torch.ones(2, 8),)\n"
    )
    capture(written(tmp_path, text))
    printed = capsys.readouterr()
    assert printed.out == "" and "loading" in printed.err


def test_ops_of_torchs_own_modules_point_at_the_module(tmp_path: Path) -> None:
    text = (
        "import torch\nmodel = lambda: torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())\n"
        "example_inputs = (torch.ones(2, 8),)\nloss = lambda y: y.sum()\n"
    )
    (frame,) = capture(written(tmp_path, text), train=True).frames
    found = {(Path(node.location.file).name, node.location.module) for node in ops(frame.forward)}
    assert found == {("linear.py", "0"), ("activation.py", "1"), ("model_under_test.py", "")}
    assert all(is_real_line(node) for node in ops(frame.forward))


def test_two_captures_of_one_class_do_not_depend_on_each_other() -> None:
    shapes = []
    for batch in (3, 5):
        (frame,) = capture(tower_spec(batch=batch)).frames
        shapes.append(frame.forward.by_name()[frame.forward.output_names()[0]].type)
    assert [kind.shape for kind in shapes if isinstance(kind, TensorType)] == [(3, 4), (5, 4)]


def test_sizes_are_the_examples_values_of_the_symbols() -> None:
    captured = capture(tower_spec(batch=6), dynamic=True)
    symbols = {
        str(symbol)
        for graph in every_graph(captured)
        for node in graph.nodes
        if isinstance(node.type, TensorType)
        for size in node.type.shape
        if isinstance(size, sympy.Basic)
        for symbol in size.free_symbols
    }
    assert symbols and symbols <= set(captured.sizes)
    assert {captured.sizes[symbol] for symbol in symbols} == {6}


def test_batched_functions_inside_of_a_model(tmp_path: Path) -> None:
    """Tensors inside of vmap have no storage that can be compared."""
    text = (
        "import torch\nclass Batched(torch.nn.Linear):\n    def forward(self, x):\n"
        "        return torch.func.vmap(lambda row: super(Batched, self).forward(row).view(2, 2).sum(0))(x)\n"
        "model = lambda: Batched(8, 4)\nexample_inputs = (torch.ones(3, 8),)\n"
    )
    (frame,) = capture(written(tmp_path, text)).frames
    result = frame.forward.by_name()[frame.forward.output_names()[0]].type
    assert isinstance(result, TensorType) and result.shape == (3, 2)


def test_a_capture_with_a_partition_of_its_own_is_cheap_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every module is written out then, but traced once; the cut is found in compiled code, and no source file is read
    for a log that is off."""
    from effcc.frontend import min_cut
    from torch._dynamo import funcname_cache
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    cuts: list[object] = []
    plain = min_cut.minimum_cut

    def minimum_cut(*args: object) -> object:
        cuts.append(plain(*args))
        return cuts[-1]

    read: list[str] = []
    monkeypatch.setattr(min_cut, "minimum_cut", minimum_cut)
    monkeypatch.setattr(funcname_cache, "_add_file", read.append)
    funcname_cache.clearcache()
    captured = capture(tower_spec(), train=True, partition=min_cut_rematerialization_partition)
    assert captured.frames[0].backward is not None and captured.regions.traces == {"Block": 1}
    assert not any("invoke_subgraph" in node.op for node in captured.frames[0].backward.nodes)
    assert cuts and None not in cuts
    assert not read
