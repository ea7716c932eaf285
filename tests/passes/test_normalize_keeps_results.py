"""``normalize`` changes no bit: of real models' graphs, and of random programs with views, writes and random draws."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from effcc.codegen.fx_export import to_fx
from effcc.frontend.fx_import import from_fx, tensor_constants
from effcc.ir.graph import Graph
from effcc.passes.manager import PassManager
from effcc.passes.pipeline import parse_pipeline
from fresh_seed import fresh_random
from fx_captures import MODELS, copy_value, graphs_of
from some_by_default import some_by_default
from torch.fx.experimental.proxy_tensor import make_fx


def normalized(graph: Graph) -> Graph:
    return PassManager(parse_pipeline("normalize")).run(graph)


def run(gm: torch.fx.GraphModule, args: list[Any]) -> tuple[list[Any], list[Any]]:
    """Outputs, and the inputs as the graph left them."""
    args = [copy_value(value) for value in args]
    torch.manual_seed(1)
    with torch.no_grad():
        result = torch.fx.Interpreter(gm).run(*args, enable_io_processing=False)
    return torch.utils._pytree.tree_leaves(result), args


def same_bits(left: Any, right: Any) -> bool:
    if not isinstance(left, torch.Tensor):
        return type(left) is type(right) and left == right
    if (left.dtype, left.shape, left.stride()) != (right.dtype, right.shape, right.stride()):
        return False
    return torch.equal(left.isnan(), right.isnan()) and torch.equal(left.nan_to_num(), right.nan_to_num())


def sharing(outputs: list[Any], inputs: list[Any]) -> list[tuple[int, int]]:
    """Pairs among outputs and inputs that lie in one storage: what a caller who writes to one would see."""
    pointers = [v.untyped_storage().data_ptr() if isinstance(v, torch.Tensor) else 0 for v in (*outputs, *inputs)]
    return [(i, j) for i, a in enumerate(pointers) for j, b in enumerate(pointers[:i]) if a == b != 0]


def assert_same_results(gm: torch.fx.GraphModule, graph: Graph, args: list[Any]) -> None:
    constants = tensor_constants(gm)
    expected, expected_inputs = run(gm, args)
    found, found_inputs = run(to_fx(graph, constants=constants, with_values=False), args)
    assert len(expected) == len(found)
    for a, b in zip([*expected, *expected_inputs], [*found, *found_inputs], strict=True):
        assert same_bits(a, b)
    assert sharing(expected, expected_inputs) == sharing(found, found_inputs)


@pytest.mark.parametrize(
    "model", some_by_default(["llama", "llama_dynamic", "gpt2", "conv", "conv_inference"], {"llama", "conv_inference"})
)
def test_of_real_models(model: str) -> None:
    removed = 0
    for one in graphs_of(model):
        graph = from_fx(one.gm, one.model, one.phase, forward=one.forward)
        after = normalized(graph)
        removed += len(graph.nodes) - len(after.nodes)
        assert_same_results(one.gm, after, one.args)
    assert removed > 0 or model == "conv_inference"


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_of_all_real_models(model: str) -> None:
    for one in graphs_of(model):
        assert_same_results(one.gm, normalized(from_fx(one.gm, one.model, one.phase)), one.args)


def random_program(generator: random.Random) -> Callable[..., list[torch.Tensor]]:
    """A function of two [4, 6] tensors: pointwise ops, copies, views, writes through them, constants, random draws."""
    steps = [(generator.random(), generator.random(), generator.random()) for _ in range(generator.randint(4, 14))]
    handed_out = [generator.random() for _ in range(4)]
    #: Few kinds of ops in one program, so that some occur twice.
    menu = [generator.random() for _ in range(generator.randint(2, 6))]

    def program(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        values = [x, y]
        for kind, first, second in steps:
            a, b = (values[int(share * len(values))] for share in (first, second))
            like = b if b.shape == a.shape else a
            makers: tuple[Callable[[], torch.Tensor], ...] = (
                lambda a=a, like=like: a + like,
                lambda a=a, like=like: a * like,
                lambda a=a: a * 1,
                lambda a=a: a - 0,
                lambda a=a: a.clone(),
                lambda a=a: a.exp().neg(),
                lambda a=a: a.reshape(-1),
                lambda a=a: a.reshape(6, 4),
                lambda a=a: a.t() if a.dim() == 2 else a.flip(0),
                lambda a=a: a.t().t() if a.dim() == 2 else a.detach(),
                lambda a=a: a[: a.shape[0] // 2 + 1],
                lambda a=a: a.sum(-1, keepdim=True).expand(a.shape),
                lambda a=a: torch.full_like(a, 2.0) * 0.5,
                lambda a=a: torch.zeros_like(a).reshape(-1) + 1,
                lambda a=a: torch.rand_like(a),
                lambda a=a, like=like: a.add_(like),
                lambda a=a: a.view(-1).mul_(2) if a.is_contiguous() else a.mul(2),
                lambda a=a, like=like: a.copy_(like * 0.5),
            )
            made = makers[int(menu[int(kind * len(menu))] * len(makers))]()
            values.append(made if made.numel() >= 24 else made.repeat(24 // made.numel() + 1)[:24].clone())
        return [values[int(share * len(values))] for share in handed_out]

    return program


def test_of_random_programs() -> None:
    generator = fresh_random()
    torch.manual_seed(generator.getrandbits(32))
    changed = 0
    for _ in range(100):
        program = random_program(generator)
        args = [torch.randn(4, 6), torch.randn(4, 6)]
        try:
            gm = make_fx(program, tracing_mode="real")(*[copy_value(value) for value in args])
        except RuntimeError:  # a write that torch itself refuses: to an expanded tensor, of other shapes
            continue
        graph = from_fx(gm, "program", "inference")
        after = normalized(graph)
        changed += after != graph
        try:
            assert_same_results(gm, after, args)
        except AssertionError:
            print(gm.code)
            raise
    assert changed > 20
