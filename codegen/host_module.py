"""The host module: readable Python that calls the regions of a graph in order and frees each value after its last use.

Arguments are *boxed*: a region receives a list and clears it, so that a value's memory can be reused while the region
that reads it last is still running.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.fx as fx

from .segments import Constant, Segment


def host_source(gm: fx.GraphModule, segments: Sequence[Segment], names: Sequence[str], title: str) -> str:
    """Python source of ``run(args)``. ``names[i]`` is the function that runs segment ``i``; see ``constants_of``."""
    (output,) = gm.graph.find_nodes(op="output")
    results = list(output.args[0])
    last_use = last_uses(segments, results)
    inputs = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    lines = [f'"""{title}"""', "", "", "def run(args):"]
    if inputs:
        lines.append(f"    [{', '.join(inputs)}] = args")
    lines.append("    args.clear()")
    used = set(last_use) | {node.name for node in results if isinstance(node, fx.Node)}
    unused = [name for name in inputs if name not in used]
    if unused:
        lines.append(f"    del {', '.join(unused)}")
    for position, segment in enumerate(segments):
        lines += comment(segment)
        arguments = [argument_text(item) for item in segment.inputs]
        released = sorted({name for name in arguments if last_use.get(name) == position})
        lines.append(f"    args = [{', '.join(arguments)}]")
        if released:
            lines.append(f"    del {', '.join(released)}")
        targets = [node.name if node is not None else "_" for node in segment.outputs]
        if targets:
            lines.append(f"    [{', '.join(targets)}] = {names[position]}(args)")
        else:
            lines.append(f"    {names[position]}(args)")
        dead = [name for name in dict.fromkeys(targets) if name == "_" or name not in used]
        if dead:
            lines.append(f"    del {', '.join(dead)}")
    lines.append(f"    return [{', '.join(argument_text(result) for result in results)}]")
    return "\n".join(lines) + "\n"


def comment(segment: Segment) -> list[str]:
    """A line that says what the segment computes, from its first op's place in the user's model."""
    for node in segment.module.graph.nodes:
        stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
        if stack:
            path = str(list(stack.values())[-1][0])
            return [f"    # {segment.kind}, {len(segment.ops)} ops, from {path}"]
    return [f"    # {segment.kind}, {len(segment.ops)} ops"]


def argument_text(item: Any) -> str:
    if isinstance(item, fx.Node):
        return item.name
    return repr(item.value if isinstance(item, Constant) else item)


def last_uses(segments: Sequence[Segment], results: Sequence[Any]) -> dict[str, int]:
    """Value name -> the segment that reads it last; graph outputs are never released."""
    table: dict[str, int] = {}
    for position, segment in enumerate(segments):
        for item in segment.inputs:
            if isinstance(item, fx.Node):
                table[item.name] = position
    for result in results:
        if isinstance(result, fx.Node):
            table.pop(result.name, None)
            table[result.name] = len(segments)
    return table


def constants_of(gm: fx.GraphModule, segments: Sequence[Segment]) -> dict[str, Any]:
    """Tensor constants that the host module itself names: arguments of calls and outputs read with ``get_attr``."""
    (output,) = gm.graph.find_nodes(op="output")
    used = [item for segment in segments for item in segment.inputs] + list(output.args[0])
    table: dict[str, Any] = {}
    for item in used:
        if isinstance(item, fx.Node) and item.op == "get_attr":
            value: Any = gm
            for part in str(item.target).split("."):
                value = getattr(value, part)
            table[item.name] = value
    return table
