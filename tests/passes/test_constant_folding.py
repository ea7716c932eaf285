"""constant-folding: text in, text out; its arithmetic against torch."""

from __future__ import annotations

import pytest
import torch
from effcc.codegen.fx_export import to_fx
from effcc.ir.types import DTYPES
from effcc.passes.constant_folding import ConstantFolding
from fresh_seed import fresh_random
from ir_text import graph_of, plain, rewritten

FULL = "dtype=torch.float32, layout=torch.strided, device=device(cpu), pin_memory=False"


def test_the_docstrings_example() -> None:
    assert rewritten(ConstantFolding(), f"""
        %x: f32[8] = input()  role(input)
        %n: int(8) = aten.sym_size.int(%x, 0)
        %a: f32[8] = aten.full.default([%n], 2.0, {FULL})
        %b: f32[8] = aten.mul.Tensor(%a, 0.5)
        %c: f32[8] = aten.add.Tensor(%x, %b)
        return (%c)
    """) == plain(f"""
        %x: f32[8] = input()  role(input)
        %a: f32[8] = aten.full.default([8], 2.0, {FULL})
        %b: f32[8] = aten.full.default([8], 1.0, {FULL})  from("mul of a constant")
        %c: f32[8] = aten.add.Tensor(%x, %b)
        return (%c)
    """)  # fmt: skip


def test_sizes_that_are_not_known_stay() -> None:
    text = plain("""
        %x: f32[s0,8] = input()  role(input)
        %n: int(s0) = aten.sym_size.int(%x, 0)
        %a: f32[s0] = aten.full.default([%n], 2.0)
        %b: f32[s0] = aten.mul.Tensor(%a, 0.5)
        return (%b)
    """)
    assert rewritten(ConstantFolding(), text) == text


def test_a_returned_size_stays_a_value_of_the_graph() -> None:
    text = plain("""
        %x: f32[8] = input()  role(input)
        %n: int(8) = aten.sym_size.int(%x, 0)
        return (%n)
    """)
    assert rewritten(ConstantFolding(), text) == text


def test_views_and_casts_of_a_filled_tensor() -> None:
    assert rewritten(ConstantFolding(), """
        %z: f32[2,3] = aten.zeros.default([2, 3])
        %v: f32[6] = aten.view.default(%z, [6])
        %h: bf16[6] = aten._to_copy.default(%v, dtype=torch.bfloat16)
        %n: bf16[6] = aten.exp.default(%h)
        alias %v of %z
        return (%n)
    """) == plain("""
        %z: f32[2,3] = aten.full.default([2, 3], 0.0, dtype=torch.float32, layout=torch.strided, """
    """device=device(cpu), pin_memory=False)  from("zeros of a constant")
        %v: f32[6] = aten.full.default([6], 0.0, dtype=torch.float32, layout=torch.strided, """
    """device=device(cpu), pin_memory=False)  from("view of a constant")
        %h: bf16[6] = aten.full.default([6], 0.0, dtype=torch.bfloat16, layout=torch.strided, """
    """device=device(cpu), pin_memory=False)  from("_to_copy of a constant")
        %n: bf16[6] = aten.exp.default(%h)
        return (%n)
    """)  # fmt: skip


@pytest.mark.parametrize(
    "lines",
    [
        # written, through a view
        """
        %a: f32[4] = aten.zeros.default([4])
        %v: f32[2,2] = aten.view.default(%a, [2, 2])
        %w: f32[2,2] = aten.add_.Tensor(%v, 1)
        %b: f32[4] = aten.neg.default(%a)
        alias %v of %a
        alias %w of %v writes
        return (%b)
        """,
        # returned: the caller gets fresh memory, as before
        """
        %a: f32[4] = aten.zeros.default([4])
        %v: f32[2,2] = aten.view.default(%a, [2, 2])
        alias %v of %a
        return (%v)
        """,
        # 0.1 is not a float32: torch's rounding of the scalar is torch's business
        """
        %a: f32[4] = aten.full.default([4], 2.0)
        %b: f32[4] = aten.mul.Tensor(%a, 0.1)
        return (%b)
        """,
        # bfloat16 arithmetic is not done here
        """
        %a: bf16[4] = aten.full.default([4], 2.0)
        %b: bf16[4] = aten.mul.Tensor(%a, 3)
        return (%b)
        """,
        # a cast that loses digits
        """
        %a: f32[4] = aten.full.default([4], 2.5)
        %b: i64[4] = aten._to_copy.default(%a, dtype=torch.int64)
        %c: i64[4] = aten.neg.default(%b)
        return (%c)
        """,
        # a mixture of dtypes: torch's promotion
        """
        %a: i64[4] = aten.full.default([4], 2)
        %b: f32[4] = aten.full.default([4], 2.0)
        %c: f32[4] = aten.add.Tensor(%a, %b)
        return (%c)
        """,
        # a result whose layout a full does not make
        """
        %a: f32[1] = aten.full.default([1], 2.0)
        %b: f32[4]{0} = aten.expand.default(%a, [4])
        %c: f32[4] = aten.exp.default(%b)
        return (%c)
        """,
        # another scale than 1
        """
        %a: f32[4] = aten.full.default([4], 2.0)
        %b: f32[4] = aten.add.Tensor(%a, %a, alpha=3)
        %c: f32[4] = aten.exp.default(%b)
        return (%c)
        """,
        # random
        """
        %a: f32[4] = aten.rand.default([4])
        %b: f32[4] = aten.neg.default(%a)
        return (%b)
        """,
    ],
)
def test_left_alone(lines: str) -> None:
    assert rewritten(ConstantFolding(), lines) == plain(lines)


def test_a_value_that_becomes_a_tensor_of_its_own_is_no_view_any_more() -> None:
    after = rewritten(ConstantFolding(), f"""
        %x: f32[2,2] = input()  role(input)
        %a: f32[4] = aten.full.default([4], 2.0, {FULL})
        %v: f32[2,2] = aten.view.default(%a, [2, 2])
        %w: f32[2,2] = aten.permute.default(%x, [1, 0])
        %c: f32[2,2] = aten.add.Tensor(%v, %w)
        alias %v of %a
        alias %w of %x
        return (%c)
    """)  # fmt: skip
    assert "alias %v" not in after and "alias %w of %x" in after


def test_subgraphs_are_folded() -> None:
    after = rewritten(ConstantFolding(), """
        graph @layer phase=inference {
          %y: f32[4] = input()  role(input)
          %n: int(4) = aten.sym_size.int(%y, 0)
          %z: f32[4] = aten.mul.Tensor(%y, %n)
          return (%z)
        }
        %x: f32[4] = input()  role(input)
        %one: (f32[4],) = call(@layer, %x)
        %a: f32[4] = getitem(%one, 0)
        return (%a)
    """)  # fmt: skip
    assert "%n" not in after and "aten.mul.Tensor(%y, 4)" in after


NUMBERS = {
    "f32": [0.0, -0.0, 1.0, -1.5, 3.0, 2.0**-140, 3.0e38, float("inf"), float("-inf"), float("nan"), 16777217.0],
    "f64": [0.0, -0.0, 0.1, -1.5, 5e-324, 1.7e308, float("inf"), float("nan"), 2.0**53 + 1],
    "i64": [0, 1, -1, 7, 2**63 - 1, -(2**63), 2**40],
    "i32": [0, 1, -1, 7, 2**31 - 1, -(2**31), 2**20],
}


def test_the_arithmetic_is_torchs_bit_for_bit() -> None:
    """Chains of pointwise ops over filled tensors, run by torch as they are written and as they are folded."""
    generator = fresh_random()
    folded = 0
    for _ in range(150):
        dtype = generator.choice(list(NUMBERS))
        values = NUMBERS[dtype]
        torch_dtype = DTYPES[dtype][0]
        lines = [
            f"%v{i}: {dtype}[3] = aten.full.default([3], {print_number(generator.choice(values))}, "
            f"dtype=torch.{torch_dtype})"
            for i in range(2)
        ]
        for i in range(2, 6):
            op = generator.choice(["add.Tensor", "sub.Tensor", "mul.Tensor", "neg.default", "abs.default"])
            operands = [f"%v{generator.randrange(i)}"]
            if op.endswith("Tensor"):
                scalar = print_number(generator.choice(values))
                operands.append(generator.choice([f"%v{generator.randrange(i)}", scalar]))
            lines.append(f"%v{i}: {dtype}[3] = aten.{op}({', '.join(operands)})")
        # Only what is not returned is folded: each value is handed out as a copy.
        lines += [f"%r{i}: {dtype}[3] = aten.clone.default(%v{i})" for i in range(6)]
        lines += [f"%s{i}: {dtype}[3] = aten.add.Tensor(%v{i}, 0)" for i in range(6)]
        graph = graph_of("\n".join([*lines, f"return ({', '.join(f'%r{i}, %s{i}' for i in range(6))})"]))
        after = ConstantFolding().apply(graph)
        folded += sum(node.op == "aten.full.default" for node in after.nodes) - 2
        expected, found = (to_fx(g, with_values=False)() for g in (graph, after))
        for a, b in zip(expected, found, strict=True):
            # The sign of a NaN is not part of the result.
            assert a.dtype == b.dtype and bits(a) == bits(b), (a, b, lines)
    assert folded > 100


def bits(value: torch.Tensor) -> bytes:
    return torch.where(value != value, 0, value).numpy().tobytes() + torch.isnan(value).numpy().tobytes()


def print_number(value: float) -> str:
    """As the text form writes it."""
    from effcc.ir.printer import print_argument

    return print_argument(value)
