"""torch's own op database (OpInfo) through the backend: forward and gradients against eager, see ``op_samples``.

By default a few ops drawn afresh; with ``-m slow`` all of them, one test an op. ``EFFCC_OP_DB_LOG=file`` appends a line
of JSON for each op done, and skips ops that the file already has as right: a sweep can be resumed or split.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("expecttest", reason="torch's op database needs the package expecttest (extra dev)")

from fresh_seed import fresh_random
from op_samples import Verdict, cases_of, check
from torch.testing._internal.common_methods_invocations import op_db

pytestmark = pytest.mark.usefixtures("clean_compiler")

OPS = {op.formatted_name: op for op in op_db if op.dtypes & {torch.float64, torch.float32}}
LOG = os.environ.get("EFFCC_OP_DB_LOG")
#: Samples of an op: in float64 with gradients, in float32 the forward alone.
LIMITS = {torch.float64: 4, torch.float32: 3}


def done_before() -> set[str]:
    if not LOG or not Path(LOG).exists():
        return set()
    lines = [json.loads(line) for line in Path(LOG).read_text().splitlines()]
    return {line["op"] for line in lines if not line["wrong"] and not line["failed"]}


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """Dynamo warns at every graph break of an op that it does not trace."""
    logger = logging.getLogger("torch._dynamo")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(OPS))
def test_op(name: str, record_property: Callable[[str, object], None]) -> None:
    if name in done_before():
        pytest.skip(f"right according to {LOG}")
    total = Verdict()
    for dtype, limit in LIMITS.items():
        if dtype in OPS[name].dtypes:
            verdict = check(cases_of(OPS[name], dtype, limit, gradient=dtype == torch.float64))
            for item in dataclasses.fields(Verdict):
                setattr(total, item.name, getattr(total, item.name) + getattr(verdict, item.name))
    record_property("op_db", dataclasses.asdict(total))
    if LOG:
        with Path(LOG).open("a") as file:
            file.write(json.dumps({"op": name} | dataclasses.asdict(total)) + "\n")
    assert not total.bad(), "\n".join(total.bad())


def test_ops_drawn_afresh(record_property: Callable[[str, object], None]) -> None:
    """Six ops, two samples each, in one graph with its backward."""
    names = fresh_random().sample(sorted(OPS), 6)
    print(*names)
    cases = [case for name in names for case in cases_of(OPS[name], torch.float64, 2, gradient=True)]
    verdict = check(cases)
    record_property("op_db", dataclasses.asdict(verdict))
    assert verdict.compiled + verdict.broken + verdict.untouched + len(verdict.refused) > 0
    assert not verdict.bad(), "\n".join(verdict.bad())
