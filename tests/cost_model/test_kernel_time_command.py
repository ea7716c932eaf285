"""``effcc predict kernels`` and ``effcc calibrate --from-data`` as a user calls them."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from effcc import cli

ROOT = Path(__file__).parents[2]
ASKED = """OPName,Device,Latency,Kernel Name,Grid x,B,M,N,K,H
bmm,NVIDIA A100-PCIE-40GB,17.5,ampere_sgemm_128x128_nn,3,8192,96,384,384,
linear,Tesla T4,nonsense,,x,1,4096,1024,4096,
ln,NVIDIA L4,,,,65536,,,,1600
softmax,NVIDIA L4,,,,65536,,,,1600
relu,NVIDIA H100 80GB HBM3,,,,16384,,,,4096
"""


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: object, **environment: str) -> Done:
    """The command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        for name, value in environment.items():
            patch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
    code = ended.value.code
    return Done(code if isinstance(code, int) else 0 if code is None else 1, out.getvalue(), err.getvalue())


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    path = tmp_path / "asked.csv"
    path.write_text(ASKED)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFCC_CACHE_DIR", str(tmp_path / "cache"))


def predictions(text: str) -> list[tuple[float, float, float]]:
    return [
        (float(r["predicted_ms"]), float(r["p05_ms"]), float(r["p95_ms"])) for r in csv.DictReader(text.splitlines())
    ]


def test_writes_the_rows_with_predictions_and_band(asked: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    done = run("predict", "kernels", asked, "-o", out)
    assert done.returncode == 0, done.stderr
    written = list(csv.DictReader(out.read_text().splitlines()))
    given = list(csv.DictReader(ASKED.splitlines()))
    added = ["predicted_ms", "p05_ms", "p95_ms"]
    assert list(written[0]) == [*given[0], *added]
    assert [{k: v for k, v in row.items() if k not in added} for row in written] == given
    for middle, low, high in predictions(out.read_text()):
        assert 0 < low < middle < high < 10 * low
    assert "NVIDIA L4" in done.stdout
    # a 2 x 16384 x 4096 x 4 byte stream at the H100's 3.35 TB/s takes 0.16 ms at least
    assert 0.16 < predictions(out.read_text())[4][0] < 0.24


def test_reads_nothing_that_profiling_gives(asked: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.csv"
    rows = list(csv.DictReader(ASKED.splitlines()))
    names = ["H", "K", "N", "M", "B", "Device", "OPName"]
    bare.write_text("\n".join([",".join(names), *(",".join(row[name] for name in names) for row in rows)]) + "\n")
    first, second = run("predict", "kernels", asked), run("predict", "kernels", bare)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert predictions(first.stdout) == predictions(second.stdout)


def test_json_gives_each_group(asked: Path) -> None:
    done = run("predict", "kernels", asked, "--json")
    assert done.returncode == 0, done.stderr
    groups = {(group["family"], group["device"]): group for group in json.loads(done.stdout)}
    assert groups["linear", "Tesla T4"]["device_was_measured"] is True
    l4 = groups["norm", "NVIDIA L4"]
    assert l4["device_was_measured"] is False
    assert l4["nearest_measured_device"] == "NVIDIA A100-PCIE-40GB"
    assert len(l4["predicted_ms"]) == l4["rows"] == 1


def test_a_device_file_describes_a_device_of_any_name(asked: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(
        json.dumps({"Device": "mine", "Mem_Bw": 300, "Num_Sm": 60, "Core_Per_SM": 128, "Freq": 2040, "L2Cache": 48})
    )
    mine = tmp_path / "mine.csv"
    mine.write_text("OPName,Device,B,H\nadd,mine,65536,4096\n")
    refused = run("predict", "kernels", mine)
    assert refused.returncode == 2
    assert "no figures for the device 'mine'" in refused.stderr and "--device-file" in refused.stderr
    done = run("predict", "kernels", mine, "--device-file", file)
    assert done.returncode == 0, done.stderr
    least = 3 * 4 * 65536 * 4096 / 300e9 * 1e3
    assert least < predictions(done.stdout)[0][0] < 1.6 * least


def test_measured_rows_correct_the_others_of_their_device(asked: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    sizes = [(32768 * k, 2048) for k in range(1, 21)]
    rows.write_text("OPName,Device,B,H\n" + "".join(f"softmax,NVIDIA L4,{b},{h}\n" for b, h in sizes))
    plain = predictions(run("predict", "kernels", rows).stdout)
    measured = tmp_path / "measured.csv"
    lines = [f"softmax,NVIDIA L4,{b},{h},{1.5 * p[0]}" for (b, h), p in list(zip(sizes, plain, strict=True))[::2]]
    measured.write_text("OPName,Device,B,H,Latency\n" + "\n".join(lines) + "\n")
    done = run("predict", "kernels", rows, "--adapt", measured)
    assert done.returncode == 0, done.stderr
    ratios = [a[0] / b[0] for a, b in zip(predictions(done.stdout), plain, strict=True)]
    assert np.mean(ratios) == pytest.approx(1.5, rel=0.05)
    other = run("predict", "kernels", asked, "--adapt", measured)
    assert other.returncode == 0, other.stderr
    elsewhere = tmp_path / "elsewhere.csv"
    elsewhere.write_text(measured.read_text().replace("NVIDIA L4", "Tesla P4"))
    refused = run("predict", "kernels", rows, "--adapt", elsewhere)
    assert refused.returncode == 2
    assert "measured rows are of Tesla P4" in refused.stderr


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("OPName,Device,B,H\nadd,NVIDIA L5,1,2\n", "did you mean 'NVIDIA L4'"),
        ("OPName,Device,B,H\nfft,NVIDIA L4,1,2\n", "no model of the op 'fft'"),
        ("OPName,Device,B,H\nadd,NVIDIA L4,1,two\n", "H is 'two'"),
        ("OPName,B\nadd,1\n", "column Device is missing"),
        ("\x00\x01", "column OPName, Device is missing"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    done = run("predict", "kernels", path)
    assert done.returncode == 2
    assert says in done.stderr and "Traceback" not in done.stderr


def test_the_input_is_not_replaced(asked: Path) -> None:
    done = run("predict", "kernels", asked, "-o", asked)
    assert done.returncode == 2 and asked.read_text() == ASKED
    assert run("predict", "kernels", asked.with_name("none.csv")).returncode == 2


def test_neither_torch_nor_a_learner_is_imported(asked: Path) -> None:
    code = (
        "import sys, effcc.cli_predict as p; from pathlib import Path; "
        f"p.predict_kernels_command(Path({str(asked)!r}), None, None, None, None, False); "
        "print([m for m in ('torch', 'lightgbm', 'sklearn', 'scipy', 'pickle5') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_training_needs_the_data(tmp_path: Path) -> None:
    assert "set EFFCC_BENCH_DATA" in run("calibrate", "--from-data", EFFCC_BENCH_DATA="").stderr
    missing = run("calibrate", "--from-data", EFFCC_BENCH_DATA=str(tmp_path / "no"))
    assert missing.returncode == 2 and "does not exist" in missing.stderr
    empty = run("calibrate", "--from-data", EFFCC_BENCH_DATA=str(tmp_path))
    assert empty.returncode == 2 and "no *.train.csv.gz" in empty.stderr


def test_the_documentation_has_every_option() -> None:
    text = (ROOT / "docs" / "command_line.md").read_text()
    section = re.search(r"^## predict\b.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section is not None
    shown = "".join(run("predict", command, "--help").stdout for command in ("kernels", "model"))
    real = set(re.findall(r"^│ \*?\s*(--[\w-]+)", shown, re.MULTILINE))
    assert real - {"--help"} == set(re.findall(r"--[a-z][\w-]*", section[0])) - {"--from-data"}
    assert {"--adapt", "--device-file"} <= real
