"""Model files: what they may offer, and a clear error for everything that can be wrong with one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from effcc.errors import CaptureError, EffccError, ModelFileError
from effcc.frontend.capture import Captured, capture
from effcc.frontend.model_file import load_model_file
from effcc.frontend.without_weights import Weightless

LINEAR = "import torch\nmodel = lambda: torch.nn.Linear(8, 4)\n"
INPUTS = "example_inputs = (torch.ones(2, 8),)\n"


def captured_from(folder: Path, text: str, name: str = "", *, train: bool = False) -> Captured:
    path = folder / "some_model.py"
    path.write_text(text)
    with Weightless().building():
        spec = load_model_file(f"{path}{name}")
    return capture(spec, train=train)


def module_with(line: str) -> str:
    """A model whose forward begins with ``line``."""
    return (
        "import torch\nclass M(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.linear = torch.nn.Linear(8, 8)\n    def forward(self, x):\n"
        f"        {line}\n        return self.linear(x)\nmodel = M\n"
    )


def op_names(captured: Captured) -> list[str]:
    return [node.op for frame in captured.frames for node in frame.forward.nodes]


# What a file may offer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["torch.nn.Linear(8, 4)", "lambda: torch.nn.Linear(8, 4)"])
@pytest.mark.parametrize(
    "inputs",
    ["(torch.ones(2, 8),)", "[torch.ones(2, 8)]", "torch.ones(2, 8)", "{'input': torch.ones(2, 8)}"],
)
@pytest.mark.parametrize("wrap", ["{}", "lambda: {}"])
def test_objects_and_functions(tmp_path: Path, model: str, inputs: str, wrap: str) -> None:
    text = f"import torch\nmodel = {model}\nexample_inputs = {wrap.format(inputs)}\n"
    assert "aten.addmm.default" in op_names(captured_from(tmp_path, text))


def test_kernelbench(tmp_path: Path) -> None:
    for initial, width in (("[8, 3]", 3), ("[[8], {'width': 5}]", 5), ("{'inside': 8, 'width': 6}", 6)):
        text = (
            "import torch\nclass Model(torch.nn.Module):\n    def __init__(self, inside, width):\n"
            "        super().__init__()\n        self.linear = torch.nn.Linear(inside, width)\n"
            "    def forward(self, x, y):\n        return self.linear(x) * y\n"
            "def get_inputs():\n    return [torch.randn(2, 8), torch.randn(2, 1)]\n"
            f"def get_init_inputs():\n    return {initial}\n"
        )
        (frame,) = captured_from(tmp_path, text).frames
        assert frame.forward.by_name()[frame.forward.output_names()[0]].type.shape == (2, width)


def test_a_name_in_the_file(tmp_path: Path) -> None:
    """``FILE.py:name``: inputs and loss are looked up with the name first."""
    text = LINEAR + INPUTS + (
        "def small():\n    return torch.nn.Linear(4, 4)\nsmall_inputs = (torch.ones(3, 4),)\n"
        "small_loss = lambda y, target: (y - target).abs().mean()\nsmall_targets = (torch.ones(3, 4),)\n"
        "loss = lambda y: y.sum()\n"
        "class Bundle:\n    model = staticmethod(lambda: torch.nn.Linear(2, 2))\n"
        "    example_inputs = (torch.ones(5, 2),)\n"
    )  # fmt: skip
    assert "aten.abs.default" in op_names(captured_from(tmp_path, text, ":small", train=True))
    assert "aten.abs.default" not in op_names(captured_from(tmp_path, text, train=True))
    (frame,) = captured_from(tmp_path, text, ":Bundle").frames
    assert (5, 2) in [node.type.shape for node in frame.forward.inputs]


def test_the_optimizer_of_the_file(tmp_path: Path) -> None:
    moments = {
        "'adamw'": 2,
        "torch.optim.SGD": 0,
        "lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)": 1,
        "lambda p: torch.optim.AdamW(p, amsgrad=True)": 3,
    }
    for optimizer, count in moments.items():
        text = LINEAR + INPUTS + f"loss = lambda y: y.sum()\noptimizer = {optimizer}\n"
        state = captured_from(tmp_path, text, train=True).state
        assert state.optimizer // 16 * 16 == count * state.parameters // 16 * 16


# What is wrong with a file -------------------------------------------------------------------------------------------

BROKEN_FILES = {
    "empty": ("x = 1\n", "offers no model"),
    "no inputs": (LINEAR, "offers no example_inputs"),
    "syntax": ("model = (\n", "not valid Python"),
    "import": ("import nothing_like_this\n", "No module named 'nothing_like_this'"),
    "exit": ("import sys\nsys.exit(3)\n", "SystemExit: 3"),
    "model is a number": ("import torch\nmodel = 3\n" + INPUTS, "neither a torch.nn.Module nor a function"),
    "model makes a number": ("import torch\nmodel = lambda: 3\n" + INPUTS, "returned int"),
    "model raises": ("import torch\ndef model():\n    raise OSError('no weights')\n" + INPUTS, "OSError: no weights"),
    "inputs raise": (LINEAR + "def example_inputs():\n    raise OSError('no data')\n", "OSError: no data"),
    "inputs are a number": (LINEAR + "example_inputs = 7\n", "neither a tuple nor a dict"),
    "loss is a number": (LINEAR + INPUTS + "loss = 3\n", "not a function"),
    "autocast to a whole number": (LINEAR + INPUTS + "autocast = 'int'\n", "not a floating-point dtype"),
    "half of kernelbench": ("import torch\nclass Model(torch.nn.Module):\n    pass\n", "no function get_inputs"),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_a_broken_file_is_named_with_its_fault(tmp_path: Path, case: str) -> None:
    text, message = BROKEN_FILES[case]
    with pytest.raises(ModelFileError, match=message) as caught:
        captured_from(tmp_path, text)
    assert "some_model.py" in caught.value.where


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.py", "does not exist"),
        (".", "is a directory"),
        ("some_model.txt", "not a Python file"),
        ("some_model.py:nope", "has no 'nope'"),
    ],
)
def test_a_path_that_names_no_model(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "some_model.py").write_text(LINEAR + INPUTS)
    (tmp_path / "some_model.txt").write_text("")
    with pytest.raises(ModelFileError, match=message):
        load_model_file(str(tmp_path / path))


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "some_model.py").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelFileError, match="cannot be read"):
        load_model_file(str(tmp_path / "some_model.py"))


# What is wrong with a model ------------------------------------------------------------------------------------------

UNTRACEABLE = {
    "branch on a value": ("x = x + 1 if x.sum() > 0 else x", "depends on the values of a tensor"),
    "item": ("x = x * x.sum().item()", "depends on the values of a tensor"),
    "size from values": ("x = x[x[:, 0] > 0]", "depends on the values of a tensor"),
    "raise": ("raise ValueError('width must be 9')", "ValueError: width must be 9"),
    "wrong shapes": ("x = x @ torch.ones(3, 3)", "must have same reduction dim"),
    "a device that is not here": ("x = x + torch.ones(8, device='cuda')", "names a device that its inputs are not on"),
}


@pytest.mark.parametrize("case", UNTRACEABLE)
def test_a_model_that_cannot_be_traced(tmp_path: Path, case: str) -> None:
    line, message = UNTRACEABLE[case]
    if "device" in case and torch.cuda.is_available():
        pytest.skip("the device is here")
    with pytest.raises(CaptureError, match=message) as caught:
        captured_from(tmp_path, module_with(line) + "example_inputs = (torch.randn(4, 8),)\n")
    assert f'some_model.py:7 "{line}"' in caught.value.where
    assert caught.value.remedy


STRANGE_INPUTS = {
    "torch.eye(4, 8).to_sparse()": "a sparse tensor",
    "torch.eye(4, 8).to_sparse_csr()": "a sparse tensor",
    "torch.eye(40000, 8).to_sparse()": "a sparse tensor",
    "torch.quantize_per_tensor(torch.randn(4, 8), 0.1, 0, torch.qint8)": "a quantized tensor",
    "torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)], layout=torch.jagged)": "a nested tensor",
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("expression", STRANGE_INPUTS)
def test_inputs_that_no_plan_describes_are_refused(tmp_path: Path, expression: str) -> None:
    with pytest.raises(CaptureError, match=STRANGE_INPUTS[expression]):
        captured_from(tmp_path, module_with("pass") + f"example_inputs = ({expression},)\n")


@pytest.mark.parametrize("train", [False, True])
def test_zero_size_inputs_are_captured(tmp_path: Path, train: bool) -> None:
    text = module_with("pass") + "example_inputs = (torch.randn(0, 8),)\nloss = lambda y: y.sum()\n"
    (frame,) = captured_from(tmp_path, text, train=train).frames
    assert (0, 8) in [node.type.shape for node in frame.forward.nodes if hasattr(node.type, "shape")]


@pytest.mark.parametrize("train", [False, True])
def test_complex_inputs_are_captured_or_refused_by_name(tmp_path: Path, train: bool) -> None:
    """torch's own Linear takes no complex input with real weights; with complex weights everything is right."""
    inputs = "example_inputs = (torch.randn(2, 8, dtype=torch.complex64),)\n"
    text = "import torch\nmodel = lambda: torch.nn.Linear(8, 4, dtype=torch.complex64)\n" + inputs
    (frame,) = captured_from(tmp_path, text + "loss = lambda y: y.abs().sum()\n", train=train).frames
    assert "c64" in [node.type.dtype for node in frame.forward.nodes if hasattr(node.type, "dtype")]
    if train:
        with pytest.raises(CaptureError, match="some_model could not be captured"):
            captured_from(tmp_path, LINEAR + inputs + "loss = lambda y: y.abs().sum()\n", train=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LINEAR + INPUTS + "loss = lambda y: y\n", "not a scalar tensor"),
        (LINEAR + INPUTS + "loss = lambda y: y.nothing()\n", "has no attribute 'nothing'"),
        ("import torch\nmodel = torch.nn.ReLU\n" + INPUTS, "depends on a parameter"),
        (LINEAR + "example_inputs = (torch.ones(2, 8), torch.ones(2))\n", "takes 2 positional arguments"),
    ],
)
def test_a_step_that_cannot_be_trained(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(EffccError, match=message):
        captured_from(tmp_path, text, train=True)


def test_a_model_without_a_tensor_operation(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="nothing of some_model could be captured"):
        captured_from(tmp_path, "import torch\nmodel = torch.nn.Identity\n" + INPUTS)
