"""Random numbers: which ops draw them, and what drawing one costs.

Compiled code makes each number from a seed and the number's place (Philox, ten rounds, Salmon et al., SC 2011): some
eighty operations, where a pointwise op has one. So a dropout is mostly the drawing of its mask. It costs the same
wherever it is done: in a kernel of its own, in a kernel that reads the number, and in every such kernel
that draws it again.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..ir.graph import Node
from .devices import Figure
from .op_classes import packet
from .tensors import TensorTable

#: Figure -> ATen ops that draw such a number for each element of their result.
_ATEN = {
    "rand": "rand rand_like bernoulli uniform exponential geometric cauchy native_dropout _fused_dropout dropout "
    "alpha_dropout feature_dropout rrelu rrelu_with_noise rrelu_with_noise_functional",
    "randn": "randn randn_like normal normal_functional log_normal",
    "randint": "randint randint_like random randperm",
}
_OPS: dict[str, str] = {f"aten.{name}": figure for figure, names in _ATEN.items() for name in names.split()} | {
    "prims.inductor_random": "rand",
    "prims.inductor_rand_eager": "rand",
    "prims.inductor_randint": "randint",
}
#: Of one number: ten rounds of two wide products, four exclusive ors and two sums, less what a core does beside others.
#: Measured on a Zen 3: 72 times as long as a statement of generated code one by one, 28 times for vectors of numbers.
OPERATIONS = 80


def drawn(node: Node, table: TensorTable) -> tuple[str, int] | None:
    """Which kind of number (``rand``, ``randn`` or ``randint``) a node draws, and how many; None if it draws none."""
    figure = _OPS.get(packet(node.op).rstrip("_"))
    if figure is None:
        return None
    if node.op.startswith("prims.") and "randn" in node.args:
        figure = "randn"
    return figure, max((tensor.elements for tensor in table.of(node.name)), default=0)


def draw_seconds(figure: str, count: int, added: Mapping[str, Figure]) -> float:
    """Seconds of ``count`` numbers on a calibrated CPU. Figures of an earlier calibration that has no draws yet say
    what as many statements take."""
    for name in (figure, "rand"):
        if name in added:
            return count * added[name].value
    return count * OPERATIONS * added["statement"].value if "statement" in added else 0.0
