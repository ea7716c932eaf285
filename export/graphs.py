"""A graph as Graphviz text, or as JSON for Google's Model Explorer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ..inspection.lineage import scopes
from ..inspection.model_source import short_path
from ..ir.graph import Graph, Node, references
from ..ir.printer import print_argument
from ..ir.type_text import print_type

#: Fill of an input by its role, of other nodes by what they do: light tints that a colour-blind reader can tell apart,
#: with the words in the label saying the same.
_FILLS = {"parameter": "#cfe3f1", "input": "#f7e3b5", "saved": "#e9d3e0", "call": "#cdeadf", "effcc": "#f2cdb4"}


def dot(graph: Graph) -> str:
    """Graphviz: one box a node with its op, type and source line; subgraphs as clusters."""
    lines = [
        "digraph effcc {",
        "  rankdir=TB;",
        '  node [shape=box, style=filled, fillcolor=white, fontname="Helvetica"];',
    ]
    for number, (scope, inner) in enumerate(scopes(graph).items()):
        lines.append(f"  subgraph cluster_{number} {{")
        lines.append(f"    label={_quoted('@' + inner.name)};")
        lines += [f"    {_id(scope, node.name)} [label={_quoted(_label(node))}, fillcolor={_quoted(_fill(node))}];"
                  for node in inner.nodes]  # fmt: skip
        lines.append(f"    {_id(scope, '<return>')} [label=return, shape=ellipse];")
        lines.append("  }")
        lines += [f"  {_id(scope, source)} -> {_id(scope, target)};" for source, target in _edges(inner)]
    return "\n".join([*lines, "}"]) + "\n"


def model_explorer(graph: Graph) -> dict[str, Any]:
    """A graph collection of Model Explorer: subgraphs are graphs of their own, modules are namespaces."""
    graphs = []
    for scope, inner in scopes(graph).items():
        incoming: dict[str, list[str]] = {}
        for source, target in _edges(inner):
            incoming.setdefault(target, []).append(source)
        nodes = [
            {
                "id": node.name,
                "label": node.op if node.op != "input" else f"{node.role or 'input'} %{node.name}",
                "namespace": node.location.module.replace(".", "/"),
                "incomingEdges": [
                    {"sourceNodeId": source, "sourceNodeOutputId": "0", "targetNodeInputId": str(index)}
                    for index, source in enumerate(incoming.get(node.name, ()))
                ],
                "attrs": [{"key": key, "value": value} for key, value in _attributes(node)],
                "outputsMetadata": [
                    {"id": "0", "attrs": [{"key": "tensor_shape", "value": print_type(node.type) if node.type else ""}]}
                ],
            }
            for node in inner.nodes
        ]
        returned = [
            {"sourceNodeId": source, "sourceNodeOutputId": "0", "targetNodeInputId": str(index)}
            for index, source in enumerate(incoming.get("<return>", ()))
        ]
        nodes.append({"id": "<return>", "label": "return", "namespace": "", "incomingEdges": returned, "attrs": []})
        graphs.append({"id": scope or graph.name, "nodes": nodes})
    return {"label": graph.name, "graphs": graphs}


def model_explorer_text(graph: Graph) -> str:
    """The JSON file that ``model-explorer FILE.json`` opens: a list of collections."""
    return json.dumps([model_explorer(graph)], indent=1) + "\n"


def _edges(graph: Graph) -> Iterator[tuple[str, str]]:
    """(value, reader), once for each pair; the outputs are read by ``<return>``."""
    for node in graph.nodes:
        yield from ((source, node.name) for source in dict.fromkeys(node.operands()))
    yield from ((source, "<return>") for source in dict.fromkeys(
        name for output in graph.outputs for name in references(output)
    ))  # fmt: skip


def _label(node: Node) -> str:
    where = node.location
    parts = [f"%{node.name}", node.op if node.op != "input" else node.role or "input"]
    if node.type is not None:
        parts.append(print_type(node.type))
    if where.file:
        parts.append(f"{short_path(where.file)}:{where.line}")
    return "\n".join(parts)


def _attributes(node: Node) -> Iterator[tuple[str, str]]:
    where = node.location
    constants = [print_argument(argument) for argument in node.args if not list(references(argument))]
    pairs = {
        "arguments": ", ".join(constants),
        **{name: print_argument(value) for name, value in node.kwargs},
        "source": f'{short_path(where.file)}:{where.line} "{where.source}"' if where.file else "",
        "forward": node.forward,
        "from": node.origin,
        "region": "" if node.region is None else str(node.region),
    }
    yield from ((key, value) for key, value in pairs.items() if value)


def _fill(node: Node) -> str:
    if node.op == "input":
        return _FILLS.get(node.role, "#eeeeee")
    return _FILLS.get(node.op.partition(".")[0], "#ffffff")


def _id(scope: str, name: str) -> str:
    return _quoted(f"{scope}:{name}")


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
