"""The rules of the graph, as a table: each is a function from a graph to the problems that it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import sympy

from .expressions import ExpressionError, canonical
from .graph import CASCADE_OP, Argument, Graph, Node, Ref, Symbol
from .printer import print_alias, print_repeat
from .type_text import print_type
from .types import DTYPES, NoneType, OpaqueType, ScalarType, Size, TensorType, TupleType, Type

PHASES = ("inference", "forward", "backward", "joint")
ROLES = ("parameter", "buffer", "input", "saved", "tangent", "seed", "constant", "symbol")
SCALAR_KINDS = ("int", "float", "bool")


@dataclass(frozen=True)
class Problem:
    """What is wrong at node number ``index`` (None: at the graph's own lines), and what to do."""

    index: int | None
    message: str
    remedy: str


Rule = Callable[[Graph], Iterator[Problem]]


def phase_is_known(graph: Graph) -> Iterator[Problem]:
    if graph.phase not in PHASES:
        yield Problem(None, f"phase '{graph.phase}' is not known", f"use one of {', '.join(PHASES)}")


def names_are_unique(graph: Graph) -> Iterator[Problem]:
    seen: dict[str, int] = {}
    for index, node in enumerate(graph.nodes):
        if node.name in seen:
            yield Problem(
                index, f"%{node.name} is defined twice, first by node {seen[node.name]}", "rename one of them"
            )
        seen[node.name] = index


def values_are_defined_before_use(graph: Graph) -> Iterator[Problem]:
    defined: set[str] = set()
    names = {node.name for node in graph.nodes}
    for index, node in enumerate(graph.nodes):
        for name in node.operands():
            if name not in defined:
                later = "is defined only later" if name in names else "is not defined"
                yield Problem(
                    index, f"%{node.name} reads %{name}, which {later}", "define a value before its first use"
                )
        defined.add(node.name)


def outputs_are_defined(graph: Graph) -> Iterator[Problem]:
    names = {node.name for node in graph.nodes}
    for name in graph.output_names():
        if name not in names:
            yield Problem(None, f"the graph returns %{name}, which is not defined", "return values of the graph only")


def saved_count_fits(graph: Graph) -> Iterator[Problem]:
    if not 0 <= graph.saved <= len(graph.outputs):
        yield Problem(
            None,
            f"saved={graph.saved}, but the graph has {len(graph.outputs)} outputs",
            "saved counts the last outputs, kept for the backward",
        )
    elif graph.saved and graph.phase != "forward":
        yield Problem(
            None, f"saved={graph.saved} in a graph of phase {graph.phase}", "only a forward graph saves values"
        )


def structural_ops_are_well_formed(graph: Graph) -> Iterator[Problem]:
    body_started = ""
    for index, node in enumerate(graph.nodes):
        if node.op == "input":
            if node.args or node.kwargs:
                yield Problem(index, f"input %{node.name} has arguments", "an input is written input()")
            if body_started:
                yield Problem(
                    index, f"input %{node.name} comes after %{body_started}", "list all inputs first, in call order"
                )
        else:
            body_started = body_started or node.name
            if node.role:
                yield Problem(index, f"%{node.name} has role {node.role} but is not an input", "remove its role")
        if node.op == "constant" and not (len(node.args) == 1 and isinstance(node.args[0], str)):
            yield Problem(index, f"constant %{node.name} has no name", 'write constant("name of the tensor")')
        if not node.op or any(part == "" for part in node.op.split(".")):
            yield Problem(
                index, f"'{node.op}' is not an op's name", "use the overload's full name, such as aten.mm.default"
            )


def roles_are_known(graph: Graph) -> Iterator[Problem]:
    for index, node in enumerate(graph.nodes):
        if node.op == "input" and node.role and node.role not in ROLES:
            yield Problem(index, f"%{node.name} has the unknown role '{node.role}'", f"use one of {', '.join(ROLES)}")


def types_are_present_and_sound(graph: Graph) -> Iterator[Problem]:
    for index, node in enumerate(graph.nodes):
        if node.type is None:
            yield Problem(
                index, f"%{node.name} has no type", "write ': type' behind its name; 'none' if it yields nothing"
            )
            continue
        fault = _type_fault(node.type)
        if fault:
            yield Problem(index, f"the type {_type_text(node.type)} of %{node.name} {fault}", "correct the type")


def arguments_are_sound(graph: Graph) -> Iterator[Problem]:
    for index, node in enumerate(graph.nodes):
        for argument in (*node.args, *(value for _, value in node.kwargs)):
            fault = _argument_fault(argument)
            if fault:
                yield Problem(index, f"%{node.name}: {fault}", "arguments are those that docs/ir.md lists")
        names = [name for name, _ in node.kwargs]
        if len(set(names)) != len(names):
            yield Problem(index, f"%{node.name} is given a named argument twice", "give each argument once")


def getitems_are_in_range(graph: Graph) -> Iterator[Problem]:
    table = graph.by_name()
    for index, node in enumerate(graph.nodes):
        if node.op != "getitem":
            continue
        if (
            len(node.args) != 2
            or not isinstance(node.args[0], Ref)
            or not isinstance(node.args[1], int)
            or isinstance(node.args[1], bool)
        ):
            yield Problem(index, f"%{node.name}: getitem takes a value and an integer", "write getitem(%value, 0)")
            continue
        source, position = table[node.args[0].name], node.args[1]
        if isinstance(source.type, OpaqueType):
            continue
        if not isinstance(source.type, TupleType):
            yield Problem(index, f"%{node.name}: %{source.name} is no tuple", "getitem reads a multi-output op's parts")
        elif not 0 <= position < len(source.type.items):
            yield Problem(
                index,
                f"%{node.name} reads part {position} of %{source.name}, which has {len(source.type.items)} parts",
                f"use 0 to {len(source.type.items) - 1}",
            )
        elif source.type.items[position] != node.type:
            expected = _type_text(source.type.items[position])
            yield Problem(
                index,
                f"%{node.name} has type {_type_text(node.type)}, but part {position} of %{source.name} is {expected}",
                "give the getitem the type of the part it reads",
            )


def calls_match_their_subgraph(graph: Graph) -> Iterator[Problem]:
    table = graph.by_name()
    for index, node in enumerate(graph.nodes):
        for argument in (*node.args, *(value for _, value in node.kwargs)):
            for name in _subgraph_names(argument):
                if name not in graph.subgraphs and name not in graph.cascades:
                    yield Problem(index, f"%{node.name} uses @{name}, which is no subgraph here", "define the subgraph")
        if node.op != "call":
            continue
        target = node.args[0] if node.args else None
        if not isinstance(target, Symbol) or not target.text.startswith("@") or node.kwargs:
            yield Problem(index, f"%{node.name} calls no subgraph", "write call(@subgraph, arguments...)")
            continue
        subgraph = graph.subgraphs[target.text[1:]]
        yield from _call_problems(index, node, subgraph, table)


def cascades_match_their_nodes(graph: Graph) -> Iterator[Problem]:
    for name in graph.cascades:
        if name in graph.subgraphs:
            yield Problem(None, f"@{name} is a subgraph and a cascade", "give one of them another name")
    table = graph.by_name()
    for index, node in enumerate(graph.nodes):
        if node.op != CASCADE_OP:
            continue
        target = node.args[0] if node.args else None
        if not isinstance(target, Symbol) or target.text[1:] not in graph.cascades or node.kwargs:
            yield Problem(
                index, f"%{node.name} names no cascade of this graph", f"write {CASCADE_OP}(@name, %values...)"
            )
            continue
        fused, operands = graph.cascades[target.text[1:]], node.args[1:]
        given = [table[item.name].type if isinstance(item, Ref) else None for item in operands]
        if len(given) != len(fused.operands) or not all(map(_compatible, given, fused.operands)):
            yield Problem(
                index, f"%{node.name} has other operands than {target.text}", "pass values of the operands' types"
            )
        elif node.type != TupleType(fused.results):
            yield Problem(index, f"%{node.name} has another type than {target.text}", "it is the tuple of the results")


def _call_problems(index: int, node: Node, subgraph: Graph, table: dict[str, Node]) -> Iterator[Problem]:
    inputs, arguments = subgraph.inputs, node.args[1:]
    if len(inputs) != len(arguments):
        yield Problem(
            index,
            f"%{node.name} gives @{subgraph.name} {len(arguments)} arguments; it has {len(inputs)} inputs",
            "give one argument for each input",
        )
        return
    for parameter, argument in zip(inputs, arguments, strict=True):
        if isinstance(argument, Ref) and not _compatible(table[argument.name].type, parameter.type):
            yield Problem(
                index,
                f"%{node.name} passes %{argument.name} of type {_type_text(table[argument.name].type)} "
                f"for input %{parameter.name} of type {_type_text(parameter.type)}",
                "pass a value of the input's type",
            )
    inner = subgraph.by_name()
    results = [inner[output.name].type if isinstance(output, Ref) else None for output in subgraph.outputs]
    if not isinstance(node.type, TupleType) or len(node.type.items) != len(results):
        yield Problem(
            index,
            f"%{node.name} has type {_type_text(node.type)}, but @{subgraph.name} returns {len(results)} values",
            "the type of a call is the tuple of its subgraph's outputs",
        )
        return
    for position, (declared, result) in enumerate(zip(node.type.items, results, strict=True)):
        if result is not None and not _compatible(declared, result):
            yield Problem(
                index,
                f"%{node.name}: part {position} has type {_type_text(declared)}, "
                f"but @{subgraph.name} returns {_type_text(result)}",
                "the type of a call is the tuple of its subgraph's outputs",
            )


def aliases_name_values(graph: Graph) -> Iterator[Problem]:
    position = {node.name: index for index, node in enumerate(graph.nodes)}
    for alias in graph.aliases:
        for name in (alias.name, alias.base):
            if name not in position:
                yield Problem(None, f"'{print_alias(alias)}': %{name} is not defined", "remove the alias fact")
                return
        if position[alias.base] >= position[alias.name]:
            yield Problem(
                position[alias.name],
                f"'{print_alias(alias)}': the base does not come before its alias",
                "swap the two: a base is an input or an earlier value",
            )


def repeats_name_subgraphs(graph: Graph) -> Iterator[Problem]:
    for repeat in graph.repeats:
        if repeat.name not in graph.subgraphs:
            yield Problem(None, f"'{print_repeat(repeat)}': there is no such subgraph", "remove the repeat fact")
            continue
        target = Symbol(f"@{repeat.name}")
        calls = sum(node.op == "call" and target in node.args[:1] for node in graph.nodes)
        if calls != repeat.count:
            yield Problem(
                None, f"'{print_repeat(repeat)}': the graph calls it {calls} times", "correct the repeat's count"
            )


def regions_are_monotone(graph: Graph) -> Iterator[Problem]:
    last, previous = -1, ""
    for index, node in enumerate(graph.nodes):
        if node.region is None:
            continue
        if node.region < last:
            yield Problem(
                index,
                f"%{node.name} is in region {node.region}, after %{previous} in region {last}",
                "number regions in execution order; a region is a consecutive stretch",
            )
        last, previous = node.region, node.name


#: All rules, in the order in which they are checked; later rules rely on earlier ones.
RULES: tuple[Rule, ...] = (
    phase_is_known,
    names_are_unique,
    values_are_defined_before_use,
    outputs_are_defined,
    saved_count_fits,
    structural_ops_are_well_formed,
    roles_are_known,
    types_are_present_and_sound,
    arguments_are_sound,
    getitems_are_in_range,
    calls_match_their_subgraph,
    cascades_match_their_nodes,
    aliases_name_values,
    repeats_name_subgraphs,
    regions_are_monotone,
)


# What the rules look at ----------------------------------------------------------------------------------------------


def _type_text(value: Type | None) -> str:
    if value is None:
        return "(none given)"
    try:
        return print_type(value)
    except (ExpressionError, TypeError, AttributeError):
        return repr(value)


def _type_fault(value: Type) -> str:
    """What is wrong with a type, or an empty string."""
    if isinstance(value, TensorType):
        if value.dtype not in DTYPES:
            return f"has the unknown dtype '{value.dtype}'"
        if value.stride is not None and len(value.stride) != len(value.shape):
            return f"has {len(value.shape)} sizes but {len(value.stride)} strides"
        if any(isinstance(size, int) and size < 0 for size in value.shape):
            return "has a negative size"
        return next((fault for size in (*value.shape, *(value.stride or ())) if (fault := _size_fault(size))), "")
    if isinstance(value, ScalarType):
        if value.kind not in SCALAR_KINDS:
            return f"has the unknown kind '{value.kind}'"
        return "" if value.value is None else _size_fault(value.value)
    if isinstance(value, TupleType):
        return next((fault for item in value.items if (fault := _type_fault(item))), "")
    return "" if isinstance(value, NoneType | OpaqueType) else "is not a type of the IR"


def _size_fault(size: Size) -> str:
    if isinstance(size, int):
        return ""
    if not isinstance(size, sympy.Basic):
        return f"has the size {size!r}, which is no integer or expression"
    try:
        same = canonical(size) == size
    except ExpressionError as error:
        return f"has a size outside of the IR: {error}"
    return "" if same else f"has the size {size}, which is not canonical (pass it through expressions.canonical)"


def _argument_fault(argument: Argument) -> str:
    if isinstance(argument, tuple):
        return next((fault for item in argument if (fault := _argument_fault(item))), "")
    if isinstance(argument, sympy.Basic):
        fault = _size_fault(argument)
        return f"an argument {fault}" if fault else ""
    known = isinstance(argument, Ref | Symbol | int | float | complex | bool | str) or argument is None
    return "" if known else f"an argument is of class {type(argument).__name__}, which the IR does not have"


def _subgraph_names(argument: Argument) -> Iterator[str]:
    if isinstance(argument, Symbol) and argument.text.startswith("@"):
        yield argument.text[1:]
    elif isinstance(argument, tuple):
        for item in argument:
            yield from _subgraph_names(item)


def _compatible(given: Type | None, wanted: Type | None) -> bool:
    """Equal but for symbolic sizes, which a subgraph may name differently than its caller, and strides."""
    if given == wanted:
        return True
    if isinstance(given, TensorType) and isinstance(wanted, TensorType):
        return (
            (given.dtype, given.device, len(given.shape)) == (wanted.dtype, wanted.device, len(wanted.shape))
        ) and all(
            a == b or not (isinstance(a, int) and isinstance(b, int))
            for a, b in zip(given.shape, wanted.shape, strict=True)
        )
    if isinstance(given, ScalarType) and isinstance(wanted, ScalarType):
        return given.kind == wanted.kind
    return isinstance(given, NoneType | OpaqueType) or isinstance(wanted, NoneType | OpaqueType)
