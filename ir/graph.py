"""The first IR form: a graph in SSA form over ATen ops.

A ``Graph`` is a list of nodes in execution order. A value is named by the node that makes it; a multi-output op is one
node of ``TupleType`` whose parts are read with ``getitem``. A repeated layer stands once in ``subgraphs`` and is used
by ``call`` nodes. Nodes are compared by content (name, op, arguments, type, location), never by identity; arguments
strictly, see ``argument_key``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import sympy

from .fused_cascade import FusedCascade
from .types import Type

#: Op of a node that runs a fused cascade: ``effcc.cascade.default(@name, operands...)``, a tuple of its results.
CASCADE_OP = "effcc.cascade.default"


@dataclass(frozen=True)
class Ref:
    """Use of another node's value, by name: ``%name``."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """A torch constant that is not a number: ``torch.float32``, ``torch.strided``, ``device(cpu)``, ``@layer``."""

    text: str


Argument: TypeAlias = "Ref | Symbol | sympy.Basic | int | float | complex | bool | str | tuple[Argument, ...] | None"
"""An op's argument. Lists are kept as tuples. A sympy expression is canonical (see ``expressions``); a dict, a slice
and a list that must stay a list are tuples that begin with ``Symbol("dict")``, ``Symbol("slice")``,
``Symbol("list")``."""


@dataclass(frozen=True)
class Location:
    """Where in the user's model a node comes from. Empty strings and 0 stand for unknown."""

    file: str = ""
    line: int = 0
    source: str = ""
    module: str = ""

    def __bool__(self) -> bool:
        return bool(self.file or self.module)


@dataclass(frozen=True, eq=False)
class Node:
    """One op.

    ``op`` is the full overload name (``aten.mm.default``, ``prims.convert_element_type.default``,
    ``mylib.custom.default``), or one of the four structural ops: ``input``, ``getitem``, ``call`` (first argument
    ``Symbol("@subgraph")``) and ``constant`` (argument: the name of a tensor constant kept beside the graph). ``role``
    of an ``input`` is parameter, buffer, input, saved, tangent, seed, constant or symbol (a size passed as a number).
    ``forward`` names the forward op a backward op differentiates. ``origin`` says which rewrite made the node, such as
    ``remat(%9)``. ``region`` is the region the node was assigned to (None before that pass).
    """

    name: str
    op: str
    args: tuple[Argument, ...] = ()
    kwargs: tuple[tuple[str, Argument], ...] = ()
    type: Type | None = None
    location: Location = Location()
    role: str = ""
    forward: str = ""
    origin: str = ""
    region: int | None = None

    def _key(self) -> tuple[Any, ...]:
        return (
            self.name,
            self.op,
            argument_key(self.args),
            tuple((name, argument_key(value)) for name, value in self.kwargs),
            self.type,
            self.location,
            self.role,
            self.forward,
            self.origin,
            self.region,
        )

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Node) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.name, self.op, self.type))

    def operands(self) -> Iterator[str]:
        """Names of the values this node reads, in argument order, with repeats."""
        for argument in (*self.args, *(value for _, value in self.kwargs)):
            yield from references(argument)


@dataclass(frozen=True)
class Alias:
    """``name`` shares storage with ``base`` (an input or an earlier node); ``writes`` if the op also mutates it."""

    name: str
    base: str
    writes: bool = False


@dataclass(frozen=True)
class Repeat:
    """Fact: subgraph ``name`` occurs ``count`` times; its structural hash is ``digest``."""

    name: str
    count: int
    digest: str


@dataclass(frozen=True, eq=False)
class Graph:
    """``phase`` is inference, forward, backward or joint. ``outputs`` are arguments in return order; of a forward graph
    the last ``saved`` ones are kept for the backward. ``cascades`` are the fused cascades that ``effcc.cascade`` nodes
    name with their first argument, ``Symbol("@name")``; a name is not that of a subgraph as well."""

    name: str
    phase: str
    nodes: tuple[Node, ...]
    outputs: tuple[Argument, ...]
    saved: int = 0
    subgraphs: Mapping[str, Graph] = field(default_factory=dict)
    aliases: tuple[Alias, ...] = ()
    repeats: tuple[Repeat, ...] = ()
    cascades: Mapping[str, FusedCascade] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Graph):
            return NotImplemented
        return (
            (self.name, self.phase, self.saved) == (other.name, other.phase, other.saved)
            and self.nodes == other.nodes
            and argument_key(self.outputs) == argument_key(other.outputs)
            and dict(self.subgraphs) == dict(other.subgraphs)
            and self.aliases == other.aliases
            and self.repeats == other.repeats
            and dict(self.cascades) == dict(other.cascades)
        )

    def __hash__(self) -> int:
        return hash((self.name, self.phase, self.nodes))

    @property
    def inputs(self) -> tuple[Node, ...]:
        return tuple(node for node in self.nodes if node.op == "input")

    @cached_property
    def writes(self) -> Mapping[str, tuple[str, ...]]:
        """Value -> the bases that its op writes, by the alias facts."""
        table: dict[str, tuple[str, ...]] = {}
        for alias in self.aliases:
            if alias.writes:
                table[alias.name] = (*table.get(alias.name, ()), alias.base)
        return table

    def by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    def users(self) -> dict[str, list[Node]]:
        """Node name -> the nodes that read it, in order. Uses by ``outputs`` are not listed."""
        table: dict[str, list[Node]] = {node.name: [] for node in self.nodes}
        for node in self.nodes:
            for name in dict.fromkeys(node.operands()):
                table[name].append(node)
        return table

    def output_names(self) -> list[str]:
        return [name for output in self.outputs for name in references(output)]

    def with_nodes(self, nodes: tuple[Node, ...], **changes: Any) -> Graph:
        return replace(self, nodes=nodes, **changes)


def argument_key(argument: Argument) -> Any:
    """What arguments are compared by: True, 1 and 1.0 differ, 0.0 and -0.0 differ, and every nan equals every other."""
    if isinstance(argument, tuple):
        return tuple(argument_key(item) for item in argument)
    if isinstance(argument, bool):
        return ("bool", argument)
    if isinstance(argument, float | complex):
        return (type(argument).__name__, repr(argument))
    return argument


def references(argument: Argument) -> Iterator[str]:
    """Names of the values that an argument reads, depth first."""
    if isinstance(argument, Ref):
        yield argument.name
    elif isinstance(argument, tuple):
        for item in argument:
            yield from references(item)


def substitute(argument: Argument, rename: Callable[[str], Argument]) -> Argument:
    """The argument with each ``Ref`` replaced by ``rename(its name)``."""
    if isinstance(argument, Ref):
        return rename(argument.name)
    if isinstance(argument, tuple):
        return tuple(substitute(item, rename) for item in argument)
    return argument
