"""Ops without affine form are found before anything is written."""

from __future__ import annotations

import pytest
from effcc.ir.parser import parse_graph
from effcc.passes.raising import emit as emit_module
from effcc.passes.raising.raise_graph import raise_graph

#: Each part's columns are two ranks, which the columns of the whole are not.
GRAPH = """graph @g phase=inference {
  %a: f32[4,2,3] = input()
  %b: f32[4,2,3] = input()
  %u: f32[4,6] = aten.view.default(%a, [4, 6])
  %v: f32[4,6] = aten.view.default(%b, [4, 6])
  %c: f32[4,12] = aten.cat.default([%u, %v], 1)
  %e: f32[4,12] = aten.exp.default(%c)
  %s: f32[4] = aten.sum.dim_IntList(%e, [1])
  return (%s)
}
"""


def test_what_has_no_affine_form_is_found_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    visited: list[int] = []
    plain = emit_module._Emitter._visit

    def visit(self: emit_module._Emitter, value: object, *args: object) -> None:
        visited.append(value.number)  # type: ignore[attr-defined]
        plain(self, value, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(emit_module._Emitter, "_visit", visit)
    raised = raise_graph(parse_graph(GRAPH))
    assert "affine" in raised.kept["c"]
    assert [einsum.output for einsum in raised.cascade.einsums] == ["S"]
    assert len(visited) == len(set(visited))
