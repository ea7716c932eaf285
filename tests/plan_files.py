"""A small sound plan with every kind of part, and its file taken apart and put together again."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from typing import Any

from effcc.errors import PlanError
from effcc.ir.plan import Buffer, GraphPlan, InputSpec, Plan, Solver, Step
from effcc.ir.plan_file import PlanFile, decode_plan

GRAPHS = {"forward": "graph @forward {\n  // a note\n}\n", "backward": "", 'odd "name"\n': "x\r\ny\n\n"}
SOURCES = {
    "region_0.py": "import torch\n\ndef call(args):\n    return args\n",
    "kernel.cpp": "// ünïcode\nint main() {}\n",
}


def small_plan() -> Plan:
    """Forward and backward of one layer with a swapped tensor: three streams, two tiers, two arenas on the device."""
    buffers = (
        Buffer(id=0, name="weight", bytes=4096, lower=0, upper=6, role="parameter", shape=(32, 32), dtype="f32"),
        Buffer(id=1, name="x", bytes=1000, lower=0, upper=3, role="scratch", offset=0),
        Buffer(id=2, name="y", bytes=500, lower=1, upper=6, role="saved", offset=0, pool="saved", decision="keep"),
        Buffer(id=3, name="x on the host", bytes=1000, lower=2, upper=5, role="saved", tier="host", offset=64),
        Buffer(id=4, name="x again", bytes=1000, lower=4, upper=6, role="scratch", offset=0, decision="swap"),
        Buffer(id=5, name="gradient", bytes=4096, lower=5, upper=6, role="gradient"),
    )
    steps = (
        Step(id=10, kind="region", name="layer", phase="forward", reads=(0,), writes=(1,), seconds=1e-3, flop=2048),
        Step(id=11, kind="library", name="mm", phase="forward", reads=(0, 1), writes=(2,), start=1e-3, seconds=2e-3),
        Step(id=12, kind="swap_out", name="x", phase="forward", stream="out", reads=(1,), writes=(3,), depends=(11,),
             start=3e-3, seconds=1e-3, frees=(1,)),
        Step(id=13, kind="library", name="mm", phase="forward", reads=(0, 2), start=3e-3, seconds=1e-3),
        Step(id=14, kind="swap_in", name="x", phase="backward", stream="in", reads=(3,), writes=(4,), depends=(12,),
             start=4e-3, seconds=1e-3, frees=(3,)),
        Step(id=15, kind="region", name="layer'", phase="backward", reads=(0, 2, 4), writes=(5,), depends=(14,),
             start=5e-3, seconds=1e-3, frees=(2, 4), ops=("a", "b")),
    )  # fmt: skip
    return Plan(
        model="tiny",
        device="cpu",
        training=True,
        graphs=(GraphPlan(name="main", graph_hash="ab12", op_hashes=("a", "b", "c"), first_step=0, last_step=5),),
        steps=steps,
        buffers=buffers,
        seconds=6e-3,
        peak={"device": 4096 + 4096 + 1024 + 512, "host": 1088},
        arena={"device": 1024, "device/saved": 512, "host": 1088},
        budget=10_000,
        solvers=(Solver(name="offsets", problem="scratch", value=1024.0, bound=1000.0, seed=7),),
        fallbacks=(("aten.nonzero", "data-dependent size", "model.py:8"),),
        notes=("a note",),
        inputs=(InputSpec(name="x", dtype="f32", shape=("s0", "32")),),
    )


def members_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archive_of(members: dict[str, bytes] | list[tuple[str, bytes]], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items() if isinstance(members, dict) else members:
            archive.writestr(name, content)
    return buffer.getvalue()


def resealed(members: dict[str, bytes]) -> bytes:
    """The archive with digests that fit the members: what someone who edits a plan on purpose would make."""
    manifest = json.loads(members["manifest.json"])
    manifest["sha256"] = {
        name: hashlib.sha256(content).hexdigest() for name, content in members.items() if name != "manifest.json"
    }
    return archive_of({**members, "manifest.json": json.dumps(manifest).encode()})


#: A graph with a string or word of every kind.
EVERY_STRING = """graph @main phase=forward saved=1 {
  repeat @layer x 1 digest "0123abcd"
  graph @layer phase=forward {
    %a: f32[s0,4] = input()  role(input)
    %b: f32[s0,4] = aten.exp.default(%a)
    return (%b)
  }
  %x: f32[s0,4] = input()  role(input)
  %w: f32[4,4]{1,4} = input()  role(parameter)
  %k: opaque("torch.Generator") = constant("generator")
  %y: f32[s0,4] = aten.mm.default(%x, %w)  loc("my model.py":8 "return x @ self.w" in layers.0)  from("remat(%9)")
  %c: (f32[s0,4],) = call(@layer, %y)
  %z: f32[s0,4] = getitem(%c, 0)
  %s: int(2*s0) = _operator.mul(s0, 2)
  %u: f32[s0,4] = mylib.scale.default(%z, [1, 2.5, complex(1.0, 2.0)], mode="fast", how=symbol("f"))
  %o: f32[s0,4] = aten._to_copy.default(%u, dtype=torch.float32)
  alias %c of %y
  return (%o, %s, %y)
}
"""


def outcome(data: bytes) -> PlanFile | None:
    """The loaded file, or None where it is refused; any other exception is a failure of the test."""
    try:
        return decode_plan(data)
    except PlanError as error:
        assert error.message and "Traceback" not in str(error)
        return None


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value of decoded JSON stands."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [found for key, item in items for found in paths(item, (*path, key))]


def with_value(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    copy = json.loads(json.dumps(value))
    place = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = new
    return copy
