"""common-subexpressions: text in, text out."""

from __future__ import annotations

import pytest
from effcc.passes.common_subexpressions import CommonSubexpressions
from ir_text import graph_of, plain, rewritten


def test_equal_values_are_computed_once() -> None:
    assert rewritten(CommonSubexpressions(), """
        %x: f32[4] = input()  role(input)
        %a: f32[4] = aten.exp.default(%x)
        %b: f32[4] = aten.exp.default(%x)
        %c: f32[4] = aten.neg.default(%a)
        %d: f32[4] = aten.neg.default(%b)
        %e: f32[4] = aten.add.Tensor(%c, %d, alpha=2)
        return (%e)
    """) == plain("""
        %x: f32[4] = input()  role(input)
        %a: f32[4] = aten.exp.default(%x)
        %c: f32[4] = aten.neg.default(%a)
        %e: f32[4] = aten.add.Tensor(%c, %c, alpha=2)
        return (%e)
    """)  # fmt: skip


def test_operands_of_commutative_ops_may_change_places() -> None:
    assert rewritten(CommonSubexpressions(), """
        %x: f32[4] = input()  role(input)
        %y: f32[4] = input()  role(input)
        %a: f32[4] = aten.mul.Tensor(%x, %y)
        %b: f32[4] = aten.mul.Tensor(%y, %x)
        %c: f32[4] = aten.sub.Tensor(%x, %y)
        %d: f32[4] = aten.sub.Tensor(%y, %x)
        %e: f32[4] = mylib.all.default(%a, %b, %c, %d)
        return (%e)
    """) == plain("""
        %x: f32[4] = input()  role(input)
        %y: f32[4] = input()  role(input)
        %a: f32[4] = aten.mul.Tensor(%x, %y)
        %c: f32[4] = aten.sub.Tensor(%x, %y)
        %d: f32[4] = aten.sub.Tensor(%y, %x)
        %e: f32[4] = mylib.all.default(%a, %a, %c, %d)
        return (%e)
    """)  # fmt: skip


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("aten.add.Tensor(%x, 1)", "aten.add.Tensor(%x, 1.0)"),
        ("aten.add.Tensor(%x, 0.0)", "aten.add.Tensor(%x, -0.0)"),
        ("aten.add.Tensor(%x, 1)", "aten.add.Tensor(%x, True)"),
        ("aten.add.Tensor(%x, %x)", "aten.add.Tensor(%x, %x, alpha=2)"),
        ("aten.add.Tensor(%x, %y, alpha=2)", "aten.add.Tensor(%y, %x, alpha=2)"),
        ("aten.bernoulli.p(%x, 0.5)", "aten.bernoulli.p(%x, 0.5)"),
        ("aten.rand_like.default(%x)", "aten.rand_like.default(%x)"),
        ("mylib.counter.default(%x)", "mylib.counter.default(%x)"),
        ("aten.exp.default(%x)", "aten.exp.default(%x)  region(1)"),
    ],
)
def test_kept_apart(first: str, second: str) -> None:
    text = plain(f"""
        %x: f32[4] = input()  role(input)
        %y: f32[4] = input()  role(input)
        %a: f32[4] = {first}
        %b: f32[4] = {second}
        %c: f32[4] = aten.add.Tensor(%a, %b)
        return (%c)
    """)
    assert rewritten(CommonSubexpressions(), text) == text


def test_types_that_differ_keep_values_apart() -> None:
    text = plain("""
        %x: f32[2,2] = input()  role(input)
        %a: f32[2,2] = aten.clone.default(%x)
        %b: f32[2,2]{1,2} = aten.clone.default(%x)
        %c: f32[2,2] = aten.mm.default(%a, %b)
        return (%c)
    """)
    assert rewritten(CommonSubexpressions(), text) == text


def test_a_write_between_keeps_reads_apart() -> None:
    assert rewritten(CommonSubexpressions(), """
        %x: f32[4] = input()  role(input)
        %v: f32[2,2] = aten.view.default(%x, [2, 2])
        %a: f32[4] = aten.exp.default(%x)
        %b: f32[4] = aten.exp.default(%x)
        %w: f32[2,2] = aten.add_.Tensor(%v, 1)
        %c: f32[4] = aten.exp.default(%x)
        %d: f32[4] = mylib.all.default(%a, %b, %c)
        alias %v of %x
        alias %w of %v writes
        return (%d)
    """) == plain("""
        %x: f32[4] = input()  role(input)
        %v: f32[2,2] = aten.view.default(%x, [2, 2])
        %a: f32[4] = aten.exp.default(%x)
        %w: f32[2,2] = aten.add_.Tensor(%v, 1)
        %c: f32[4] = aten.exp.default(%x)
        %d: f32[4] = mylib.all.default(%a, %a, %c)
        alias %v of %x
        alias %w of %v writes
        return (%d)
    """)  # fmt: skip


def test_buffers_that_are_written_stay_two() -> None:
    text = plain("""
        %x: f32[4] = input()  role(input)
        %a: f32[4] = aten.zeros_like.default(%x)
        %b: f32[4] = aten.zeros_like.default(%x)
        %c: f32[4] = aten.add_.Tensor(%a, %x)
        %d: f32[4] = aten.mul.Tensor(%a, %b)
        return (%d)
    """)
    assert rewritten(CommonSubexpressions(), text) == text


def test_two_outputs_stay_two() -> None:
    """The caller may change one of them in place. A value that is not handed out may share with one that is."""
    assert rewritten(CommonSubexpressions(), """
        %x: f32[4] = input()  role(input)
        %a: f32[4] = aten.exp.default(%x)
        %b: f32[4] = aten.exp.default(%x)
        %c: f32[4] = aten.exp.default(%x)
        %d: f32[4] = aten.neg.default(%c)
        %v: f32[2,2] = aten.view.default(%x, [2, 2])
        %w: f32[2,2] = aten.view.default(%x, [2, 2])
        alias %v of %x
        alias %w of %x
        return (%a, %b, %d, %v, %w)
    """) == plain("""
        %x: f32[4] = input()  role(input)
        %a: f32[4] = aten.exp.default(%x)
        %b: f32[4] = aten.exp.default(%x)
        %d: f32[4] = aten.neg.default(%a)
        %v: f32[2,2] = aten.view.default(%x, [2, 2])
        %w: f32[2,2] = aten.view.default(%x, [2, 2])
        alias %v of %x
        alias %w of %x
        return (%a, %b, %d, %v, %w)
    """)  # fmt: skip


def test_two_outputs_through_views_stay_two() -> None:
    text = plain("""
        %x: f32[4] = input()  role(input)
        %a: f32[4] = aten.exp.default(%x)
        %b: f32[4] = aten.exp.default(%x)
        %v: f32[2,2] = aten.view.default(%a, [2, 2])
        %w: f32[4,1] = aten.view.default(%b, [4, 1])
        alias %v of %a
        alias %w of %b
        return (%v, %w)
    """)
    assert rewritten(CommonSubexpressions(), text) == text


def test_two_outputs_do_not_meet_in_a_third_value() -> None:
    assert rewritten(CommonSubexpressions(), """
        %x: f32[4] = input()  role(input)
        %a: f32[4] = aten.exp.default(%x)
        %b: f32[4] = aten.exp.default(%x)
        %c: f32[4] = aten.exp.default(%x)
        %d: f32[4] = aten.neg.default(%a)
        return (%d, %b, %c)
    """) == plain("""
        %x: f32[4] = input()  role(input)
        %a: f32[4] = aten.exp.default(%x)
        %c: f32[4] = aten.exp.default(%x)
        %d: f32[4] = aten.neg.default(%a)
        return (%d, %a, %c)
    """)  # fmt: skip


def test_calls_of_one_pure_subgraph_are_merged() -> None:
    after = rewritten(CommonSubexpressions(), """
        repeat @layer x 2 digest "d"
        graph @layer phase=inference {
          %y: f32[4] = input()  role(input)
          %p: f32[4] = aten.neg.default(%y)
          %q: f32[4] = aten.neg.default(%y)
          %r: f32[4] = aten.mul.Tensor(%p, %q)
          return (%r)
        }
        %x: f32[4] = input()  role(input)
        %one: (f32[4],) = call(@layer, %x)
        %two: (f32[4],) = call(@layer, %x)
        %a: f32[4] = getitem(%one, 0)
        %b: f32[4] = getitem(%two, 0)
        %c: f32[4] = aten.add.Tensor(%a, %b)
        return (%c)
    """)  # fmt: skip
    assert "%two" not in after and "%q" not in after
    assert "aten.mul.Tensor(%p, %p)" in after and "aten.add.Tensor(%a, %a)" in after
    assert 'repeat @layer x 1 digest "' in after and 'digest "d"' not in after


def test_nothing_to_merge_is_the_same_object() -> None:
    graph = graph_of("%x: f32[4] = input()\n%a: f32[4] = aten.exp.default(%x)\nreturn (%a)")
    assert CommonSubexpressions().apply(graph) is graph
