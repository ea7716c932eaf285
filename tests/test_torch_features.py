"""Parts of torch beside plain modules: function transforms, higher-order ops, custom ops, tensor subclasses.

Each is right, or falls back or is refused with a reason that names it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import effcc
import pytest
import torch
import torch.nn.functional as F
from models import Tower
from some_by_default import some_by_default
from torch import nn
from torch.testing import assert_close

pytestmark = pytest.mark.usefixtures("clean_compiler")

Function = Callable[..., Any]


def compile_whole(function: Function) -> Function:
    """In one graph: these features must not hide behind a graph break."""
    return torch.compile(function, backend="effcc", fullgraph=True)


def assert_same(function: Function, *inputs: Any, tolerance: float = 1e-10) -> None:
    """``function`` compiled and in eager: same results, same gradients of the inputs that ask for one."""
    values = []
    for call in (function, compile_whole(function)):
        leaves = [copy.deepcopy(value) for value in inputs]
        result = call(*leaves)
        ends = [end for end in torch.utils._pytree.tree_leaves(result) if isinstance(end, torch.Tensor)]
        found = [end.detach() for end in ends]
        wanted = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        if wanted:
            weighted = [(end * torch.arange(1.0, end.numel() + 1).view(end.shape)).sum() for end in ends]
            found += torch.autograd.grad(sum(weighted), wanted)
        values.append(found)
    assert effcc.reports(), "nothing was compiled"
    assert len(values[0]) == len(values[1])
    for right, left in zip(*values, strict=True):
        assert_close(left, right, rtol=tolerance, atol=tolerance)


def rows(*shape: int, gradient: bool = False) -> torch.Tensor:
    return torch.randn(*(shape or (5, 8)), dtype=torch.float64, requires_grad=gradient)


# torch.func


def objective(x: torch.Tensor) -> torch.Tensor:
    return (x.sin() * x.cumsum(-1)).sum()


TRANSFORMS: dict[str, Function] = {
    "grad": lambda x: torch.func.grad(objective)(x),
    "grad of grad": lambda x: torch.func.grad(lambda y: torch.func.grad(objective)(y).square().sum())(x),
    "vmap": lambda x: torch.vmap(lambda row: row.softmax(-1) * row.sum())(x),
    "vmap of grad": lambda x: torch.vmap(torch.func.grad(objective))(x),
    "jacrev": lambda x: torch.func.jacrev(lambda y: y.square().cumsum(-1))(x[0]),
    "jacfwd": lambda x: torch.func.jacfwd(lambda y: y.square().cumsum(-1))(x[0]),
    "jvp": lambda x: torch.func.jvp(objective, (x,), (x.cos(),)),
    "vjp": lambda x: torch.func.vjp(torch.tanh, x)[1](x.cos())[0],
    "hessian": lambda x: torch.func.hessian(objective)(x[0]),
}


@pytest.mark.parametrize("kind", some_by_default(TRANSFORMS, {"grad of grad", "vmap of grad", "jvp", "vjp"}))
def test_function_transforms_inside(kind: str) -> None:
    assert_same(TRANSFORMS[kind], rows(3, 4))


def test_gradient_through_vmap() -> None:
    assert_same(TRANSFORMS["vmap"], rows(3, 4, gradient=True))


def test_gradient_per_sample_of_a_module() -> None:
    """``vmap(grad(loss))`` over the parameters of a model, by ``functional_call``."""
    model = Tower(depth=1).double()
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(torch.func.functional_call(model, parameters, x[None])[0], y)

    def run(x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, y)

    assert_same(run, rows(5, 8), rows(5, 4))


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_function_transforms_outside_are_right_or_refused(transform: str) -> None:
    """A compiled function inside a transform: torch itself may refuse it, by name."""
    run = torch.compile(objective if transform == "grad" else torch.sin, backend="effcc")
    apply = torch.func.grad if transform == "grad" else torch.vmap
    x = rows(4)
    wanted = apply(objective if transform == "grad" else torch.sin)(x)
    try:
        found = apply(run)(x)
    except RuntimeError as error:
        assert "torch.compile" in str(error) or "functorch" in str(error) or "vmap" in str(error)
        return
    assert_close(found, wanted, rtol=1e-10, atol=1e-12)


# Higher-order ops


def test_cond() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x.sin() * 2, lambda x: x.cos() - 1, (x,))

    call = compile_whole(run)
    for x in (torch.ones(4, dtype=torch.float64), -torch.ones(4, dtype=torch.float64)):
        assert_close(call(x), run(x), rtol=1e-12, atol=1e-12)
    assert len(effcc.reports()) == 1


def test_gradient_of_cond() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x.sin() * 2, lambda x: x.cos() - 1, (x * 2,)) + x

    assert_same(run, torch.ones(4, dtype=torch.float64, requires_grad=True))


def test_while_loop() -> None:
    from torch._higher_order_ops import while_loop

    def run(count: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return while_loop(lambda i, x: i > 0, lambda i, x: (i - 1, x * 1.5 + 1), (count, x))

    call = compile_whole(run)
    for count in (0, 3):
        x = rows(4)
        wanted = x
        for _ in range(count):
            wanted = wanted * 1.5 + 1
        found = call(torch.tensor(count), x)
        assert_close(found[1], wanted, rtol=1e-12, atol=1e-12)


def test_scan() -> None:
    from torch._higher_order_ops import scan

    def step(total: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = total * 0.5 + x
        return total, total.sin()

    xs = rows(6, 4)
    found_total, found = compile_whole(lambda first, xs: scan(step, first, xs))(torch.zeros(4, dtype=torch.float64), xs)
    total, wanted = torch.zeros(4, dtype=torch.float64), []
    for x in xs:
        total, y = step(total, x)
        wanted.append(y)
    assert_close(found_total, total, rtol=1e-12, atol=1e-12)
    assert_close(found, torch.stack(wanted), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_flex_attention() -> None:
    """Forward with a bias and a causal mask, on CPU inference alone in torch."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = (torch.randn(1, 2, 128, 16) for _ in range(3))
    mask = create_block_mask(lambda b, h, i, j: i >= j, 1, 2, 128, 128, device="cpu")

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + 0.01 * (j - i), block_mask=mask)

    with torch.no_grad():
        found = compile_whole(run)(q, k, v)
    i, j = torch.arange(128)[:, None], torch.arange(128)[None]
    scores = (q @ k.transpose(-1, -2)).double() / 4 + 0.01 * (j - i)
    wanted = scores.masked_fill(i < j, -torch.inf).softmax(-1) @ v.double()
    assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_user_triton_kernel() -> None:
    triton = pytest.importorskip("triton")
    tl = triton.language

    @triton.jit
    def double_plus_one(x, out, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + offsets, tl.load(x + offsets, offsets < n) * 2 + 1, offsets < n)

    def run(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        double_plus_one[(triton.cdiv(x.numel(), 64),)](x, out, x.numel(), BLOCK=64)
        return out.sin()

    x = torch.randn(100, device="cuda")
    assert_close(compile_whole(run)(x), (x * 2 + 1).sin())


# Custom ops


@torch.library.custom_op("effcc_tests::scaled_flip", mutates_args=())
def scaled_flip(x: torch.Tensor, factor: float) -> torch.Tensor:
    return torch.from_numpy(x.detach().numpy()[..., ::-1].copy()) * factor


@scaled_flip.register_fake
def _(x: torch.Tensor, factor: float) -> torch.Tensor:
    return torch.empty_like(x)


scaled_flip.register_autograd(
    lambda ctx, slope: (slope.flip(-1) * ctx.factor, None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "factor", inputs[1]),
)


@torch.library.custom_op("effcc_tests::add_in_place", mutates_args={"total"})
def add_in_place(total: torch.Tensor, x: torch.Tensor) -> None:
    total.numpy()[...] += x.numpy()


def test_custom_op_with_gradient() -> None:
    assert_same(lambda x: scaled_flip(x.sin(), 3.0).exp() + x, rows(gradient=True))


def test_custom_op_that_mutates() -> None:
    def run(total: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        add_in_place(total, x * 2)
        return total * 3

    total, x = rows(), rows()
    before = total.clone()
    found = compile_whole(run)(total, x)
    assert_close(total, before + x * 2, rtol=1e-12, atol=1e-12)
    assert_close(found, (before + x * 2) * 3, rtol=1e-12, atol=1e-12)


class ClampedExp(torch.autograd.Function):
    """exp whose gradient is cut at 2: an autograd formula that is not the derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        result = x.exp()
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> torch.Tensor:
        (result,) = ctx.saved_tensors
        return slope * result.clamp(max=2.0)


def test_autograd_function() -> None:
    assert_same(lambda x: ClampedExp.apply(x * 2).sum(0) + x, rows(gradient=True))


# Tensor subclasses


class Two(torch.Tensor):
    """A tensor made of two, which every op treats apart (the traceable-wrapper protocol)."""

    left: torch.Tensor
    right: torch.Tensor

    @staticmethod
    def __new__(cls, left: torch.Tensor, right: torch.Tensor) -> Two:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls, left.shape, dtype=left.dtype, device=left.device, requires_grad=left.requires_grad
        )

    def __init__(self, left: torch.Tensor, right: torch.Tensor) -> None:
        self.left, self.right = left, right

    def __repr__(self) -> str:
        return f"Two({self.left!r}, {self.right!r})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["left", "right"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], context: None, size: Any, stride: Any) -> Two:
        return Two(inner["left"], inner["right"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.utils._python_dispatch import return_and_correct_aliasing

        def part(name: str) -> Any:
            return torch.utils._pytree.tree_map_only(Two, lambda x: getattr(x, name), (args, kwargs or {}))

        (left_args, left_kwargs), (right_args, right_kwargs) = part("left"), part("right")
        left, right = function(*left_args, **left_kwargs), function(*right_args, **right_kwargs)
        both = Two(left, right) if isinstance(left, torch.Tensor) else left
        return return_and_correct_aliasing(function, args, kwargs or {}, both)


def test_tensor_subclass() -> None:
    x = Two(rows(), rows())
    result = compile_whole(lambda x: (x * 2).sin() @ x.t())(x)
    assert type(result) is Two
    for found, part in ((result.left, x.left), (result.right, x.right)):
        assert_close(found, (part * 2).sin() @ part.t(), rtol=1e-12, atol=1e-12)


def test_parametrized_weight() -> None:
    plain = nn.utils.parametrizations.weight_norm(nn.Linear(8, 4).double())
    model = copy.deepcopy(plain)
    x = rows()
    torch.compile(model, backend="effcc")(x).square().sum().backward()
    plain(x).square().sum().backward()
    for found, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        assert_close(found.grad, wanted.grad, rtol=1e-10, atol=1e-12)


def test_nested_tensor() -> None:
    """Ragged rows (jagged layout): a tensor subclass of torch with symbolic sizes inside."""
    parts = [rows(3, 4), rows(5, 4)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged)
    found = torch.compile(lambda x: (x * 2).sin() + x, backend="effcc")(x)
    for left, part in zip(found.unbind(), parts, strict=True):
        assert_close(left, (part * 2).sin() + part, rtol=1e-12, atol=1e-12)
