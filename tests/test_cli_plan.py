"""``effcc plan`` as a user calls it."""

from __future__ import annotations

import errno
import os
import re
import sys
from pathlib import Path

import pytest
from command_line import LINEAR, PARAMETER_BYTES, Effcc, refused
from effcc.ir.plan_file import load_plan


def test_plan_of_a_training_step(effcc: Effcc, linear: Path, tmp_path: Path) -> None:
    plan, report = tmp_path / "out" / "step.effcc", tmp_path / "page.html"
    result = effcc(
        "plan", linear, "--train", "--optimizer", "adamw", "-o", plan, "--report", report, "--device", "h200"
    )
    assert result.code == 0
    assert "fits on h200" in result.out
    assert result.out.splitlines()[-2:] == [f"plan:    {plan}", f"report:  {report}"]
    assert effcc("verify", plan).code == 0
    made = load_plan(plan).plan
    sizes: dict[str, int] = {}
    for buffer in made.buffers:
        sizes[buffer.role] = sizes.get(buffer.role, 0) + buffer.bytes
    assert sizes["parameter"] == sizes["gradient"] == PARAMETER_BYTES
    # torch.optim.AdamW: two moments for each parameter and a float32 step count for each of the four tensors.
    assert sizes["optimizer"] == 2 * PARAMETER_BYTES + 4 * 4
    assert (made.training, made.optimizer, made.device, made.dtype) == (True, "adamw", "h200", "f32")
    phases = list(dict.fromkeys(step.phase for step in made.steps))
    assert phases == ["forward", "backward", "optimizer"]


def test_what_a_model_prints_does_not_mix_with_the_json(effcc: Effcc, tmp_path: Path) -> None:
    loud = tmp_path / "loud.py"
    loud.write_text(LINEAR + "\nprint('hello from the model file')\n")
    result = effcc("plan", loud, "-o", tmp_path / "p.effcc", "--json", "--no-report")
    assert result.json["summary"]["model"] == "loud"
    assert "hello from the model file" in result.err


def test_plan_in_another_dtype_halves_the_parameters(effcc: Effcc, linear: Path, tmp_path: Path) -> None:
    result = effcc("plan", linear, "--dtype", "bf16", "-o", tmp_path / "p.effcc", "--json", "--no-report")
    assert result.json["summary"]["roles"]["parameter"] == PARAMETER_BYTES // 2
    assert result.json["paths"] == {"plan": str(tmp_path / "p.effcc")}
    assert list(tmp_path.glob("*.html")) == []


def test_a_budget_below_the_peak_is_refused_with_the_least_that_works(
    effcc: Effcc, linear: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "p.effcc"
    result = effcc("plan", linear, "-o", plan, "--memory-budget", "100KiB")
    refused(result, "100 KiB", "parameter")
    assert not plan.exists()
    (least,) = re.findall(r"least budget that works is (\d+) bytes", result.err)
    assert effcc("plan", linear, "-o", plan, "--memory-budget", least).code == 0
    assert load_plan(plan).plan.budget == int(least)
    assert load_plan(plan).plan.peak["device"] <= int(least)
    refused(effcc("plan", linear, "-o", plan, "--memory-budget", int(least) - 1), least)


def test_plan_dumps_every_pass(effcc: Effcc, linear: Path, tmp_path: Path) -> None:
    plan, dumps = tmp_path / "p.effcc", tmp_path / "dumps"
    assert effcc("plan", linear, "-o", plan, "--dump", dumps).code == 0
    names = [stage["name"] for stage in effcc("inspect", dumps, "--json").json["stages"]]
    assert names[0] == "input" and {"canonicalize", "dead-code", "regions", "schedule"} <= set(names)
    assert "regions" in plan.with_suffix(".html").read_text()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["does not exist"]),
        ("x = 1\n", ["offers no", "model"]),
        ("model = 3\nexample_inputs = ()\n", ["int"]),
        ("import torch\nmodel = torch.nn.Linear(2, 2)\n", ["example_inputs"]),
        ("def model(:\n", ["not valid Python", "bad.py:1"]),
        ("import missing_module_xyz\n", ["missing_module_xyz", "bad.py:1"]),
        ("raise SystemExit(3)\n", ["SystemExit", "bad.py:1"]),
        (LINEAR.replace("randn(32, 64)", "randn(32, 63)"), ["could not be captured"]),
        (LINEAR.replace("y.square().mean()", "y.square()"), ["scalar"]),
    ],
)
def test_plan_refuses_a_bad_model_file(effcc: Effcc, tmp_path: Path, text: str | None, words: list[str]) -> None:
    bad = tmp_path / "bad.py"
    if text is not None:
        bad.write_text(text)
    refused(effcc("plan", bad, "--train", "-o", tmp_path / "p.effcc"), *words)
    assert not (tmp_path / "p.effcc").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "h20"], ["h20", "h200"]),
        (["--device", "missing.json"], ["missing.json"]),
        (["--memory-budget", "lots"], ["lots", "GiB"]),
        (["--memory-budget", "0"], ["more than 0"]),
        (["--dtype", "int8"], ["int8", "bf16"]),
        (["--optimizer", "adamw"], ["--train"]),
        (["--train", "--optimizer", "adamx"], ["adamx", "did you mean"]),
        (["--emit", "onnx"], ["onnx", "mlir"]),
        (["--no-report", "--report", "r.html"], ["--report"]),
        (["-p", "regionz"], ["regionz", "regions"]),
    ],
)
def test_plan_refuses_a_wrong_option_before_it_works(
    effcc: Effcc, linear: Path, options: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(linear.parent)
    monkeypatch.setattr("effcc.planning.load_spec", lambda _: pytest.fail("the model was loaded"))
    refused(effcc("plan", linear, *options), *words)
    assert sorted(path.name for path in linear.parent.iterdir()) == ["linear.py"]


def test_emit_names_the_extra_that_is_missing(
    effcc: Effcc, linear: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torch_mlir", "torch_mlir.fx"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("effcc.planning.load_spec", lambda _: pytest.fail("the model was loaded"))
    refused(effcc("plan", linear, "--emit", "mlir", "-o", tmp_path / "p.effcc"), "effcc[mlir]")


def test_plan_with_symbolic_sizes_is_that_of_the_example(effcc: Effcc, linear: Path, tmp_path: Path) -> None:
    peaks = [
        effcc("plan", linear, *options, "--no-report", "-o", tmp_path / "p.effcc", "--json").json["summary"]["roles"]
        for options in ([], ["--dynamic"])
    ]
    assert peaks[0]["parameter"] == peaks[1]["parameter"] == PARAMETER_BYTES
    assert peaks[0]["input"] == peaks[1]["input"] == 32 * 64 * 4


def test_plan_refuses_an_output_that_cannot_be_written_before_it_works(
    effcc: Effcc, linear: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("effcc.planning.load_spec", lambda _: pytest.fail("the model was loaded"))
    refused(effcc("plan", linear, "-o", linear / "p.effcc"), str(linear))
    refused(effcc("plan", linear, "-o", tmp_path), "folder")

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    refused(effcc("plan", linear, "-o", tmp_path / "p.effcc"), os.strerror(errno.EROFS))


def test_a_full_disk_leaves_the_old_plan(
    effcc: Effcc, linear: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tmp_path / "p.effcc"
    plan.write_text("the old one")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    refused(effcc("plan", linear, "-o", plan), os.strerror(errno.ENOSPC), "free ")
    assert plan.read_text() == "the old one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["linear.py", "p.effcc"]
