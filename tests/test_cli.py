"""The command line as a person uses it: what it prints, its JSON, its exit codes, and what it says to bad input."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from effcc import cli
from effcc.cost_model.devices import FOLDER
from effcc.ir.plan_file import load_plan
from fresh_seed import fresh_random
from sample_plan import FORWARD, MIB, write_sample

LINEAR = """
import torch

def model():
    return torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))

example_inputs = (torch.randn(32, 64),)

def loss(y):
    return y.square().mean()
"""
#: Of the model above: two weights and two biases, float32.
PARAMETER_BYTES = 4 * (64 * 256 + 256 + 256 * 64 + 64)

DEAD = """graph @g phase=inference {
  %x: f32[4,8] = input()  role(input)
  %unused: f32[4,8] = aten.sin.default(%x)  loc(model.py:3 "a = x.sin()" in layers.0)
  %y: f32[4,8] = aten.cos.default(%x)  loc(model.py:4 "b = x.cos()" in layers.0)
  %z: f32[4,8] = aten.cos.default(%x)  loc(model.py:5 "c = x.cos()" in layers.1)
  %sum: f32[4,8] = aten.add.Tensor(%y, %z)
  return (%sum)
}
"""


class Result(NamedTuple):
    code: Any
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Effcc = Callable[..., Result]


@pytest.fixture
def effcc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Effcc:
    """Runs a command in this process, as the ``effcc`` script does."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Result(exit.value.code or 0, out, err)

    return run


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    return write_sample(tmp_path)


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    path = tmp_path / "linear.py"
    path.write_text(LINEAR)
    return path


@pytest.fixture
def dead(tmp_path: Path) -> Path:
    path = tmp_path / "dead.ir"
    path.write_text(DEAD)
    return path


def refused(result: Result, *words: str) -> None:
    """Exit code 2 and one error on standard error, with ``words`` in it, nothing on standard output, no traceback."""
    assert result.code == 2, result
    assert result.err.startswith("effcc: error: ")
    assert result.out == ""
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err


# --- all commands -----------------------------------------------------------------------------------------------------

COMMANDS = ("plan", "run", "verify", "explain", "inspect", "report", "opt", "devices", "calibrate")


def test_help_lists_every_command(effcc: Effcc) -> None:
    result = effcc("--help")
    assert result.code == 0
    for command in COMMANDS:
        assert re.search(rf"^│ {command} ", result.out, re.MULTILINE), command


@pytest.mark.parametrize("command", [info.name for info in cli.app.registered_commands])
def test_every_command_has_help_for_every_option(effcc: Effcc, command: str) -> None:
    result = effcc(command, "-h")
    assert result.code == 0
    assert f"effcc {command}" in result.out
    options = re.findall(r"^│ \*?\s*(--[\w-]+)(?:\s+-\w)?\s+(?:<[^>]*>|\w+)?\s*(.*?)\s*│$", result.out, re.MULTILINE)
    assert options
    assert all(text for _, text in options), options


def test_only_commands_that_need_torch_load_it(sample: Path) -> None:
    script = f"""
import contextlib, io, sys
from effcc import cli
for arguments in (["--version"], ["explain", {str(sample)!r}], ["inspect", {str(sample)!r}], ["devices"]):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        cli.main(arguments)
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frobnicate"], "frobnicate"),
        (["plan"], "FILE.py"),
        (["explain", "x.effcc", "--top", "0"], "--top"),
        (["opt", "--nonsense"], "--nonsense"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_names_what_is_wrong(effcc: Effcc, arguments: list[str], words: str) -> None:
    result = effcc(*arguments)
    assert result.code == 2
    assert words in result.err
    assert "Traceback" not in result.err


def test_an_unexpected_error_is_one_message_and_a_traceback_only_with_debug(
    effcc: Effcc, sample: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("fault of ours")

    monkeypatch.setattr("effcc.cli_explain.summarize", fail)
    result = effcc("explain", sample)
    assert result.code == 1
    assert "ZeroDivisionError: fault of ours" in result.err
    assert "--debug" in result.err
    assert "Traceback" not in result.err
    assert "Traceback" in effcc("--debug", "explain", sample).err


def test_an_error_wrapped_by_torch_is_shown_as_our_own(
    effcc: Effcc, sample: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from effcc.errors import PlanError

    class BackendCompilerFailed(Exception):
        inner_exception = PlanError("made for another graph", remedy="make it again")

    def fail(*_: object, **__: object) -> None:
        raise BackendCompilerFailed("many lines")

    monkeypatch.setattr("effcc.cli_explain.summarize", fail)
    refused(effcc("explain", sample), "made for another graph", "make it again")


def test_ctrl_c_ends_quietly(effcc: Effcc, sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("effcc.cli_explain.summarize", interrupt)
    result = effcc("explain", sample)
    assert (result.code, result.out, result.err) == (130, "", "effcc: interrupted\n")


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_ctrl_c_while_a_model_is_captured(tmp_path: Path) -> None:
    waiting = tmp_path / "waiting.py"
    waiting.write_text("import pathlib, time\npathlib.Path(__file__ + '.here').touch()\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "effcc.cli", "plan", str(waiting), "-o", str(tmp_path / "plan.effcc")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell that started this test run in the background would have it ignore the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )  # fmt: skip
    while not (tmp_path / "waiting.py.here").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "effcc: interrupted" in err
    assert "Traceback" not in out + err
    assert not (tmp_path / "plan.effcc").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_under_standard_output(sample: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "effcc.cli", "explain", str(sample), "--json"],
            stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("effcc: error: ")
    assert os.strerror(errno.ENOSPC) in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


# --- explain, inspect, report, verify: a plan with known figures ------------------------------------------------------


def test_explain_as_json(effcc: Effcc, sample: Path) -> None:
    shown = effcc("explain", sample, "--json").json
    summary = shown["summary"]
    assert summary["peak"] == 4 * MIB
    assert summary["peak_position"] == 1
    assert summary["roles"] == {"input": MIB, "parameter": MIB, "scratch": MIB, "output": MIB}
    assert sum(holder["bytes"] for holder in summary["holders"]) == 4 * MIB
    assert summary["fits"] is True
    assert summary["flop"] == 2 * 512**3 + 512 * 512
    assert [group["name"] for group in summary["groups"]] == ["mm", "relu"]
    assert shown["fallbacks"] == [
        {"op": "aten.cholesky.default", "reason": "no kernel <for> it", "source": "model.py:9"}
    ]
    assert shown["solvers"][0]["gap"] == 0.0


def test_explain_says_who_holds_the_peak_what_is_slow_and_what_fell_back(effcc: Effcc, sample: Path) -> None:
    out = effcc("explain", sample).out
    capacity = json.loads((FOLDER / "l4.json").read_text())["tiers"]["device"]["capacity"]["value"]
    assert f"fits on l4: 4.00 MiB of {capacity / 2**30:.2f} GiB" in out
    assert re.search(r"1\.00 MiB\s+25\.0 %\s+scratch\s+1\s+model\.py:7", out)
    # 2 * 512^3 flop in 30 us.
    assert re.search(r"30 µs\s+75\.0 %\s+1\s+library mm\s+inference", out)
    assert re.search(r"aten\.cholesky\.default\s+no kernel <for> it\s+model\.py:9", out)


def test_explain_over_budget(effcc: Effcc, tmp_path: Path) -> None:
    over = write_sample(tmp_path, budget=4 * MIB)
    assert "The memory budget of 4.00 MiB is kept." in effcc("explain", over).out


def test_inspect_lists_and_shows_the_stages_of_a_plan(effcc: Effcc, sample: Path) -> None:
    stages = effcc("inspect", sample, "--json").json["stages"]
    assert [(stage["index"], stage["graph"], stage["name"]) for stage in stages] == [
        (0, "mlp", "mlp (planned)"),
        (1, "host.py", "host.py"),
    ]
    assert (stages[0]["ops"], stages[0]["phase"]) == (4, "inference")
    assert effcc("inspect", sample, "--show", 0).out.strip() == FORWARD.strip()
    assert effcc("inspect", sample, "--show", "host.py").out == "def run(x):\n    return x\n"
    assert "mlp" in effcc("inspect", sample).out


def test_inspect_refuses_what_is_not_there(effcc: Effcc, sample: Path, tmp_path: Path) -> None:
    refused(effcc("inspect", sample, "--show", "hots.py"), "hots.py", "did you mean 'host.py'?")
    refused(effcc("inspect", sample, "--node", "%nothing"), "%nothing")
    refused(effcc("inspect", sample, "--graph", "mlq"), "mlq", "graphs: ", "mlp")
    (tmp_path / "empty").mkdir()
    refused(effcc("inspect", tmp_path / "empty"), "EFFCC_DUMP")
    refused(effcc("inspect", tmp_path / "missing.effcc"), "missing.effcc")


def test_history_of_a_value_ends_at_its_address(effcc: Effcc, sample: Path) -> None:
    out = effcc("inspect", sample, "--node", "%h").out
    assert '%h comes from model.py:7 "h = x @ self.w (twice)" in layers.0' in out
    assert "read by 1" in out and "%y: f32[512,512] = aten.relu.default(%h)" in out
    assert re.search(r"step 0\s+library mm in layers\.\*, inference, 30 µs", out)
    assert re.search(r"buffer 2\s+scratch in layers\.0: 1\.00 MiB at device \+ 0, steps 0 to 2", out)
    assert "step 1" not in out


def test_report_is_written_beside_the_plan(effcc: Effcc, sample: Path) -> None:
    result = effcc("report", sample, "--json")
    page = Path(result.json["report"])
    assert page == sample.with_suffix(".html")
    assert "4.00 MiB" in page.read_text()
    assert effcc("report", sample, "-o", sample.parent / "other.html").out.strip().endswith("other.html")


def test_verify_tells_sound_from_damaged(effcc: Effcc, sample: Path, dead: Path, tmp_path: Path) -> None:
    assert effcc("verify", sample, dead).code == 0
    data = sample.read_bytes()
    truncated, text = tmp_path / "truncated.effcc", tmp_path / "text.effcc"
    truncated.write_bytes(data[: len(data) // 2])
    text.write_text("a plan")
    edited = _with_member(sample, tmp_path / "edited.effcc", "plan.json", lambda json: json.replace(b'"mm"', b'"nn"'))
    undefined = tmp_path / "undefined.ir"
    undefined.write_text(DEAD.replace("(%y, %z)", "(%y, %nowhere)"))
    result = effcc("verify", sample, truncated, text, edited, undefined, "--json")
    assert result.code == 2
    rows = {Path(row["file"]).name: row for row in result.json}
    assert [name for name, row in rows.items() if row["sound"]] == ["plan.effcc"]
    assert "plan.json was changed" in rows["edited.effcc"]["error"]
    assert "%nowhere" in rows["undefined.ir"]["error"]
    assert "effcc plan" in rows["truncated.effcc"]["error"]


def _with_member(plan: Path, target: Path, name: str, change: Callable[[bytes], bytes]) -> Path:
    with zipfile.ZipFile(plan) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            new.writestr(info, change(content) if info.filename == name else content)
    return target


@pytest.mark.parametrize("command", ["explain", "inspect", "report"])
def test_readers_refuse_a_damaged_plan(effcc: Effcc, sample: Path, command: str) -> None:
    sample.write_bytes(sample.read_bytes()[:-200])
    refused(effcc(command, sample), "plan.effcc", "make the plan again")


def _mutated(value: Any, generator: random.Random) -> Any:
    """One random change somewhere in a JSON value, of the same type or another."""
    strange = [None, -1, 0, 1, 2**40, 2**62, 0.5, -1e300, "", "[bold]", "%x", "a\n\x00b", [], {}, [0], True]
    if isinstance(value, dict) and value and generator.random() < 0.9:
        key = generator.choice(sorted(value))
        return {**value, key: _mutated(value[key], generator)}
    if isinstance(value, list) and value and generator.random() < 0.8:
        index = generator.randrange(len(value))
        kept = value[:index] + value[index + 1 :]
        return generator.choice([kept, [*value, value[index]], [*kept, _mutated(value[index], generator)]])
    return generator.choice(strange)


def test_an_edited_plan_with_right_digests_never_breaks_a_reader(effcc: Effcc, sample: Path, tmp_path: Path) -> None:
    """Whoever edits a plan can also make its digests right. Then the validator refuses it, or the commands cope."""
    generator = fresh_random()
    with zipfile.ZipFile(sample) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    plan = json.loads(members["plan.json"])
    edited = tmp_path / "edited.effcc"
    refusals = 0
    for _ in range(20):
        changed = _mutated(plan, generator)
        content = json.dumps(changed).encode()
        manifest = json.loads(members["manifest.json"])
        manifest["sha256"]["plan.json"] = hashlib.sha256(content).hexdigest()
        for field in ("model", "device", "inputs"):
            if isinstance(changed, dict) and field in changed:
                manifest[field] = changed[field]
        with zipfile.ZipFile(edited, "w") as archive:
            for name, old in {**members, "manifest.json": json.dumps(manifest).encode(), "plan.json": content}.items():
                archive.writestr(name, old)
        for arguments in (["explain", edited], ["inspect", edited, "--node", "%h"], ["report", edited]):
            result = effcc(*arguments)
            assert result.code in (0, 2), (changed, result)
            refusals += result.code == 2
    assert refusals  # most edits make no sense


# --- opt --------------------------------------------------------------------------------------------------------------


def test_opt_runs_passes(effcc: Effcc, dead: Path) -> None:
    out = effcc("opt", dead, "-p", "common-subexpressions,dead-code").out
    assert "%unused" not in out and "%z" not in out
    assert "aten.add.Tensor(%y, %y)" in out
    assert effcc("opt", dead).out == DEAD


def test_opt_diff_and_json(effcc: Effcc, dead: Path, tmp_path: Path) -> None:
    out = effcc("opt", dead, "-p", "dead-code", "--diff").out
    assert [line for line in out.splitlines() if line.startswith("-  ")] == [
        "-" + next(line for line in DEAD.splitlines() if "%unused" in line)
    ]
    shown = effcc("opt", dead, "-p", "dead-code", "--json").json
    (record,) = shown["passes"]
    assert (record["text"], record["ops_before"], record["ops_after"], record["changed"]) == ("dead-code", 5, 4, True)
    assert effcc("opt", dead, "-p", "dead-code", "-o", tmp_path / "out.ir").out == ""
    assert (tmp_path / "out.ir").read_text() == shown["graph"]


def test_opt_reads_standard_input(effcc: Effcc, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO(DEAD))
    assert "%unused" not in effcc("opt", "-", "-p", "dead-code").out


def test_opt_lists_passes_with_their_options(effcc: Effcc) -> None:
    shown = effcc("opt", "--list", "--json").json
    assert {"dead-code", "regions", "schedule"} <= shown["passes"].keys()
    assert shown["pipelines"]["normalize"].split(",")[0] == "canonicalize"
    assert "dead-code" in effcc("opt", "--list").out


@pytest.mark.parametrize(
    ("passes", "words"),
    [
        ("dead-cod", ["dead-cod", "did you mean 'dead-code'?"]),
        ("dead-code{deep=1}", ["deep"]),
        ("dead-code,", ["column 11"]),
    ],
)
def test_opt_refuses_a_wrong_pipeline(effcc: Effcc, dead: Path, passes: str, words: list[str]) -> None:
    refused(effcc("opt", dead, "-p", passes), *words)


def test_opt_names_the_line_that_is_wrong(effcc: Effcc, tmp_path: Path) -> None:
    bad = tmp_path / "bad.ir"
    bad.write_text(DEAD.replace("aten.sin.default(%x)", "aten.sin.default(%x"))
    refused(effcc("opt", bad), "bad.ir:3")
    bad.write_bytes(b"\xff\xfe")
    refused(effcc("opt", bad), "not text")
    refused(effcc("opt", tmp_path / "missing.ir"), "missing.ir")
    refused(effcc("opt"), "--list")


def test_dumps_are_inspected(effcc: Effcc, dead: Path, tmp_path: Path) -> None:
    """Listing, difference and history over the dumps of three passes, the last of which changes nothing."""
    dumps = tmp_path / "dumps"
    effcc("opt", dead, "-p", "common-subexpressions,dead-code,dead-code", "--dump", dumps)
    stages = effcc("inspect", dumps, "--json").json["stages"]
    assert [(stage["name"], stage["changed"], stage["ops"]) for stage in stages] == [
        ("input", True, 5),
        ("common-subexpressions", True, 4),
        ("dead-code", True, 3),
        ("dead-code", False, 3),
    ]
    difference = effcc("inspect", dumps, "--diff", 1, 2, "--json").json["diff"]
    assert [line[:12] for line in difference.splitlines() if line[:3] == "-  "] == ["-  %unused: "]
    assert "the two are equal" in effcc("inspect", dumps, "--diff", 2, 3).out
    history = effcc("inspect", dumps, "--node", "%z", "--json").json
    assert history["source"] == 'model.py:5 "c = x.cos()" in layers.1'
    assert [event["what"] for event in history["events"]] == ["appears, read by 1", "goes"]


def test_equal_names_in_a_subgraph_are_another_value(effcc: Effcc, tmp_path: Path) -> None:
    text = """graph @outer phase=inference {
  graph @layer phase=inference {
    %x: f32[4] = input()  role(input)
    %h: f32[4] = aten.sin.default(%x)
    return (%h)
  }
  %x: f32[4] = input()  role(input)
  %c: (f32[4],) = call(@layer, %x)
  %g: f32[4] = getitem(%c, 0)
  %h: f32[4] = aten.cos.default(%g)
  return (%h)
}
"""
    (tmp_path / "nested.ir").write_text(text)
    assert effcc("opt", tmp_path / "nested.ir", "--dump", tmp_path / "dumps").code == 0
    events = effcc("inspect", tmp_path / "dumps", "--node", "h", "--json").json["events"]
    assert [(event["stage"], event["lines"][0]) for event in events] == [
        ("000 input (in @outer)", "%h: f32[4] = aten.cos.default(%g)"),
        ("000 input (in @layer)", "%h: f32[4] = aten.sin.default(%x)"),
    ]


# --- devices, calibrate -----------------------------------------------------------------------------------------------


def test_devices(effcc: Effcc) -> None:
    shown = effcc("devices", "--json").json
    assert {"cpu", "h100", "h200", "a100-80g", "l4", "rtx4090", "mi300x", "tpu-v4i-like"} <= shown.keys()
    assert shown["h200"] == effcc("devices", "h200", "--json").json
    assert "h200" in effcc("devices").out
    # Every figure is printed with its source.
    file = json.loads((FOLDER / "h200.json").read_text())
    out = re.sub(r"\s+", " ", effcc("devices", "h200").out)
    assert file["matrix"]["bf16"]["source"][:40] in out
    refused(effcc("devices", "h201"), "h201", "h200")


def test_calibrate_writes_a_device_that_plans_can_use(
    effcc: Effcc, linear: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measurement itself has its own tests; here it is the packaged device with another capacity."""
    from effcc.cost_model import calibrate
    from effcc.cost_model.devices import load_device

    measured = {}

    def fake(seconds: float, save: bool) -> Any:
        measured.update(seconds=seconds, save=save)
        return load_device("cpu")

    monkeypatch.setattr(calibrate, "calibrate", fake)
    target = tmp_path / "mine.json"
    assert effcc("calibrate", "--seconds", 2, "--no-save", "-o", target).code == 0
    assert measured == {"seconds": 2.0, "save": False}
    assert effcc("plan", linear, "-d", target, "-o", tmp_path / "p.effcc", "--json").json["summary"]["device"] == "cpu"
    assert effcc("calibrate", "--seconds", 0.5).code == 2
    refused(effcc("calibrate", "-o", tmp_path), "folder")


# --- plan -------------------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr("effcc.planning._load", lambda _: pytest.fail("the model was loaded"))
    refused(effcc("plan", linear, *options), *words)
    assert sorted(path.name for path in linear.parent.iterdir()) == ["linear.py"]


def test_emit_names_the_extra_that_is_missing(
    effcc: Effcc, linear: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torch_mlir", "torch_mlir.fx"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("effcc.planning._load", lambda _: pytest.fail("the model was loaded"))
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
    monkeypatch.setattr("effcc.planning._load", lambda _: pytest.fail("the model was loaded"))
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


# --- run --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("clean_compiler")
@pytest.mark.parametrize("train", [True, False], ids=["train", "inference"])
def test_run_puts_measured_beside_predicted(effcc: Effcc, linear: Path, tmp_path: Path, train: bool) -> None:
    plan, page = tmp_path / "p.effcc", tmp_path / "page.html"
    options = ["--train", "--optimizer", "adamw"] if train else []
    assert effcc("plan", linear, *options, "-o", plan, "--no-report").code == 0
    result = effcc("run", plan, linear, "-n", 3, "--json", "--report", page)
    assert result.code == 0, result.err
    shown = result.json
    assert len(shown["measured"]["all_seconds"]) == 3
    assert shown["measured"]["seconds"] == sorted(shown["measured"]["all_seconds"])[1] > 0
    held = PARAMETER_BYTES * (3 if train else 1) + 32 * 64 * 4 + (4 * 4 if train else 0)
    assert shown["measured"]["held_before"] == held
    assert shown["measured"]["peak"] == pytest.approx(shown["predicted"]["peak"], rel=0.1)
    assert "measured" in page.read_text()


@pytest.mark.usefixtures("clean_compiler")
def test_run_refuses_a_plan_for_another_model(effcc: Effcc, linear: Path, tmp_path: Path) -> None:
    plan, other = tmp_path / "p.effcc", tmp_path / "other.py"
    other.write_text(LINEAR.replace("GELU", "ReLU"))
    assert effcc("plan", linear, "-o", plan, "--no-report").code == 0
    refused(effcc("run", plan, other), "another graph", "relu", "effcc plan")


def test_run_names_the_line_of_a_model_that_fails(effcc: Effcc, linear: Path, tmp_path: Path) -> None:
    plan, broken = tmp_path / "p.effcc", tmp_path / "broken.py"
    broken.write_text(LINEAR.replace("    return y.square", "    raise ValueError('not today')\n    return y.square"))
    assert effcc("plan", linear, "-o", plan, "--no-report").code == 0
    refused(effcc("run", plan, broken), "not today", "broken.py")


def test_run_refuses_what_cannot_fit(effcc: Effcc, linear: Path, sample: Path) -> None:
    import msgspec
    from effcc.ir.plan_file import save_plan

    loaded = load_plan(sample)
    huge = msgspec.structs.replace(loaded.plan.buffers[0], bytes=1 << 60)
    plan = msgspec.structs.replace(
        loaded.plan, buffers=(huge, *loaded.plan.buffers[1:]), peak={"device": (1 << 60) + 3 * MIB}
    )
    save_plan(sample, plan, loaded.graphs_text, {})
    refused(effcc("run", sample, linear), "1048576 TiB", "larger machine")


# --- documentation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [info.name for info in cli.app.registered_commands])
def test_the_documentation_has_every_command_and_option(effcc: Effcc, command: str) -> None:
    text = (Path(__file__).parent.parent / "docs" / "command_line.md").read_text()
    assert re.search(rf"^\| \[`{command}`\]\(#", text, re.MULTILINE)
    section = re.search(rf"^## (?:\w+ and )?{command}\b.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section is not None
    documented = set(re.findall(r"--[a-z][\w-]*", section[0])) | {"--help", "--json"}
    real = set(re.findall(r"^│ \*?\s*(--[\w-]+)", effcc(command, "--help").out, re.MULTILINE))
    if command == "devices":  # shares its section with calibrate
        assert real <= documented
    else:
        others = {"--dump"} if command == "inspect" else set()
        assert documented - others == real | {"--json"}
