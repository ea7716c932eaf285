"""Random small graphs of pointwise ops, with duplicates, dead values and repeats in them."""

from __future__ import annotations

import random

from effcc.ir.graph import Graph
from effcc.ir.parser import parse_graph

UNARY = ("aten.sin.default", "aten.exp.default", "aten.neg.default", "aten.clone.default")
BINARY = ("aten.add.Tensor", "aten.mul.Tensor", "aten.maximum.default")


def random_pointwise_graph(generator: random.Random) -> Graph:
    """5 to 40 ops over one or two inputs of one size; some of them are dead, some occur twice."""
    values = ["x", "y"][: generator.randint(1, 2)]
    lines = [f"  %{name}: f32[4] = input()  role(input)" for name in values]
    bodies: list[str] = []
    for number in range(generator.randint(5, 40)):
        if bodies and generator.random() < 0.25:
            body = generator.choice(bodies)
        elif generator.random() < 0.5:
            body = f"{generator.choice(UNARY)}(%{generator.choice(values)})"
        else:
            other = generator.choice([f"%{generator.choice(values)}", "1", "2.0"])
            body = (
                f"{generator.choice(BINARY[:2] if other[0] != '%' else BINARY)}(%{generator.choice(values)}, {other})"
            )
        bodies.append(body)
        lines.append(f"  %v{number}: f32[4] = {body}")
        values.append(f"v{number}")
    results = ", ".join(f"%{name}" for name in generator.sample(values, min(2, len(values))))
    return parse_graph("graph @random phase=inference {\n" + "\n".join(lines) + f"\n  return ({results})\n}}\n")
