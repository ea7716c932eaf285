"""Code planted in every string of a plan file is refused or kept as text; it never runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from effcc.errors import EffccError
from effcc.ir.parser import parse_graph
from effcc.ir.plan_file import encode_plan
from effcc.ir.printer import print_graph
from effcc.ir.verifier import verify
from plan_files import EVERY_STRING, SOURCES, archive_of, members_of, outcome, paths, resealed, small_plan, with_value


@pytest.fixture(scope="module")
def original() -> bytes:
    verify(parse_graph(EVERY_STRING))
    return encode_plan(small_plan(), {"main": EVERY_STRING}, SOURCES)


def payloads(canary: Path) -> tuple[str, ...]:
    return (
        f"__import__('os').system('touch {canary}')",
        f"{{{{ cycler.__init__.__globals__.os.popen('touch {canary}').read() }}}}",
        f"!!python/object/apply:os.system ['touch {canary}']",
        f"cos\nsystem\n(S'touch {canary}'\ntR.",
        f'";__import__("pathlib").Path("{canary}").touch()#',
        f"[].__class__.__base__.__subclasses__() or open('{canary}', 'w')",
    )


def string_paths(value: Any) -> list[tuple[Any, ...]]:
    def at(path: tuple[Any, ...]) -> Any:
        place = value
        for key in path:
            place = place[key]
        return place

    return [path for path in paths(value) if isinstance(at(path), str)]


def test_planted_code_in_json_never_runs(original: bytes, tmp_path: Path) -> None:
    """Code in every string field, with digests made to fit: refused, or kept as the text that it is."""
    canary = tmp_path / "canary"
    members = members_of(original)
    planted = 0
    for member in ("plan.json", "manifest.json"):
        content = json.loads(members[member])
        for path in string_paths(content):
            for payload in payloads(canary):
                changed = {**members, member: json.dumps(with_value(content, path, payload)).encode()}
                found = outcome(resealed(changed) if member == "plan.json" else archive_of(changed))
                if found is not None:
                    planted += 1
                    known = repr(found.plan) + repr(found.manifest)
                    assert payload in known or repr(payload)[1:-1] in known
    for payload in payloads(canary):
        for member in ("sources/region_0.py", "sources/kernel.cpp"):
            found = outcome(resealed({**members, member: payload.encode()}))
            assert found is not None and payload in found.sources.values()
    assert planted > 100
    assert not canary.exists()


def test_planted_code_in_graphs_never_runs(original: bytes, tmp_path: Path) -> None:
    """Code in every word and string of the graph's text, read, checked, hashed, rewritten and exported to FX."""
    from effcc.codegen.fx_export import to_fx
    from effcc.ir.structural_hash import graph_hash, op_hashes
    from effcc.ir.text import quote
    from effcc.passes.pipeline import parse_pipeline

    canary = tmp_path / "canary"
    words = ["main", "layer", "0123abcd", '"my model.py"', "return x @ self.w", "layers.0", "remat(%9)", "2*s0", "s0",
             "torch.Generator", "generator", "aten.mm.default", "mylib.scale.default", "fast", "torch.float32", '"f"',
             "input", "parameter", "f32", "mode", "%w", "2.5"]  # fmt: skip
    read = exported = 0
    for word in words:
        assert word in EVERY_STRING
        for payload in payloads(canary):
            for planted in (payload, quote(payload)[1:-1], quote(payload)):
                try:
                    graph = parse_graph(EVERY_STRING.replace(word, planted))
                    verify(graph)
                except EffccError:
                    continue
                read += 1
                assert parse_graph(print_graph(graph)) == graph
                graph_hash(graph), op_hashes(graph)
                for pass_ in parse_pipeline("normalize,regions,schedule"):
                    graph = pass_.apply(graph)
                # An op that torch has, so that the export gets past it to the planted ones.
                known = [replace(n, op="aten.neg.default", args=n.args[:1], kwargs=()) if n.name == "u" else n
                         for n in graph.nodes]  # fmt: skip
                try:
                    to_fx(graph.with_nodes(tuple(known)), constants={"generator": 3}, with_values=False)
                    exported += 1
                except EffccError:
                    pass
    assert read > 50 and exported > 10
    assert not canary.exists()
