"""Plans of small graphs, checked against counts made by hand."""

from __future__ import annotations

import time

import pytest
from effcc.cost_model.devices import load_device
from effcc.cost_model.liveness import live_bytes
from effcc.cost_model.outside_loss import LOSS_BYTES
from effcc.cost_model.region_memory import RegionBuffer, RegionKernel, RegionMemory
from effcc.errors import PlanError, ShapeError
from effcc.ir.graph import Graph
from effcc.ir.parser import parse_graph
from effcc.ir.plan import Buffer, Plan
from effcc.ir.plan_validator import problems
from effcc.passes.planner import StateBytes, make_plan

CPU = load_device("cpu")
KIB = 1024

FORWARD = parse_graph(
    """
graph @net phase=forward saved=2 {
  %w: f32[16,16] = input() loc("layer.weight") role(parameter)
  %x: f32[16,16] = input() role(input)
  %h: f32[16,16] = aten.mm.default(%x, %w)
  %y: f32[16,16] = aten.tanh.default(%h)
  %l: f32[] = aten.sum.default(%y)
  return (%l, %x, %y)
}
""".replace(' loc("layer.weight")', "")
)

BACKWARD = parse_graph("""
graph @net phase=backward {
  %x: f32[16,16] = input() role(saved)
  %y: f32[16,16] = input() role(saved)
  %t: f32[] = input() role(tangent)
  %s: f32[16,16] = aten.mul.Tensor(%y, %y)
  %d: f32[16,16] = aten.mul.Tensor(%s, %t)
  %xt: f32[16,16]{1,16} = aten.t.default(%x)
  %g: f32[16,16] = aten.mm.default(%xt, %d)
  alias %xt of %x
  return (%g, None)
}
""")

STATE = StateBytes(
    parameters=(("w", KIB, "layer"),),
    gradients=(("w", KIB, "layer"),),
    optimizer=(("w.exp_avg", KIB, "layer"), ("w.exp_avg_sq", KIB, "layer")),
)


def plan_of(*graphs: Graph, **options: object) -> Plan:
    plan = make_plan("net", graphs, CPU, place=False, **options)  # type: ignore[arg-type]
    assert problems(plan) == []
    return plan


def lifetimes(plan: Plan) -> dict[str, tuple[str, int, int, int]]:
    return {b.name: (b.role, b.bytes, b.lower, b.upper) for b in plan.buffers}


LOGITS = parse_graph("""
graph @net phase=forward saved=1 {
  %w: f32[16,16] = input() role(parameter)
  %x: f32[16,16] = input() role(input)
  %y: f32[16,16] = aten.mm.default(%x, %w)
  return (%y, %x)
}
""")

BACKWARD_OF_LOGITS = parse_graph("""
graph @net phase=backward {
  %x: f32[16,16] = input() role(saved)
  %t: f32[16,16] = input() role(tangent)
  %xt: f32[16,16]{1,16} = aten.t.default(%x)
  %g: f32[16,16] = aten.mm.default(%xt, %t)
  alias %xt of %x
  return (%g, None)
}
""")


def test_a_loss_outside_has_its_memory_between_forward_and_backward() -> None:
    plain = plan_of(LOGITS, BACKWARD_OF_LOGITS)
    plan = plan_of(LOGITS, BACKWARD_OF_LOGITS, outside_loss=True)
    assert [(s.kind, s.phase, s.seconds) for s in plan.steps if s not in plain.steps][:1] == [("outside", "loss", 0.0)]
    assert [s.phase for s in plan.steps] == ["forward", "loss", "backward"]
    assert plan.seconds == plain.seconds
    # w, x, the outputs, their gradients, three times the outputs, two scalars; without: the gradient of w at the end.
    assert plan.peak["device"] == 7 * KIB + LOSS_BYTES and plain.peak["device"] == 5 * KIB
    assert ("workspace", 3 * KIB, 1, 2) in lifetimes(plan).values()
    inside = plan_of(FORWARD, BACKWARD, outside_loss=True)
    assert inside == plan_of(FORWARD, BACKWARD)


def test_training_step_by_hand() -> None:
    plan = plan_of(FORWARD, BACKWARD, state=STATE, optimizer="adamw")
    assert [(s.kind, s.name, s.phase) for s in plan.steps] == [
        ("library", "mm", "forward"),
        ("kernel", "tanh+sum", "forward"),
        ("kernel", "mul", "backward"),
        ("library", "mm", "backward"),
        ("optimizer", "adamw", "optimizer"),
    ]
    assert lifetimes(plan) == {
        "w": ("parameter", KIB, 0, 5),
        "w.exp_avg": ("optimizer", KIB, 0, 5),
        "w.exp_avg_sq": ("optimizer", KIB, 0, 5),
        "x": ("input", KIB, 0, 5),
        "y": ("saved", KIB, 0, 3),  # tanh runs in the memory of the product
        "l": ("output", 4, 1, 5),
        "gradient(l)": ("input", 4, 2, 4),
        "d": ("workspace", KIB, 2, 4),
        "gradient(w)": ("gradient", KIB, 3, 5),
        "adamw temporaries": ("workspace", 2 * KIB, 4, 5),
    }
    # At the optimizer: parameter, two states, input, gradient, two temporaries, and the loss.
    assert plan.peak == {"device": 7 * KIB + 4}
    assert plan.steps[0].flop == plan.steps[3].flop == 2 * 16**3
    assert plan.training and plan.optimizer == "adamw" and plan.dtype == "f32"
    assert [(g.name, g.first_step, g.last_step) for g in plan.graphs] == [("net", 0, 1), ("net.backward", 2, 3)]


def test_every_buffer_is_freed_where_it_ends() -> None:
    plan = plan_of(FORWARD, BACKWARD, state=STATE)
    freed = {identity: position for position, step in enumerate(plan.steps) for identity in step.frees}
    for b in plan.buffers:
        if b.role in ("saved", "scratch", "workspace"):
            assert freed[b.id] == b.upper - 1
        else:
            assert b.id not in freed or b.name.startswith("gradient(l)")


def test_steps_are_timed_one_after_another() -> None:
    plan = plan_of(FORWARD, BACKWARD)
    for earlier, later in zip(plan.steps, plan.steps[1:], strict=False):
        assert later.start == pytest.approx(earlier.start + earlier.seconds)
    assert plan.seconds == pytest.approx(plan.steps[-1].start + plan.steps[-1].seconds)


def test_inference_has_no_gradients_and_no_optimizer() -> None:
    plan = plan_of(parse_graph("""
    graph @g phase=inference {
      %x: f32[8] = input() role(input)
      %y: f32[8] = aten.exp.default(%x)
      return (%y)
    }
    """), optimizer="adamw")  # fmt: skip
    assert not plan.training and plan.optimizer == ""
    assert lifetimes(plan) == {"x": ("input", 32, 0, 1), "y": ("output", 32, 0, 1)}


def test_views_share_memory_and_identity_is_a_plan() -> None:
    plan = plan_of(
        parse_graph("""
    graph @g phase=inference {
      %x: f32[8] = input() role(input)
      %v: f32[2,4] = aten.view.default(%x, [2, 4])
      alias %v of %x
      return (%v)
    }
    """)
    )
    assert plan.peak == {"device": 32} and len(plan.buffers) == 1


LAYERS = """
graph @g phase=inference {
  graph @layer phase=inference {
    %a: f32[256] = input()
    %w: f32[256] = input()
    %b: f32[256] = aten.mul.Tensor(%a, %w)  loc(m.py:3 "x = x * w" in layers.0.mlp)
    %c: f32[128,2] = aten.mm.default(%b, %b)  loc(m.py:4 "x = x @ x" in layers.0.mlp.up)
    %d: f32[256] = aten.view.default(%c, [256])
    alias %d of %c
    return (%d, %a)
  }
  %x: f32[256] = input() role(input)
  %w0: f32[256] = input() role(parameter)
  %w1: f32[256] = input() role(parameter)
  %l0: (f32[256], f32[256]) = call(@layer, %x, %w0)  loc(m.py:9 "x = layer(x)" in layers.0)
  %p0: f32[256] = getitem(%l0, 0)
  %l1: (f32[256], f32[256]) = call(@layer, %p0, %w1)  loc(m.py:9 "x = layer(x)" in layers.1)
  %p1: f32[256] = getitem(%l1, 0)
  %q1: f32[256] = getitem(%l1, 1)
  return (%p1, %q1)
}
"""


def test_calls_are_expanded_with_their_own_memory_and_module() -> None:
    plan = plan_of(parse_graph(LAYERS))
    assert [(s.name, s.module, s.region) for s in plan.steps] == [
        ("mul", "layers.0.mlp", "layer.region0"),
        ("mm", "layers.0.mlp.up", "layer.region0"),
        ("mul", "layers.1.mlp", "layer.region0"),
        ("mm", "layers.1.mlp.up", "layer.region0"),
    ]
    # The second layer hands its input through: the first layer's result is an output and lives to the end.
    assert sorted((b.role, b.lower, b.upper, b.module) for b in plan.buffers) == [
        ("input", 0, 4, ""),
        ("output", 1, 4, "layers.0.mlp.up"),
        ("output", 3, 4, "layers.1.mlp.up"),
        ("parameter", 0, 4, ""),
        ("parameter", 0, 4, ""),
        ("workspace", 0, 2, "layers.0.mlp"),
        ("workspace", 2, 4, "layers.1.mlp"),
    ]


def test_a_call_without_location_is_named_after_its_parameters() -> None:
    text = LAYERS.replace(' loc(m.py:9 "x = layer(x)" in layers.0)', "")
    text = text.replace(' loc(m.py:9 "x = layer(x)" in layers.1)', "")
    for i in range(2):
        text = text.replace(
            f"%w{i}: f32[256] = input()", f'%w{i}: f32[256] = input() loc(m.py:1 "" in layers.{i}.weight)'
        )
    plan = plan_of(parse_graph(text))
    assert [s.module.split(".")[1] for s in plan.steps] == ["0", "0", "1", "1"]


def answer(**changes: object) -> RegionMemory:
    buffers = (
        RegionBuffer(name="arg0", bytes=KIB, first=0, last=0, values=("x",)),
        RegionBuffer(name="buf0", bytes=KIB, first=0, last=1),
        RegionBuffer(name="buf1", bytes=3 * KIB, first=1, last=1),
        RegionBuffer(name="buf2", bytes=KIB, first=1, last=2, values=("y",)),
        RegionBuffer(name="buf3", bytes=4, first=2, last=2, values=("l",)),
    )
    kernels = tuple(RegionKernel(name=name, ops=(op,)) for name, op in (("k0", "h"), ("k1", "y"), ("k2", "l")))
    fields: dict[str, object] = {"kernels": kernels, "buffers": buffers} | changes
    return RegionMemory(**fields)  # type: ignore[arg-type]


def test_answers_about_a_compiled_region_are_used_as_they_are() -> None:
    asked: list[Graph] = []

    def region_buffers(region: Graph) -> RegionMemory:
        asked.append(region)
        return answer()

    plan = plan_of(FORWARD, region_buffers=region_buffers)
    assert len(asked) == 1 and [n.name for n in asked[0].inputs] == ["x", "w"]
    assert asked[0].output_names() == ["y", "l"]
    assert [s.name for s in plan.steps] == ["k0", "k1", "k2"]
    own = {
        b.name: (b.role, b.bytes, b.lower, b.upper) for b in plan.buffers if b.role in ("workspace", "saved", "output")
    }
    assert own == {
        "buf0": ("workspace", KIB, 0, 2),
        "buf1": ("workspace", 3 * KIB, 1, 2),
        "y": ("saved", KIB, 1, 3),
        "l": ("output", 4, 2, 3),
    }
    assert live_bytes(plan.buffers, 3).bytes == (3 * KIB, 7 * KIB, 3 * KIB + 4)
    assert plan.steps[0].flop == 2 * 16**3


def test_a_region_that_overwrites_its_input_uses_one_buffer() -> None:
    text = """
    graph @g phase=inference {
      graph @a phase=inference {
        %i: f32[256] = input()
        %o: f32[256] = aten.exp.default(%i)
        return (%o)
      }
      %x: f32[256] = input() role(input)
      %c: (f32[256]) = call(@a, %x)
      %p: f32[256] = getitem(%c, 0)
      %q: f32[256] = aten.neg.default(%p)
      return (%q)
    }
    """

    def region_buffers(region: Graph) -> RegionMemory | None:
        if region.nodes[-1].name != "q":
            return None
        both = RegionBuffer(name="arg0", bytes=KIB, first=0, last=0, values=("p", "q"))
        return RegionMemory(kernels=(RegionKernel(name="k"),), buffers=(both,))

    separate, shared = plan_of(parse_graph(text)), plan_of(parse_graph(text), region_buffers=region_buffers)
    assert separate.peak["device"] == 3 * KIB and shared.peak["device"] == 2 * KIB


def test_an_answer_that_does_not_fit_is_refused() -> None:
    bad = (RegionBuffer(name="b", bytes=1, first=0, last=7),)
    with pytest.raises(PlanError, match="used by kernels 0 to 7 of 3"):
        make_plan("net", [FORWARD], CPU, region_buffers=lambda _: answer(buffers=bad), place=False)


def test_graphs_that_do_not_fit_each_other() -> None:
    with pytest.raises(PlanError, match="no forward before it"):
        make_plan("net", [BACKWARD], CPU, place=False)
    fewer = FORWARD.with_nodes(FORWARD.nodes, saved=1)
    with pytest.raises(PlanError, match="saves 1 tensors and its backward takes 2"):
        make_plan("net", [fewer, BACKWARD], CPU, place=False)


def test_symbolic_sizes_need_a_binding() -> None:
    graph = parse_graph("""
    graph @g phase=inference {
      %s0: int = input() role(symbol)
      %x: f32[s0] = input() role(input)
      %y: f32[s0] = aten.exp.default(%x)
      return (%y)
    }
    """)
    assert plan_of(graph, bindings={"s0": 100}).peak == {"device": 800}
    with pytest.raises(ShapeError, match="no value for s0"):
        make_plan("g", [graph], CPU, place=False)


def test_a_budget_that_does_not_hold_is_a_note() -> None:
    assert plan_of(FORWARD, budget=10**6).budget == 10**6
    plan = plan_of(FORWARD, budget=100)
    assert plan.budget is None and "above the budget of 100 bytes" in plan.notes[0]


def deep(layers: int) -> Graph:
    body = LAYERS[LAYERS.index("  graph @layer") : LAYERS.index("  %x: f32[256]")]
    lines = ["graph @g phase=inference {", body, "%x: f32[256] = input() role(input)"]
    lines += [f"%w{i}: f32[256] = input() role(parameter)" for i in range(layers)]
    value = "x"
    for i in range(layers):
        lines.append(f"%l{i}: (f32[256], f32[256]) = call(@layer, %{value}, %w{i})")
        lines.append(f"%p{i}: f32[256] = getitem(%l{i}, 0)")
        value = f"p{i}"
    return parse_graph("\n".join([*lines, f"return (%{value})", "}"]))


def test_depth_costs_little() -> None:
    graph = deep(1000)
    begin = time.process_time()
    plan = make_plan("g", [graph], CPU, place=False)
    assert time.process_time() - begin < 3.0  # 0.2 s alone on the machine
    assert len(plan.steps) == 2000
    inner: list[Buffer] = [b for b in plan.buffers if b.role in ("scratch", "workspace")]
    assert max(live_bytes(inner, 2000).bytes) == 2 * KIB
