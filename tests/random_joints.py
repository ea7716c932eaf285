"""Random small joint graphs, and every choice of what they may save."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from effcc.passes.activation.candidates import Candidate, evaluate
from effcc.passes.activation.problem import JointProblem, Op, Value
from effcc.passes.activation.simulate import Simulator


def random_joint(rng: random.Random, ops: int = 6, banned: float = 0.1, inlined: float = 0.3) -> JointProblem:
    """A forward of ``ops`` ops, each reading one or two earlier results, and a backward that reads what the forward
    read. Sizes are 1 to 64 bytes; the model input and the gradient of the result are given."""
    values = [Value(0, "x", 0, rng.randint(1, 64), -1), Value(1, "tangent", 0, rng.randint(1, 64), -1)]
    made: list[Op] = []

    def add(name: str, reads: tuple[int, ...], forward: bool, fused: bool, ban: bool) -> int:
        index = len(made)
        result = len(values)
        keep = rng.random() if fused else 0.0
        values.append(Value(result, name, 0, rng.randint(1, 64), index, keep))
        made.append(Op(index, name, "aten.op", reads, (result,), rng.uniform(0.1, 10.0), forward, fused, fused, ban))
        return result

    forward: list[tuple[int, tuple[int, ...]]] = []
    for number in range(ops):
        earlier = [0, *(result for result, _ in forward)]
        recent = earlier[-3:]
        reads = tuple(dict.fromkeys(rng.choice(recent) for _ in range(rng.randint(1, 2))))
        if number and forward[-1][0] not in reads:
            reads = (*reads, forward[-1][0])
        result = add(f"f{number}", reads, True, rng.random() < inlined, rng.random() < banned)
        forward.append((result, reads))
    gradient = 1
    outputs: list[int] = []
    for number, (result, reads) in reversed(list(enumerate(forward))):
        needed = [gradient, *rng.sample(reads, rng.randint(0, len(reads)))]
        if rng.random() < 0.4:
            needed.append(result)
        gradient = add(f"b{number}", tuple(dict.fromkeys(needed)), False, rng.random() < inlined, False)
        if rng.random() < 0.3:
            outputs.append(gradient)
    users: dict[int, tuple[int, ...]] = {}
    for op in made:
        for v in op.reads:
            users[v] = (*users.get(v, ()), op.index)
    return JointProblem(
        ops=tuple(made),
        values=tuple(values),
        primals=frozenset({0}),
        tangents=frozenset({1}),
        forward_outputs=(forward[-1][0],),
        backward_outputs=tuple(dict.fromkeys([*outputs, gradient])),
        overwritten=frozenset(),
        constant=values[0].bytes,
        users=users,
        of={value.node: (value.id,) for value in values},
    )


def every_choice(simulator: Simulator) -> Iterator[Candidate]:
    """All subsets of the forward's values, as candidates."""
    values = sorted(simulator.made_forward)
    for count in range(len(values) + 1):
        for subset in itertools.combinations(values, count):
            yield evaluate(simulator, frozenset(subset))
