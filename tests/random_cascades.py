"""Random cascades over one long rank n (and short m, f), for tests that compare two ways to compute the same thing."""

from __future__ import annotations

import random

import numpy as np
from effcc.ir.cascade import Cascade, tensor_name
from effcc.ir.cascade_parser import parse_cascade
from numpy.typing import NDArray

SIZES = {"m": 2, "n": 7, "f": 3, "p": 3}

#: Inputs by whether they carry n; each is listed with its indices.
_ALONG = ["X[n]", "Y[n]", "S[m,n]", "W[n,f]"]
_FIXED = ["U[m]", "C[]", "G[f]"]


class _Writer:
    def __init__(self, source: random.Random) -> None:
        self.source = source
        self.lines: list[str] = []
        self.along, self.fixed = list(_ALONG), list(_FIXED)

    def leaf(self, along: bool) -> str:
        choices = self.along if along else self.fixed
        # Later tensors more often, so that chains of dependent reductions appear.
        return self.source.choice(choices[-4:] if self.source.random() < 0.7 else choices)

    def term(self) -> str:
        pick, x, d = self.source.randrange(17), self.leaf(True), self.leaf(False)
        y, e = self.leaf(True), self.leaf(False)
        return [
            f"exp(tanh({x}) - {d})",
            f"exp({x} - {d})*{y}",
            f"({x} - {d})**2",
            f"({x} - {d})*({y} - {e})",
            f"({x} - {d})*{y}*{e}",
            f"{x}*{d} + {y}*{e}",
            f"where(n <= 3, {x} - {d}, 0)",
            f"where(n < {self.source.choice([0, 4])}, exp({x} - {d})*{y}, 0)",
            f"sigmoid({x} - {d})",
            f"abs({x}*{d})",
            f"relu({x} - {d})",
            f"log(1 + {x}**2)*{d}",
            f"exp({x} - {d})*({x} - {d})",
            f"{x}/(1 + {d}**2)",
            f"sqrt(1 + {x}**2 + {d}**2)",
            f"round({x} + {d})",
            f"tanh({x})*{d}",
        ][pick]

    def ranks(self, expression: str, *without: str) -> str:
        """The kept ranks that an expression's tensors have."""
        found = [r for r in "mfnp" if any(r in part.split("]")[0].split(",") for part in expression.split("[")[1:])]
        return ",".join(r for r in found if r not in without)

    def write(self, count: int) -> str:
        for number in range(count):
            kind = self.source.random()
            name = f"T{number}"
            if kind < 0.6:
                body = self.term()
                operation = self.source.choice(["sum", "sum", "sum", "sum", "max", "min"])
                also = self.source.choice(["", "", "", "f", "m"])
                reduced = ["n"] + [r for r in also if r in self.ranks(body).split(",")]
                kept = self.ranks(body, *reduced)
                self.lines.append(f"{name}[{kept}] = {operation}[{','.join(reduced)}] {body}")
                self.fixed.append(f"{name}[{kept}]")
            elif kind < 0.85:
                body = self.term()
                body = body if "n" in self.ranks(body).split(",") else f"{body} + X[n]"
                kept = self.ranks(body)
                self.lines.append(f"{name}[{kept}] = {body}")
                self.along.append(f"{name}[{kept}]")
            else:
                d, e = self.leaf(False), self.leaf(False)
                body = self.source.choice(
                    [f"{d}/|n|", f"1/(1 + {d}**2)", f"{d} - {e}", f"log(1 + {d}**2)", f"-{d}", f"{d}*{e}/|n|"]
                )
                self.lines.append(f"{name}[{self.ranks(body)}] = {body}")
                self.fixed.append(f"{name}[{self.ranks(body)}]")
        # The results that count are reductions; a map that keeps n would always be one more pass.
        return "\n".join(self.lines) + "\n"


def random_text(seed: int) -> str:
    """The text of a cascade of 3 to 7 Einsums."""
    source = random.Random(seed)
    return _Writer(source).write(source.randint(3, 7))


def random_inputs(cascade: Cascade, seed: int, sizes: dict[str, int] | None = None) -> dict[str, NDArray[np.float64]]:
    """Standard normal values for every input, whose indices are plain ranks."""
    generator, extents = np.random.default_rng(seed), {**SIZES, **(sizes or {})}
    found = {}
    for einsum in cascade.einsums:
        for item in einsum.reads:
            name = tensor_name(item)
            if name in cascade.inputs and name not in found:
                found[name] = generator.normal(size=[extents[index.name] for index in item.args])
    return found


def random_cascade(seed: int) -> Cascade:
    return parse_cascade(random_text(seed), f"random cascade {seed}")
