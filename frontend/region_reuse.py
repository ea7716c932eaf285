"""Whether a trace of one module serves another, for Dynamo's cache of traced subgraphs: what a call's arguments are,
and that the guards of the first module hold for the next.

Torch evaluates the first module's guards on the next one and then drops them; here they are also *installed* for it, so
that changing an attribute of layer 7 alone recompiles. Arguments that alias each other differently, and constants of
another type, are told apart. ``torch_patches`` puts these functions in the place of torch's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import types
from typing import Any

import torch


def fingerprint_of(args: Any, kwargs: Any) -> Any | None:
    """Torch's ``InputFingerprint`` of a call, without interpreting ``pytree.tree_flatten`` as Dynamo does (20 ms each).

    Arguments may be tensors, numbers, constants and modules in tuples, lists and dictionaries with constant keys. None
    where there is anything else: torch's own way is then to be taken.
    """
    from torch._dynamo.variables.invoke_subgraph import InputFingerprint

    leaves: list[Any] = []
    spec = tuple(_flatten(argument, leaves) for argument in args)
    named = tuple((name, _flatten(argument, leaves)) for name, argument in kwargs.items())
    if any(tag is None for tag, _ in leaves):
        return None
    return InputFingerprint(leaves, [getattr(leaf, "source", None) for _, leaf in leaves], False, (spec, named))


def _flatten(variable: Any, leaves: list[Any]) -> Any:
    """A hashable description of the nesting; the leaves are appended as (tag, variable), tag None if not understood."""
    from torch._dynamo.variables.dicts import ConstDictVariable
    from torch._dynamo.variables.invoke_subgraph import classify_vt
    from torch._dynamo.variables.lists import ListVariable, TupleVariable

    tag = classify_vt(variable)
    if tag is None:
        variable = variable.realize() if hasattr(variable, "realize") else variable
        if type(variable) in (TupleVariable, ListVariable):
            return (type(variable).__name__, *(_flatten(item, leaves) for item in variable.items))
        if type(variable) is ConstDictVariable and variable.user_cls is dict:
            keys = [key.vt for key in variable.items]
            if all(key.is_python_constant() for key in keys):
                texts = [repr(key.as_python_constant()) for key in keys]
                values = variable.items.values()
                return ("dict", *((text, _flatten(item, leaves)) for text, item in zip(texts, values, strict=True)))
    leaves.append((tag, variable))
    return "leaf"


def is_reusable(tx: Any, condition: Any, fingerprint: Any, entry: Any) -> bool:
    """Whether the trace holds for these arguments; if so its guards are installed for them."""
    if condition.treespec != fingerprint.treespec:
        return False
    if not hasattr(entry, "_effcc_arguments"):
        raise AssertionError("a reuse entry was made outside of a region")
    if entry._effcc_arguments != describe_arguments(fingerprint):
        return False
    replaced = {
        old: new
        for old, new in zip(entry.arg_sources, fingerprint.arg_sources, strict=True)
        if old is not None and new is not None and old != new
    }
    clone = _SourceCloner(replaced)
    mutated = tx.output.side_effects.mutated_sources
    if mutated and any(clone(source) in mutated for source in condition.traced_sources):
        return False
    resolve = _Resolver({"G": tx.output.root_tx.f_globals, "L": tx.output.root_tx.f_locals})
    guards, tensors = [], []
    for source, handler, expected, guard in _ordered_guards(tx, condition, entry):
        moved = clone(source)
        if moved is source:
            continue
        try:
            value = resolve(moved)
        except Exception:
            return False  # the sibling lacks an attribute that the first module has
        if not handler.eval_fn(value, expected):
            return False
        if guard.create_fn_name() == "TENSOR_MATCH":
            tensors.append((entry._effcc_places.get(source, math.inf), moved, value))
            continue
        moved_guard = moved.make_guard(_guard_function(guard, value))
        moved_guard.user_stack = guard.user_stack
        guards.append(moved_guard)
    from torch._dynamo.guards import install_guard
    from torch._dynamo.variables.builder import VariableBuilder

    install_guard(*guards)
    for _, moved, value in sorted(tensors, key=operator.itemgetter(0)):
        VariableBuilder(tx, moved)(value)  # makes the input, and its guard
    return True


def _ordered_guards(tx: Any, condition: Any, entry: Any) -> Any:
    """The guards in an order that is the same in every process (torch takes them from a set). The tensors' places among
    the graph's inputs are kept with them: a sibling's inputs are made in the order in which its trace would make them,
    since plans are matched by it."""
    if not hasattr(entry, "_effcc_guards"):
        entry._effcc_guards = sorted(condition.guards, key=lambda item: (item[0].name, item[3].create_fn_name()))
        inputs = tx.output.root_tracer.graph.find_nodes(op="placeholder")
        arguments = (node.meta.get("grapharg") for node in inputs)
        sources = [getattr(argument, "source", None) for argument in arguments]
        entry._effcc_places = {source: place for place, source in enumerate(sources) if source is not None}
    return entry._effcc_guards


class _SourceCloner:
    """``Source.clone`` with each distinct source cloned once; sources outside ``replaced`` come back as they are."""

    def __init__(self, replaced: dict[Any, Any]) -> None:
        self.done: dict[Any, Any] = dict(replaced)

    def __call__(self, source: Any) -> Any:
        known = self.done.get(source)
        if known is not None:
            return known
        fields = {}
        for name in _field_names(type(source)):
            value = getattr(source, name)
            if isinstance(value, torch._guards.Source):
                moved = self(value)
                if moved is not value:
                    fields[name] = moved
        result = dataclasses.replace(source, **fields) if fields else source
        self.done[source] = result
        return result


@functools.cache
def _field_names(source_class: Any) -> tuple[str, ...]:
    return tuple(item.name for item in dataclasses.fields(source_class))


class _Resolver:
    """``Source.get_value`` with every step's expression compiled once in the process (``tmp.self_attn``)."""

    def __init__(self, scope: dict[str, Any]) -> None:
        self.scope = scope
        self.known: dict[Any, Any] = {}

    def __call__(self, source: Any) -> Any:
        from torch._guards import ChainedSource

        if source in self.known:
            return self.known[source]
        if type(source).get_value is ChainedSource.get_value:
            code = _step(source._name_template.format("effcc_base"))
            value = eval(code, self.scope, {"effcc_base": self(source.base)})  # torch's own template, as it does itself
        else:
            value = source.get_value(self.scope, {}, self.known)
        self.known[source] = value
        return value


@functools.lru_cache(maxsize=4096)
def _step(expression: str) -> types.CodeType:
    return compile(expression, "<source>", "eval")


def _guard_function(guard: Any, value: Any) -> Any:
    """The guard's maker, rebound to ``value`` where it carries the first module's value."""
    make = guard.create_fn
    if isinstance(make, functools.partial) and "value" in make.keywords:
        return functools.partial(make.func, value=value)
    return make


def describe_arguments(fingerprint: Any) -> tuple[Any, ...]:
    """Everything about a call's arguments that its trace may depend on, comparable with ``==``."""
    from torch._dynamo.guards import extract_tensor_metadata
    from torch._dynamo.variables.invoke_subgraph import InputTag

    first: dict[Any, int] = {}
    described: list[Any] = []
    for position, (tag, variable) in enumerate(fingerprint.flat_vts):
        if tag in (InputTag.TENSOR, InputTag.SYMNODE):
            node = variable.as_proxy().node
            described.append((tag, first.setdefault(node, position)))
        if tag == InputTag.TENSOR:
            example = variable.proxy.node.meta["example_value"]
            shape, stride, *rest = extract_tensor_metadata(example)
            described += [_sizes(shape), _sizes(stride), *rest]
        elif tag == InputTag.SYMNODE:
            described.append(_Same(variable.sym_num))
        elif tag == InputTag.CONSTANT:
            described.append((type(variable.value), repr(variable.value)))
        else:
            described.append(tag)
    return tuple(described)


def _sizes(sizes: Any) -> tuple[Any, ...]:
    """Sizes as numbers and expressions; comparing SymInts would specialize them."""
    return tuple(size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes)


class _Same:
    """Equal only to itself: symbolic numbers must not be compared by value, which would specialize them."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)
