"""What all commands have in common: help, exit codes, errors, interrupts, and that the documentation has them all."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import Effcc, refused
from effcc import cli

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
        others = {"inspect": {"--dump"}, "export": {"--trace"}}.get(command, set())  # of other commands, spoken of
        assert documented - others == real | {"--json"}
