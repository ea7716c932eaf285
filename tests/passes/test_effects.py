"""The tables of op effects against torch's own schemas and tags, and which values share storage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._inductor.inductor_prims  # registers ops of prims
from effcc.ir.graph import Graph, Node, Ref
from effcc.ir.parser import parse_graph
from effcc.passes.effects import (
    ACTING_OPS,
    HIDDEN_WRITES,
    Storages,
    has_effect,
    is_random,
    is_view,
    split_op,
    writes_memory,
    written_names,
)

#: Ops whose schema says that they write nothing; they update running statistics all the same.
WRITES_UNDECLARED = {
    "aten.native_batch_norm.default",
    "aten.cudnn_batch_norm.default",
    "aten.miopen_batch_norm.default",
    "aten._cudnn_rnn.default",
}
#: Ops whose schema says that they write, and which only make a view.
VIEWS_DECLARED_AS_WRITES = {"prims.as_strided.default"}
#: Ops with the tag of random ones that draw nothing: they replay a forward's seed, or only choose a kernel.
TAGGED_ONLY = {
    "aten._cudnn_attention_backward.default",
    "aten._scaled_dot_product_cudnn_attention_backward.default",
    "aten._scaled_dot_product_efficient_attention_backward.default",
    "aten._fused_sdp_choice.default",
    "aten._nested_tensor_softmax_with_shape.default",
}
#: Ops that return a fresh tensor or their argument, which their schema does not say.
VIEWS_UNDECLARED = {"aten._unsafe_view.default"}


def registered() -> Iterator[tuple[str, Any]]:
    """IR name and overload of every op of the namespaces whose functional ops count as pure."""
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = name.partition("::")
        base, _, overload = rest.partition(".")
        if namespace not in ("aten", "prims", "quantized_decomposed"):
            continue
        packet = getattr(getattr(torch.ops, namespace), base, None)
        op = getattr(packet, overload or "default", None)
        if op is not None and not base.startswith("_test_"):
            yield f"{namespace}.{base}.{overload or 'default'}", op


def node_of(name: str, op: Any) -> Node:
    """A call with a value for every tensor and a probability of a half for every float."""
    given = [argument for argument in op._schema.arguments if not argument.kwarg_only]
    values = {"TensorType": Ref("x"), "FloatType": 0.5}
    args = tuple(values.get(argument.type.kind()) for argument in given)
    return Node("n", name, args)


def test_writes_are_those_of_the_schemas() -> None:
    wrong = []
    count = 0
    for name, op in registered():
        node = node_of(name, op)
        expected = (op._schema.is_mutable or name in WRITES_UNDECLARED) and name not in VIEWS_DECLARED_AS_WRITES
        count += 1
        if writes_memory(node, Graph("g", "inference", (node,), ())) != expected:
            wrong.append(name)
    assert count > 2500 and wrong == []


def test_random_ops_are_those_with_torchs_tag() -> None:
    tag = torch.Tag.nondeterministic_seeded
    tagged = {name for name, op in registered() if tag in op.tags}
    ours = {name for name, op in registered() if is_random(node_of(name, op))}
    assert len(tagged) > 100 and ours == tagged - TAGGED_ONLY


def test_views_are_those_of_the_schemas() -> None:
    wrong = []
    for name, op in registered():
        returns = [result.alias_info for result in op._schema.returns if result.alias_info is not None]
        shares = any(not info.is_write for info in returns) or name in VIEWS_UNDECLARED | VIEWS_DECLARED_AS_WRITES
        # Overloads with ``out`` share what they return with ``out``, which counts as a write.
        if is_view(node_of(name, op)) != shares and not op._schema.is_mutable:
            wrong.append(name)
    assert wrong == []


def test_names_in_the_tables_exist() -> None:
    known = {name for name, _ in registered()}
    assert known >= HIDDEN_WRITES
    assert {name.split(".")[1] for name in known} >= ACTING_OPS


@pytest.mark.parametrize(
    ("line", "effect"),
    [
        ("%a: f32[4] = aten.exp.default(%x)", False),
        ("%a: f32[4] = aten.exp_.default(%x)", True),
        ("%a: f32[4] = aten.exp.out(%x, out=%x)", True),
        ("%a: f32[4] = aten.bernoulli.p(%x, 0.5)", True),
        ("%a: (f32[4], b1[4]) = aten.native_dropout.default(%x, 0.5, True)", True),
        ("%a: f32[4] = aten._scaled_dot_product_flash_attention.default(%x, %x, %x)", False),
        ("%a: f32[4] = aten._scaled_dot_product_flash_attention.default(%x, %x, %x, 0.0)", False),
        ("%a: f32[4] = aten._scaled_dot_product_flash_attention.default(%x, %x, %x, 0.1)", True),
        ("%a: f32[4] = aten._scaled_dot_product_flash_attention.default(%x, %x, %x, dropout_p=0.1)", True),
        ("%a: f32[4] = aten.__ior__.Tensor(%x, %x)", True),
        ("%a: f32[4] = mylib.custom.default(%x)", True),
        ("%a: int(2*s0) = _operator.mul(2, s0)", False),
        ("%a: f32[4] = _operator.iadd(%x, 1)", True),
        ("%a: int(s0) = torch.sym_max(s0, 2)", False),
        ("%a: f32[4] = torch.add(%x, %x)", True),
        ("%a: none = aten._assert_scalar.default(True, \"why\")", True),
        ("%a: f32[4] = higher_order.triton_kernel_wrapper_mutation(%x)", True),
        ("%a: (f32[4],) = call(@pure, %x)", False),
        ("%a: (f32[4],) = call(@writing, %x)", True),
        ("%a: (f32[4],) = higher_order.cond(True, @pure, @pure, [%x])", False),
        ("%a: (f32[4],) = higher_order.cond(True, @pure, @writing, [%x])", True),
    ],
)  # fmt: skip
def test_effects_of_one_op(line: str, effect: bool) -> None:
    graph = parse_graph(
        f"""graph @g phase=inference {{
          graph @pure phase=inference {{
            %y: f32[4] = input()  role(input)
            %z: f32[4] = aten.neg.default(%y)
            return (%z)
          }}
          graph @writing phase=inference {{
            %y: f32[4] = input()  role(input)
            %z: f32[4] = aten.neg_.default(%y)
            return (%z)
          }}
          %x: f32[4] = input()  role(input)
          {line}
          return (%a)
        }}"""
    )
    node = graph.nodes[-1]
    assert has_effect(node, graph) is effect
    assert split_op("aten.mm.default") == ("aten", "mm", "default")


def test_alias_facts_say_what_is_written() -> None:
    graph = parse_graph(
        """graph @g phase=inference {
          %x: f32[4] = input()  role(input)
          %y: f32[4] = input()  role(input)
          %a: f32[4] = mylib.update.default(%x, %y)
          %b: f32[4] = mylib.unknown_.default(%x, %y)
          %c: f32[4] = aten.add_.Tensor(%x, %y)
          alias %a of %y writes
          return (%a)
        }"""
    )
    a, b, c = graph.nodes[2:]
    assert written_names(a, graph) == ("y",)
    assert written_names(b, graph) == ("x", "y"), "which of the two is not known"
    assert written_names(c, graph) == ("x",)


def test_storages_follow_views_parts_and_facts() -> None:
    graph = parse_graph(
        """graph @g phase=inference {
          %x: f32[4,2] = input()  role(input)
          %z: f32[8] = input()  role(input)
          %v: f32[8] = aten.view.default(%x, [8])
          %p: (f32[4]{2}, f32[4]{2}) = aten.unbind.int(%x, 1)
          %p0: f32[4]{2} = getitem(%p, 0)
          %e: f32[4] = aten.exp.default(%p0)
          %k: f32[8] = mylib.kernel.default(%z)
          %w: f32[4] = aten.mul_.Tensor(%e, 2)
          alias %k of %z
          return (%w, %v)
        }"""
    )
    storages = Storages(graph)
    assert len({storages.root(name) for name in ("x", "v", "p", "p0")}) == 1
    assert storages.root("k") == storages.root("z") != storages.root("x")
    assert storages.root("w") == storages.root("e") != storages.root("p0")
    assert storages.written == {storages.root("e")}
    assert storages.escaping == {storages.root("e"), storages.root("x")}
    assert storages.inputs == {storages.root("x"), storages.root("z")}
