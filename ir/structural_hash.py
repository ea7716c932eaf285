"""Structure of a graph as hashes: what two captures of one model share, and which stretches repeat.

Names, source lines, devices and the names of size symbols do not count; ops, arguments, dtypes, shapes, the strides of
inputs, data flow, aliasing and subgraphs do. So a plan made from a capture on CPU matches a capture on CUDA.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import sympy

from .expressions import canonical, print_expression, symbol
from .fused_cascade_text import fused_cascade_lines
from .graph import Argument, Graph, Node, Ref, Symbol
from .printer import print_argument
from .type_text import print_type
from .types import ScalarType, TensorType, TupleType, Type

#: Hexadecimal digits of an op's hash.
OP_DIGITS = 16

_DEVICE = re.compile(r"device\(.*\)\Z")


def graph_hash(graph: Graph) -> str:
    """sha256 of the graph's structure, 64 hexadecimal digits."""
    return _hashes(graph)[0]


def op_hashes(graph: Graph) -> tuple[str, ...]:
    """One hash per node, in order. Equal graphs have equal lists; the first difference is the first op that differs."""
    return _hashes(graph)[1]


def first_difference(plan_op_hashes: Sequence[str], graph: Graph) -> Node | None:
    """The first node of ``graph`` that is not as in ``plan_op_hashes``; None if all nodes are.

    If the graph is a prefix of what was planned, the difference is behind its end: the last node is returned.
    """
    mine = op_hashes(graph)
    for node, theirs, own in zip(graph.nodes, plan_op_hashes, mine, strict=False):
        if theirs != own:
            return node
    if len(mine) == len(plan_op_hashes):
        return None
    return graph.nodes[min(len(plan_op_hashes), len(mine) - 1)] if mine else None


class SymbolNames:
    """Canonical names of size symbols: numbered in order of first appearance."""

    def __init__(self) -> None:
        self.names: dict[sympy.Symbol, sympy.Symbol] = {}

    def text(self, expression: sympy.Basic | int | float) -> str:
        if not isinstance(expression, sympy.Basic):
            return print_expression(expression)
        free = [atom for atom in sympy.preorder_traversal(expression) if isinstance(atom, sympy.Symbol)]
        for atom in sorted(set(free), key=lambda atom: atom.name) if len(set(free)) > 1 else free:
            # A name that begins with a "$" cannot be taken by the graph's own symbols in this table.
            self.names.setdefault(atom, symbol(f"${len(self.names)}"))
        return print_expression(canonical(expression.xreplace(self.names)))


def _hashes(graph: Graph) -> tuple[str, tuple[str, ...]]:
    """Digest of a graph and the hashes of its nodes, found once: a graph does not change."""
    found: tuple[str, tuple[str, ...]] | None = graph.__dict__.get("_hashes")
    if found is None:
        found = graph.__dict__["_hashes"] = _hash_graph(graph)
    return found


def _hash_graph(graph: Graph) -> tuple[str, tuple[str, ...]]:
    digests = {name: _hashes(subgraph)[0] for name, subgraph in graph.subgraphs.items()}
    digests |= {name: _digest("\n".join(fused_cascade_lines("@", fused))) for name, fused in graph.cascades.items()}
    position = {node.name: index for index, node in enumerate(graph.nodes)}
    describe = _Describer(lambda name: f"%{position[name]}", digests)
    hashes = tuple(_digest(describe.node(node, strides=node.op == "input"))[:OP_DIGITS] for node in graph.nodes)
    facts = sorted((position[alias.name], position[alias.base], alias.writes) for alias in graph.aliases)
    outputs = ",".join(describe.argument(output) for output in graph.outputs)
    summary = f"{graph.phase};{graph.saved};{outputs};{facts};{','.join(hashes)}"
    return _digest(summary), hashes


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class _Describer:
    """Text of a node without what does not count. ``reference`` says how a used value is written."""

    def __init__(self, reference: Callable[[str], str], subgraphs: dict[str, str]) -> None:
        self.reference, self.subgraphs, self.symbols = reference, subgraphs, SymbolNames()
        self.types: dict[tuple[Type | None, bool], str] = {}

    def node(self, node: Node, *, strides: bool) -> str:
        arguments = ",".join(self.argument(argument) for argument in node.args)
        named = ",".join(f"{name}={self.argument(value)}" for name, value in sorted(node.kwargs, key=lambda kw: kw[0]))
        return f"{node.op}({arguments};{named}){self.type(node.type, strides)}"

    def argument(self, argument: Argument) -> str:
        if isinstance(argument, Ref):
            return self.reference(argument.name)
        if isinstance(argument, tuple):
            return f"[{','.join(self.argument(item) for item in argument)}]"
        if isinstance(argument, Symbol):
            if _DEVICE.match(argument.text):
                return "device"
            return self.subgraphs.get(argument.text[1:], "@") if argument.text.startswith("@") else argument.text
        if isinstance(argument, sympy.Basic):
            return self.symbols.text(argument)
        return print_argument(argument)

    def type(self, value: Type | None, strides: bool) -> str:
        key = (value, strides)
        if key not in self.types:
            self.types[key] = self._type(value, strides)
        return self.types[key]

    def _type(self, value: Type | None, strides: bool) -> str:
        if isinstance(value, TensorType):
            shape = ",".join(map(self.symbols.text, value.shape))
            text = f"{value.dtype}[{shape}]"
            if strides and value.stride is not None:
                text += "{" + ",".join(map(self.symbols.text, value.stride)) + "}"
            return text
        if isinstance(value, TupleType):
            return f"({','.join(self._type(item, strides) for item in value.items)})"
        if isinstance(value, ScalarType):
            return value.kind if value.value is None else f"{value.kind}({self.symbols.text(value.value)})"
        return "" if value is None else print_type(value)


# Repeats -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """``count`` equal stretches of ``length`` nodes each, one behind the other, from node number ``start``."""

    start: int
    length: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.length * self.count

    @property
    def saved(self) -> int:
        """Nodes that need not be compiled when the stretch is compiled once."""
        return self.length * (self.count - 1)


def local_tokens(graph: Graph, barrier: Callable[[Node], bool]) -> list[int]:
    """A number for each node, equal for nodes with equal op, plain arguments and type (strides and device too); which
    values they read is left to the caller. Inputs and nodes for which ``barrier`` holds get a number of their own."""
    describe = _Describer(lambda name: "%", {name: f"@{name}" for name in (*graph.subgraphs, *graph.cascades)})
    numbers: dict[str, int] = {}
    tokens = []
    for index, node in enumerate(graph.nodes):
        if node.op in ("input", "constant") or barrier(node):
            text = f"unique {index}"
        else:
            arguments = ",".join(describe.argument(argument) for argument in node.args)
            named = ",".join(f"{name}={_exact(describe, value)}" for name, value in node.kwargs)
            value_type = "" if node.type is None else print_type(node.type)
            text = f"{node.op}({arguments};{named}){value_type};{node.region}"
        tokens.append(numbers.setdefault(text, len(numbers)))
    return tokens


def _exact(describe: _Describer, argument: Argument) -> str:
    """As ``describe.argument``, with devices and sizes as they are: one stretch's code must serve the others."""
    if isinstance(argument, tuple):
        return f"[{','.join(_exact(describe, item) for item in argument)}]"
    return "%" if isinstance(argument, Ref) else print_argument(argument)


def find_repeats(
    graph: Graph, min_nodes: int = 8, barrier: Callable[[Node], bool] = lambda node: False
) -> tuple[Run, ...]:
    """Disjoint runs of consecutive equal stretches, such as layers, in graph order.

    A stretch has at least ``min_nodes`` nodes. Equal means equal ops, plain arguments, types and data flow: an operand
    is the same node of its stretch, or comes from before the stretch in all. The run that saves the most nodes is taken
    first, then the best left and right of it. Stretches begin where the fewest values cross.
    """
    search = _RepeatSearch(graph, local_tokens(graph, barrier), min_nodes)
    return tuple(sorted(search.between(0, len(graph.nodes)), key=lambda run: run.start))


class _RepeatSearch:
    def __init__(self, graph: Graph, tokens: list[int], min_nodes: int) -> None:
        import numpy  # slow to import, and needed here alone

        self.numpy = numpy
        self.tokens = numpy.asarray(tokens, dtype=numpy.int64)
        self.min_nodes = min_nodes
        position = {node.name: index for index, node in enumerate(graph.nodes)}
        self.operands = [tuple(position[name] for name in node.operands()) for node in graph.nodes]
        self.modules = [node.location.module for node in graph.nodes]
        self.crossing = self._crossing(graph, position)

    def _crossing(self, graph: Graph, position: dict[str, int]) -> list[int]:
        """How many values made before node i are used by it or later; inputs, which are always at hand, left out."""
        last = list(range(len(graph.nodes)))
        for index, operands in enumerate(self.operands):
            for operand in operands:
                last[operand] = index
        for name in graph.output_names():
            last[position[name]] = len(graph.nodes)
        change = [0] * (len(graph.nodes) + 2)
        for index, node in enumerate(graph.nodes):
            if node.op != "input" and last[index] > index:
                change[index + 1] += 1
                change[last[index] + 1] -= 1
        total, crossing = 0, []
        for step in change:
            total += step
            crossing.append(total)
        return crossing

    def between(self, low: int, high: int) -> Iterator[Run]:
        """The best run inside [low, high), then the best beside it."""
        stretches = [(low, high)]
        while stretches:
            low, high = stretches.pop()
            run = self.best(low, high)
            if run is not None:
                yield run
                stretches += [(low, run.start), (run.end, high)]

    def best(self, low: int, high: int) -> Run | None:
        candidates = sorted(self.candidates(low, high), key=lambda candidate: (-candidate[0], candidate[1]))
        best: Run | None = None
        for saved, period, start, length in candidates[:64]:
            if best is not None and best.saved >= saved:
                break
            run = self.confirm(start, length, period)
            if run is not None and (best is None or run.saved > best.saved):
                best = run
        return best

    def candidates(self, low: int, high: int) -> Iterator[tuple[int, int, int, int]]:
        """(nodes saved, period, start, matching length) of every stretch of tokens that equals itself, shifted."""
        numpy, tokens = self.numpy, self.tokens[low:high]
        size = high - low
        for period in range(self.min_nodes, size // 2 + 1):
            differs = numpy.flatnonzero(tokens[period:] != tokens[:-period])
            if size - period - len(differs) < period:
                continue
            edges = numpy.concatenate(([-1], differs, [size - period]))
            lengths = numpy.diff(edges) - 1
            for which in numpy.flatnonzero(lengths >= period):
                length = int(lengths[which])
                yield (length // period) * period, period, low + int(edges[which]) + 1, length

    def confirm(self, start: int, length: int, period: int) -> Run | None:
        """The run at the best cut whose data flow repeats too; None if fewer than two stretches are left."""
        slack = length % period
        runs = []
        for offset in self.offsets(start, slack, period):
            runs.append(self.longest(offset, (start + length + period - offset) // period, period))
            if runs[-1].count >= (length - (offset - start)) // period + 1:
                break
        good = [run for run in runs if run.count >= 2]
        return max(good, key=lambda run: run.count, default=None)

    def offsets(self, start: int, slack: int, period: int) -> list[int]:
        """Where the first stretch may begin without losing one, best cut first: few values cross, a module begins."""
        places = range(start, start + slack + 1)
        return sorted(places, key=lambda place: (self.crossing[place], not self._module_begins(place, period), place))[
            :4
        ]

    def _module_begins(self, place: int, period: int) -> bool:
        return place > 0 and _layer(self.modules[place]) != _layer(self.modules[place - 1])

    def longest(self, start: int, count: int, period: int) -> Run:
        """The longest stretch of repeats in the run whose data flow agrees from each to the next."""
        best, first = Run(start, period, 1), 0
        for index in range(count - 1):
            if not self.same_flow(start + index * period, start + (index + 1) * period, period):
                first = index + 1
            elif index + 2 - first > best.count:
                best = Run(start + first * period, period, index + 2 - first)
        return best

    def same_flow(self, left: int, right: int, period: int) -> bool:
        """Every operand is inside both stretches at the same place, or before both."""
        for offset in range(period):
            a, b = self.operands[left + offset], self.operands[right + offset]
            if len(a) != len(b):
                return False
            for source_a, source_b in zip(a, b, strict=True):
                inside = source_a >= left
                if inside != (source_b >= right) or (inside and source_a - left != source_b - right):
                    return False
        return True


def _layer(module: str) -> str:
    """A module path up to its last number: ``model.layers.3`` of ``model.layers.3.mlp``."""
    parts = module.split(".")
    numbered = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[-1] + 1]) if numbered else module
