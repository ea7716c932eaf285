"""Compile time of a Llama-like training step over depth: effcc, Inductor, and Inductor with ``nested_compile_region``
put in by hand. Each run is a process of its own with a code cache of its own; ``warm`` repeats it on the same cache.

    python benchmarks/compile_time.py [--layers 4,24] [--backends effcc,inductor,nested]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

BATCH, LENGTH, WIDTH = 2, 512, 256


def one(backend: str, layers: int) -> dict[str, Any]:
    """First and second step in this process, in seconds. ``beyond``: effcc's own part, after capture."""
    import torch
    from common import models
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama import modeling_llama

    if backend == "nested":
        forward = torch.compiler.nested_compile_region(modeling_llama.LlamaDecoderLayer.forward)
        modeling_llama.LlamaDecoderLayer.forward = forward
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=WIDTH, intermediate_size=640, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    tokens = torch.randint(0, 8192, (BATCH, LENGTH))
    sample = models.Sample(model, {"input_ids": tokens}, tokens)
    name = {"nested": "inductor", "capture": "aot_eager"}.get(backend, backend)
    run = torch.compile(model, backend=name)

    def step() -> float:
        from common import training_step

        begin = time.perf_counter()
        training_step(run, sample)
        return time.perf_counter() - begin

    first, second = step(), step()
    result: dict[str, Any] = {"first": first, "step": min(second, step())}
    if backend == "effcc":
        import effcc

        result["beyond"] = sum(report.compile_seconds + report.wait_seconds for report in effcc.reports())
        result["capture"] = first - result["step"] - result["beyond"]
    return result


def run_apart(backend: str, layers: int, cache: str) -> dict[str, Any]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "EFFCC_CACHE_DIR": f"{cache}/effcc"}
    command = [sys.executable, __file__, "--one", backend, "--layers", str(layers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", default="4,24")
    parser.add_argument("--backends", default="effcc,inductor,nested,capture")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--name", default="compile_time")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one, int(arguments.layers))))
        return
    from common import environment, keep, show

    about, rows = environment(), []
    for layers in map(int, arguments.layers.split(",")):
        for backend in arguments.backends.split(","):
            with tempfile.TemporaryDirectory() as cache:
                states = ("cold",) if backend == "capture" else ("cold", "warm")
                for state in states:
                    found = run_apart(backend, layers, cache)
                    row = {"backend": backend, "layers": layers, "cache": state, "first call s": found["first"]}
                    row |= {f"{part} s": found.get(part, "") for part in ("capture", "beyond", "step")}
                    rows.append(row)
                    show("compile time", rows[-1:])
    show("compile time", rows)
    print(keep(arguments.name, rows, about))


if __name__ == "__main__":
    main()
