"""dead-code: text in, text out."""

from __future__ import annotations

import pytest
from effcc.passes.dead_code import DeadCode
from ir_text import graph_of, plain, rewritten

BEFORE = """
    %x: f32[4] = input()  role(input)
    %unread: f32[4] = input()  role(input)
    %a: f32[4] = aten.exp.default(%x)
    %b: f32[4] = aten.neg.default(%a)
    %c: f32[4] = aten.sin.default(%x)
    %k: f32[4] = constant("weight")
    return (%c)
"""


def test_unread_ops_go_with_what_only_they_read() -> None:
    assert rewritten(DeadCode(), BEFORE) == plain("""
        %x: f32[4] = input()  role(input)
        %unread: f32[4] = input()  role(input)
        %c: f32[4] = aten.sin.default(%x)
        return (%c)
    """)


def test_a_graph_without_dead_ops_is_the_same_object() -> None:
    graph = graph_of("%x: f32[4] = input()\n%a: f32[4] = aten.exp.default(%x)\nreturn (%a)")
    assert DeadCode().apply(graph) is graph


@pytest.mark.parametrize(
    "line",
    [
        "%a: f32[4] = aten.add_.Tensor(%x, 1)",
        "%a: f32[4] = aten.copy_.default(%x, %x)",
        "%a: f32[4] = aten.exp.out(%x, out=%x)",
        "%a: f32[4] = aten.rand.default([4])",
        "%a: none = aten._assert_scalar.default(True, \"positive\")",
        "%a: f32[4] = mylib.log.default(%x)",
        "%a: f32[u0,1] = aten.nonzero.default(%x)",
        "%a: int(u0) = aten._local_scalar_dense.default(%x)",
    ],
)  # fmt: skip
def test_what_acts_stays_although_unread(line: str) -> None:
    text = plain(f"""
        %x: f32[4] = input()  role(input)
        {line}
        return (%x)
    """)
    assert rewritten(DeadCode(), text) == text


def test_a_size_that_is_known_from_elsewhere_keeps_nothing() -> None:
    """Only the op that brings ``u0`` into being stays."""
    assert rewritten(DeadCode(), """
        %x: f32[4] = input()  role(input)
        %a: i64[u0,1] = aten.nonzero.default(%x)
        %b: i64[u0,1] = aten.neg.default(%a)
        return (%x)
    """) == plain("""
        %x: f32[4] = input()  role(input)
        %a: i64[u0,1] = aten.nonzero.default(%x)
        return (%x)
    """)  # fmt: skip


def test_facts_about_removed_values_go_or_pass_to_their_base() -> None:
    assert rewritten(DeadCode(), """
        %x: f32[4] = input()  role(input)
        %v: f32[2,2] = aten.view.default(%x, [2, 2])
        %w: f32[4] = aten.view.default(%x, [4])
        %u: f32[4] = aten.view.default(%x, [4])
        alias %v of %x
        alias %w of %v
        alias %u of %v
        return (%w)
    """) == plain("""
        %x: f32[4] = input()  role(input)
        %w: f32[4] = aten.view.default(%x, [4])
        alias %w of %x
        return (%w)
    """)  # fmt: skip


def test_subgraphs_are_cleaned_and_unused_ones_removed() -> None:
    before = """
        repeat @layer x 2 digest "{digest}"
        graph @layer phase=inference {{
          %y: f32[4] = input()  role(input)
          %dead: f32[4] = aten.exp.default(%y)
          %z: f32[4] = aten.neg.default(%y)
          return (%z)
        }}
        graph @gone phase=inference {{
          %y: f32[4] = input()  role(input)
          return (%y)
        }}
        %x: f32[4] = input()  role(input)
        %one: (f32[4],) = call(@layer, %x)
        %a: f32[4] = getitem(%one, 0)
        %two: (f32[4],) = call(@layer, %a)
        %unread: (f32[4],) = call(@gone, %a)
        %b: f32[4] = getitem(%two, 0)
        return (%b)
    """
    after = rewritten(DeadCode(), before.format(digest="old"))
    assert "%dead" not in after and "@gone" not in after and "%unread" not in after
    assert "%z: f32[4] = aten.neg.default(%y)" in after
    assert "repeat @layer x 2 digest" in after and '"old"' not in after, "the digest is that of the new body"


def test_a_call_that_dies_is_no_longer_counted() -> None:
    after = rewritten(DeadCode(), """
        repeat @layer x 2 digest "d"
        graph @layer phase=inference {
          %y: f32[4] = input()  role(input)
          %z: f32[4] = aten.neg.default(%y)
          return (%z)
        }
        %x: f32[4] = input()  role(input)
        %one: (f32[4],) = call(@layer, %x)
        %two: (f32[4],) = call(@layer, %x)
        %b: f32[4] = getitem(%two, 0)
        return (%b)
    """)  # fmt: skip
    assert 'repeat @layer x 1 digest "d"' in after and "%one" not in after
