"""The report of large plans: bytes of the page, seconds to write it, and until Chromium has drawn it.

python benchmarks/report.py [--screenshots FOLDER]

Plans Llama-3-8B's training step (about a minute), and a model of 126 layers. Opening: from navigation to the load event
and the first frame after it, in a headless Chromium; the median of five.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from browser import browser, console, requests, screenshot  # noqa: E402
from common import environment, keep, show  # noqa: E402
from effcc.ir.plan_file import load_plan  # noqa: E402
from effcc.plan_request import PlanRequest  # noqa: E402
from effcc.planning import plan_model  # noqa: E402
from effcc.report.page import render_report  # noqa: E402

EXAMPLES = HERE.parent / "examples"
#: Depth of Llama-3.1-405B, on a narrow model: the page does not know how wide it is.
DEEP = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = LlamaConfig(vocab_size=1024, hidden_size=128, intermediate_size=256, num_hidden_layers=126,
                     num_attention_heads=8, num_key_value_heads=4, use_cache=False)


def model():
    return LlamaForCausalLM(CONFIG)


def example_inputs():
    tokens = torch.zeros(1, 128, dtype=torch.long)
    return {"input_ids": tokens, "labels": tokens}
"""


def measure(name: str, request: PlanRequest, folder: Path, shots: Path | None) -> dict[str, Any]:
    plan, dumps, page = folder / f"{name}.effcc", folder / f"{name}-passes", folder / f"{name}.html"
    plan_model(PlanRequest(**(vars(request) | {"dump_dir": dumps}))).save(plan)
    loaded = load_plan(plan)
    begin = time.perf_counter()
    text = render_report(loaded, dumps)
    written = time.perf_counter() - begin
    page.write_text(text)
    opened = []
    for _ in range(5):
        with browser() as driver:
            requests(driver)  # those of Chromium's own first page
            begin = time.perf_counter()
            driver.get(page.as_uri())
            driver.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0]))")
            opened.append(time.perf_counter() - begin)
            assert console(driver) == []
            assert all(address.startswith(("file:", "data:")) for address in requests(driver))
    for width in (1280, 390) if shots else ():
        for dark in (False, True):
            with browser(width, 900, dark) as driver:
                driver.get(page.as_uri())
                screenshot(driver, shots / f"{name}-{width}-{'dark' if dark else 'light'}.png", whole=False)
    return {
        "model": name,
        "steps": len(loaded.plan.steps),
        "buffers": len(loaded.plan.buffers),
        "megabytes": len(text.encode()) / 1e6,
        "write_seconds": written,
        "open_seconds": statistics.median(opened),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--screenshots", type=Path, help="Folder for pictures of the pages.")
    arguments.add_argument("--keep", action="store_true", help="Write results/report.json.")
    chosen = arguments.parse_args()
    if chosen.screenshots:
        chosen.screenshots.mkdir(parents=True, exist_ok=True)
    about = environment()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "deep.py").write_text(DEEP)
        llama = PlanRequest(str(EXAMPLES / "llama3_8b.py"), train=True, optimizer="adamw", dtype="bf16", device="h200")
        deep = PlanRequest(str(folder / "deep.py"), train=True, optimizer="adamw", device="h200")
        rows = [
            measure("llama-3-8b", llama, folder, chosen.screenshots),
            measure("126-layers", deep, folder, chosen.screenshots),
        ]
    show("Report", rows)
    if chosen.keep:
        print(keep("report", rows, about))


if __name__ == "__main__":
    main()
