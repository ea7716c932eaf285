"""Of the example models' forward ops, how many have a history from source line to kernel and address."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Effcc
from effcc.inspection.history import node_history
from effcc.inspection.lineage import scopes
from effcc.inspection.stages import Dump, open_dump

ROOT = Path(__file__).resolve().parent.parent.parent
MODELS = ("gpt2_train.py:small", "llama.py", "mixtral.py", "qwen3_moe.py", "vit.py", "cnn.py")
#: Share of the ops that must have one.
WANTED = 0.95


def complete(dump: Dump) -> tuple[int, list[str]]:
    """How many forward ops there are, and those without a complete history, with what is last known of them."""
    count, missing = 0, []
    for name, stages in dump.chains().items():
        graph = stages[0].parsed
        if graph is None or graph.phase == "backward":
            continue
        ops = {node.name for inner in scopes(graph).values() for node in inner.nodes if node.op != "input"}
        for op in sorted(ops):
            history = node_history(dump, f"{name}:%{op}")
            count += 1
            if not history.complete:
                last = history.events[-1].what if history.events else "nothing is known"
                missing.append(f"{name}:%{op} ({history.source or 'no line'}): {last}")
    return count, missing


@pytest.mark.slow
@pytest.mark.usefixtures("clean_compiler")
@pytest.mark.parametrize("training", [True, False], ids=["train", "inference"])
@pytest.mark.parametrize("model", MODELS)
def test_forward_ops_of_the_examples(effcc: Effcc, tmp_path: Path, model: str, training: bool) -> None:
    plan = tmp_path / "plan.effcc"
    options = ["--train", "--optimizer", "adamw"] if training else []
    made = effcc("plan", ROOT / "examples" / model, *options, "-o", plan, "--dump", tmp_path / "passes", "--no-report")
    assert made.code == 0, made.err
    count, missing = complete(open_dump(plan))
    print(f"{model}: {count - len(missing)} of {count} ops, {100 * (1 - len(missing) / count):.1f} %")
    assert count > 20
    assert len(missing) <= (1 - WANTED) * count, missing
