"""canonicalize: text in, text out."""

from __future__ import annotations

import pytest
from effcc.passes.canonicalize import DIMENSION_ARGUMENT, NEUTRAL_NUMBER, SAME_TYPE_IDENTITY, Canonicalize
from ir_text import graph_of, plain, rewritten


def test_the_docstrings_example() -> None:
    assert rewritten(Canonicalize(), """
        %x: f32[2,3] = input()  role(input)
        %a: f32[3,2]{1,3} = aten.t.default(%x)
        %b: f32[2,3] = aten.transpose.int(%a, -1, -2)
        %c: f32[6] = aten.view.default(%b, [-1])
        alias %a of %x
        alias %b of %a
        alias %c of %b
        return (%c)
    """) == plain("""
        %x: f32[2,3] = input()  role(input)
        %a: f32[3,2]{1,3} = aten.permute.default(%x, [1, 0])
        %c: f32[6] = aten.view.default(%x, [6])
        alias %a of %x
        alias %c of %x
        return (%c)
    """)  # fmt: skip


@pytest.mark.parametrize(
    ("type_", "before", "after"),
    [
        ("f32[3,2]{1,3}", "aten.t.default(%x)", "aten.permute.default(%x, [1, 0])"),
        ("f32[3,2]{1,3}", "aten.transpose.int(%x, 0, -1)", "aten.permute.default(%x, [1, 0])"),
        ("f32[3,2]{1,3}", "aten.numpy_T.default(%x)", "aten.permute.default(%x, [1, 0])"),
        ("f32[3,2]{1,3}", "aten.permute.default(%x, [-1, 0])", "aten.permute.default(%x, [1, 0])"),
        ("f32[2]", "aten.sum.dim_IntList(%x, [-1])", "aten.sum.dim_IntList(%x, [1])"),
        ("f32[2,1]", "aten.amax.default(%x, [-1], True)", "aten.amax.default(%x, [1], True)"),
        ("f32[2,3]", "aten._softmax.default(%x, -1, False)", "aten._softmax.default(%x, 1, False)"),
        ("f32[2]{3}", "aten.select.int(%x, -1, -1)", "aten.select.int(%x, 1, -1)"),
        ("f32[2,2]{3,1}", "aten.slice.Tensor(%x, -1, 0, 2)", "aten.slice.Tensor(%x, 1, 0, 2)"),
        ("f32[3,2]", "aten.view.default(%x, [-1, 2])", "aten.view.default(%x, [3, 2])"),
        ("f32[4,2,3]{0,3,1}", "aten.expand.default(%x, [4, -1, -1])", "aten.expand.default(%x, [4, 2, 3])"),
        ("f32[s0,6]", "aten.reshape.default(%s, [-1, 6])", "aten.reshape.default(%s, [s0, 6])"),
        ("i64[3]", "aten.argmax.default(%x, None)", "aten.argmax.default(%x, None)"),
    ],
)
def test_one_spelling(type_: str, before: str, after: str) -> None:
    text = """
        %x: f32[2,3] = input()  role(input)
        %s: f32[s0,2,3] = input()  role(input)
        %a: TYPE = BEFORE
        return (%a)
    """.replace("TYPE", type_)
    assert rewritten(Canonicalize(), text.replace("BEFORE", before)) == plain(text.replace("BEFORE", after))


def test_chains_of_views_and_permutes_become_one() -> None:
    assert rewritten(Canonicalize(), """
        %x: f32[2,3,4] = input()  role(input)
        %a: f32[6,4] = aten.view.default(%x, [6, 4])
        %b: f32[24] = aten.view.default(%a, [24])
        %c: f32[4,2,3]{1,12,4} = aten.permute.default(%x, [2, 0, 1])
        %d: f32[3,4,2]{4,1,12} = aten.permute.default(%c, [2, 0, 1])
        %e: f32[3,4,2] = aten.exp.default(%d)
        return (%b, %e)
    """) == plain("""
        %x: f32[2,3,4] = input()  role(input)
        %a: f32[6,4] = aten.view.default(%x, [6, 4])
        %b: f32[24] = aten.view.default(%x, [24])
        %c: f32[4,2,3]{1,12,4} = aten.permute.default(%x, [2, 0, 1])
        %d: f32[3,4,2]{4,1,12} = aten.permute.default(%x, [1, 2, 0])
        %e: f32[3,4,2] = aten.exp.default(%d)
        return (%b, %e)
    """)  # fmt: skip


@pytest.mark.parametrize(
    "op",
    [
        "aten.view.default(%x, [2, 3])",
        "aten.expand.default(%x, [2, 3])",
        "aten.clone.default(%x)",
        "aten._to_copy.default(%x, dtype=torch.float32)",
        "prims.convert_element_type.default(%x, torch.float32)",
        "aten.alias.default(%x)",
        "aten.permute.default(%x, [0, 1])",
        "aten.transpose.int(%x, 1, 1)",
        "aten.mul.Tensor(%x, 1)",
        "aten.mul.Tensor(%x, 1.0)",
        "aten.div.Tensor(%x, 1.0)",
        "aten.pow.Tensor_Scalar(%x, 1)",
        "aten.sub.Tensor(%x, 0)",
        "aten.sub.Tensor(%x, -0.0)",
    ],
)
def test_ops_that_change_nothing_are_skipped(op: str) -> None:
    assert rewritten(Canonicalize(), f"""
        %x: f32[2,3] = input()  role(input)
        %a: f32[2,3] = {op}
        %b: f32[2,3] = aten.exp.default(%a)
        return (%b)
    """) == plain("""
        %x: f32[2,3] = input()  role(input)
        %b: f32[2,3] = aten.exp.default(%x)
        return (%b)
    """)  # fmt: skip


@pytest.mark.parametrize(
    ("op", "type_"),
    [
        ("aten.add.Tensor(%x, 0)", "f32[2,3]"),  # turns -0.0 into 0.0
        ("aten.sub.Tensor(%x, 1, alpha=0)", "f32[2,3]"),
        ("aten.mul.Tensor(%x, True)", "f32[2,3]"),
        ("aten.mul.Tensor(%x, 1)", "f64[2,3]"),
        ("aten._to_copy.default(%x, dtype=torch.bfloat16)", "bf16[2,3]"),
        ("aten.clone.default(%x, memory_format=torch.contiguous_format)", "f32[2,3]{1,2}"),
        ("aten.permute.default(%x, [1, 0])", "f32[3,2]{1,3}"),
        ("aten.bernoulli.p(%x, 1)", "f32[2,3]"),
    ],
)
def test_ops_that_change_something_stay(op: str, type_: str) -> None:
    text = plain(f"""
        %x: f32[2,3] = input()  role(input)
        %a: {type_} = {op}
        %b: {type_} = aten.exp.default(%a)
        return (%b)
    """)
    assert rewritten(Canonicalize(), text) == text


@pytest.mark.parametrize(
    "lines",
    [
        # what is returned keeps its own name and storage
        """
        %x: f32[4] = input()  role(input)
        %a: f32[4] = aten.clone.default(%x)
        return (%a)
        """,
        # a copy that is returned through a view
        """
        %x: f32[4] = input()  role(input)
        %a: f32[4] = aten.clone.default(%x)
        %v: f32[2,2] = aten.view.default(%a, [2, 2])
        alias %v of %a
        return (%v)
        """,
        # a copy whose source is written afterwards
        """
        %x: f32[4] = input()  role(input)
        %a: f32[4] = aten.clone.default(%x)
        %w: f32[4] = aten.add_.Tensor(%x, 1)
        %b: f32[4] = aten.exp.default(%a)
        alias %w of %x writes
        return (%b)
        """,
        # a copy that is written itself
        """
        %x: f32[4] = input()  role(input)
        %a: f32[4] = aten.clone.default(%x)
        %w: f32[4] = aten.add_.Tensor(%a, 1)
        %b: f32[4] = aten.mul.Tensor(%x, %a)
        return (%b)
        """,
    ],
)
def test_storages_keep_apart(lines: str) -> None:
    assert rewritten(Canonicalize(), lines) == plain(lines)


def test_a_view_of_what_is_handed_out_may_be_skipped() -> None:
    """Both names are one storage, so none is exchanged for another."""
    assert rewritten(Canonicalize(), """
        %x: f32[4] = input()  role(input)
        %a: f32[4] = aten.view.default(%x, [4])
        %v: f32[2,2] = aten.view.default(%a, [2, 2])
        alias %a of %x
        alias %v of %a
        return (%v)
    """) == plain("""
        %x: f32[4] = input()  role(input)
        %v: f32[2,2] = aten.view.default(%x, [2, 2])
        alias %v of %x
        return (%v)
    """)  # fmt: skip


def test_subgraphs_are_rewritten() -> None:
    after = rewritten(Canonicalize(), """
        graph @layer phase=inference {
          %y: f32[2,3] = input()  role(input)
          %t: f32[3,2]{1,3} = aten.t.default(%y)
          return (%t)
        }
        %x: f32[2,3] = input()  role(input)
        %one: (f32[3,2]{1,3},) = call(@layer, %x)
        %a: f32[3,2]{1,3} = getitem(%one, 0)
        return (%a)
    """)  # fmt: skip
    assert "aten.permute.default(%y, [1, 0])" in after


def test_nothing_to_do_is_the_same_object() -> None:
    graph = graph_of("%x: f32[4] = input()\n%a: f32[4] = aten.exp.default(%x)\nreturn (%a)")
    assert Canonicalize().apply(graph) is graph


def test_tables_name_ops_of_torch() -> None:
    import torch

    for name in {*DIMENSION_ARGUMENT, *SAME_TYPE_IDENTITY, *NEUTRAL_NUMBER}:
        namespace, packet, overload = name.split(".")
        op = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
        if name in DIMENSION_ARGUMENT:
            parameter = op._schema.arguments[DIMENSION_ARGUMENT[name]]
            assert parameter.name in ("dim", "dims"), name
