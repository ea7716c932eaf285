"""A small plan with known figures, shared by the tests of what users see."""

from __future__ import annotations

from pathlib import Path

from effcc.ir.parser import parse_graph
from effcc.ir.plan import Buffer, GraphPlan, Plan, Solver, Step
from effcc.ir.plan_file import save_plan
from effcc.ir.structural_hash import graph_hash, op_hashes

MIB = 2**20

FORWARD = """graph @mlp phase=inference {
  %x: f32[512,512] = input()  role(input)
  %w: f32[512,512] = input()  role(parameter)
  %h: f32[512,512] = aten.mm.default(%x, %w)  loc(model.py:7 "h = x @ self.w (twice)" in layers.0)
  %y: f32[512,512] = aten.relu.default(%h)  loc(model.py:8 "return h.relu()" in layers.0)
  return (%y)
}
"""


def make_sample(budget: int | None = None) -> Plan:
    """Two steps on an L4. Position 0 holds x, w, h and the arena; position 1 y too: 4 MiB at the peak."""
    graph = parse_graph(FORWARD)
    buffers = (
        Buffer(id=0, name="x", bytes=MIB, lower=0, upper=2, role="input", dtype="f32", shape=(512, 512)),
        Buffer(id=1, name="w", bytes=MIB, lower=0, upper=2, role="parameter", module="layers.0"),
        Buffer(
            id=2, name="h", bytes=MIB, lower=0, upper=2, role="scratch", offset=0, alignment=64,
            source='model.py:7 "h = x @ self.w"', module="layers.0", dtype="f32", shape=(512, 512),
        ),
        Buffer(id=3, name="y", bytes=MIB, lower=1, upper=2, role="output", source="model.py:8"),
    )  # fmt: skip
    steps = (
        Step(
            id=0, kind="library", name="mm", phase="inference", reads=(0, 1), writes=(2,), start=0.0, seconds=3e-5,
            flop=2 * 512**3, bytes_moved=3 * MIB, ops=("h",), source='model.py:7 "h = x @ self.w"', module="layers.0",
        ),
        Step(
            id=1, kind="region", name="relu", phase="inference", reads=(2,), writes=(3,), frees=(2,), start=3e-5,
            seconds=1e-5, flop=512 * 512, bytes_moved=2 * MIB, ops=("y",), source="model.py:8", module="layers.0",
        ),
    )  # fmt: skip
    return Plan(
        model="sample",
        device="l4",
        training=False,
        graphs=(GraphPlan(name="mlp", graph_hash=graph_hash(graph), op_hashes=op_hashes(graph), last_step=1),),
        steps=steps,
        buffers=buffers,
        seconds=4e-5,
        peak={"device": 4 * MIB},
        arena={"device": MIB},
        budget=budget,
        solvers=(Solver(name="greedy", problem="offsets", value=MIB, bound=MIB),),
        fallbacks=(("aten.cholesky.default", "no kernel <for> it", "model.py:9"),),
        dtype="f32",
    )


def write_sample(folder: Path, budget: int | None = None) -> Path:
    """The sample as ``plan.effcc`` in ``folder``."""
    path = folder / "plan.effcc"
    save_plan(path, make_sample(budget), {"mlp": FORWARD}, {"host.py": "def run(x):\n    return x\n"})
    return path
