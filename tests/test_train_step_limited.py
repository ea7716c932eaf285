"""A model whose weights, gradients and optimizer state are three times its budget, in a process that the system gives
too little memory for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from subprocesses import results, start

#: Bytes of the budget, and what the process may use besides it: threads' stacks, the interpreter, code.
BUDGET, BESIDES = 64 << 20, 96 << 20

PROGRAM = f"""
import json, resource, sys, torch, effcc
from train_steps import adamw, batches, loss_of, network, ordinary, state_bytes, stepped
how, folder = sys.argv[1:] if len(sys.argv) > 1 else HOW
settings = dict(width=512, depth=8, words=512)
data = batches(20, words=512)

def in_use():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {{name: int(fields[name].split()[0]) * 1024 for name in ("VmSize", "VmHWM", "VmRSS")}}

if how == "make":
    model = network(**settings)
    torch.save(model.state_dict(), folder + "/weights.pt")
    print(json.dumps(dict(losses=ordinary(model, adamw(model.parameters()), data), all=state_bytes(model))))
else:
    # What torch loads when it is first used is not the model's.
    small = network(width=32, words=512)
    stepped(effcc.train_step(small, adamw(small.parameters()), loss_of, memory_budget=1 << 30), data[:1])
    before = in_use()
    limit = before["VmSize"] + {BUDGET} + {BESIDES}
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        if how == "ordinary":
            model = network(**settings)
            losses = ordinary(model, adamw(model.parameters()), data[:2])
        else:
            with torch.device("meta"):
                model = network(**settings)
            step = effcc.train_step(
                model, adamw(model.parameters()), loss_of, memory_budget={BUDGET}, swap_dir=folder,
                checkpoint=folder + "/weights.pt",
            )
            losses = stepped(step, data)
        print(json.dumps(dict(losses=losses, grown=in_use()["VmHWM"] - before["VmRSS"], failed="")))
    except (MemoryError, RuntimeError) as error:
        print(json.dumps(dict(losses=[], grown=0, failed=str(error))))
"""


@pytest.mark.slow
def test_a_model_three_times_its_budget_under_a_limit_of_the_systems(tmp_path: Path) -> None:
    def run(how: str) -> Any:
        program = PROGRAM.replace("HOW", repr((how, str(tmp_path))))
        # One arena of malloc, and memory given back at once: the limit is on addresses, not on what is in use.
        arenas = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        return results([start(program, tmp_path / "cache", arenas)])[0]

    made = run("make")
    assert made["all"] > 3 * BUDGET
    assert "allocate memory" in run("ordinary")["failed"], "without effcc it does not fit"
    limited = run("step")
    assert limited["failed"] == ""
    assert limited["losses"] == made["losses"], "20 steps, bit for bit"
    assert limited["grown"] < BUDGET + BESIDES
    print(f"resident size grew by {limited['grown'] / 2**20:.0f} MiB, all: {made['all'] / 2**20:.0f} MiB")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["weights.pt"]
