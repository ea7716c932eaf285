"""Pipelines as text: ``dead-code,regions{max_ops=64,cut_at=[mm,bmm]}``.

A pass is found by the ``name`` of its class. Options are the fields of its dataclass; their types say how a value is
read.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, ClassVar, Literal, Protocol, Union, get_args, get_origin

from ..errors import OptionError
from ..ir.graph import Graph


class Pass(Protocol):
    """What the manager runs: a frozen dataclass with a ``name`` whose fields are its options."""

    name: ClassVar[str]

    def apply(self, graph: Graph) -> Graph: ...


#: Names that stand for several passes in a row.
PIPELINES: Mapping[str, str] = {
    "normalize": "canonicalize,constant-folding,common-subexpressions,dead-code",
}

_NAME = re.compile(r"\s*([A-Za-z_][\w.-]*)\s*")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_ITEM = re.compile(rf"\s*(?:(?P<quoted>{_QUOTED.pattern})|(?P<plain>[^,]+))\s*(?:,|$)", re.DOTALL)


def parse_pipeline(text: str) -> tuple[Pass, ...]:
    """Passes named by ``text``, in order. Raises OptionError for an unknown pass, option or value."""
    passes: list[Pass] = []
    for name, options in _items(text):
        if name in PIPELINES:
            if options:
                raise OptionError(f"pipeline {name} takes no options", remedy=f"it stands for {PIPELINES[name]}")
            passes.extend(parse_pipeline(PIPELINES[name]))
        else:
            passes.append(make_pass(name, options))
    return tuple(passes)


def make_pass(name: str, options: Mapping[str, str]) -> Pass:
    """The pass ``name`` with options given as text."""
    cls = find_pass(name)
    known = pass_options(cls)
    values: dict[str, Any] = {}
    for option, text in options.items():
        if option not in known:
            offered = ", ".join(known) or "none"
            raise OptionError(
                f"pass {name} has no option {option!r}", remedy=f"{_suggest(option, known)}its options: {offered}"
            )
        values[option] = _read(text, known[option][1], f"{name}{{{option}}}")
    missing = [option for option, (field, _) in known.items() if option not in values and _required(field)]
    if missing:
        raise OptionError(f"pass {name} needs {', '.join(missing)}", remedy=f"write {name}{{{missing[0]}=...}}")
    return typing.cast(Pass, cls(**values))


def pass_text(pass_: Pass) -> str:
    """The pipeline text that makes this pass again; options at their default are left out."""
    shown = []
    for option, (field, _) in pass_options(type(pass_)).items():
        value = getattr(pass_, option)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if value != default:
            shown.append(f"{option}={_show(value)}")
    return f"{pass_.name}{{{','.join(shown)}}}" if shown else pass_.name


def pass_options(cls: type) -> dict[str, tuple[Field[Any], Any]]:
    """Option name -> its dataclass field and resolved type."""
    if not is_dataclass(cls):
        return {}
    hints = typing.get_type_hints(cls)
    return {field.name: (field, hints[field.name]) for field in fields(cls) if field.init}


def find_pass(name: str) -> type:
    """The class of the pass called ``name``. Raises OptionError, with the nearest name, if there is none."""
    try:
        found = _passes_in(name.replace("-", "_"))
    except ModuleNotFoundError:
        found = {}
    if name in found:
        return found[name]
    known, broken = all_passes()
    if name in known:
        return known[name]
    remedy = f"{_suggest(name, [*known, *PIPELINES])}known passes: {', '.join(sorted([*known, *PIPELINES]))}"
    if broken:
        remedy += "; not loaded: " + ", ".join(f"{module} ({why})" for module, why in broken.items())
    raise OptionError(f"there is no pass called {name!r}", remedy=remedy)


@functools.cache
def all_passes() -> tuple[dict[str, type], dict[str, str]]:
    """Every pass by name, and the modules that could not be loaded with the reason."""
    package = importlib.import_module(__package__ or "")
    found: dict[str, type] = {}
    broken: dict[str, str] = {}
    for module in pkgutil.iter_modules(package.__path__):
        try:
            found.update(_passes_in(module.name))
        except ImportError as error:  # an optional dependency of that pass is absent
            broken[module.name] = str(error)
    return found, broken


def _passes_in(module_name: str) -> dict[str, type]:
    if not module_name.isidentifier():
        return {}
    module = importlib.import_module(f".{module_name}", __package__)
    classes = [cls for cls in vars(module).values() if isinstance(cls, type) and cls.__module__ == module.__name__]
    named = [(getattr(cls, "name", None), cls) for cls in classes if is_dataclass(cls)]
    return {name: cls for name, cls in named if isinstance(name, str) and callable(getattr(cls, "apply", None))}


def _items(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    position = 0
    while True:
        match = _NAME.match(text, position)
        if not match:
            raise _malformed(text, position, "a pass name")
        position = match.end()
        options: dict[str, str] = {}
        if position < len(text) and text[position] == "{":
            options, position = _options(text, position + 1)
        yield match[1], options
        position = _skip(text, position)
        if position == len(text):
            return
        if text[position] != ",":
            raise _malformed(text, position, "a comma")
        position += 1


def _options(text: str, position: int) -> tuple[dict[str, str], int]:
    options: dict[str, str] = {}
    position = _skip(text, position)
    while position < len(text) and text[position] != "}":
        match = _NAME.match(text, position)
        if not match or match.end() >= len(text) or text[match.end()] != "=":
            raise _malformed(text, position, "option=value")
        if match[1] in options:
            raise OptionError(f"pipeline text: option {match[1]!r} is given twice", where=text, remedy="remove one")
        value, position = _value(text, match.end() + 1)
        options[match[1]] = value
        position = _skip(text, position)
        if position < len(text) and text[position] == ",":
            position = _skip(text, position + 1)
        elif position < len(text) and text[position] != "}":
            raise _malformed(text, position, "a comma or }")
    if position >= len(text):
        raise _malformed(text, position, "}")
    return options, position + 1


def _value(text: str, position: int) -> tuple[str, int]:
    """A value as written: quoted, or up to the next comma or brace outside brackets and quotes."""
    position = _skip(text, position)
    if quoted := _QUOTED.match(text, position):
        return _unquoted(quoted[0]), quoted.end()
    start, depth = position, 0
    while position < len(text) and (depth > 0 or text[position] not in ",}"):
        if quoted := _QUOTED.match(text, position):
            position = quoted.end()
            continue
        depth += (text[position] in "[(") - (text[position] in "])")
        position += 1
    if depth:
        raise _malformed(text, position, "]")
    return text[start:position].strip(), position


def _unquoted(text: str) -> str:
    quoted = _QUOTED.fullmatch(text)
    return re.sub(r"\\(.)", r"\1", quoted[1], flags=re.DOTALL) if quoted else text


def _list_items(text: str) -> list[str]:
    """The items of ``[a,"b,c",d]``; the brackets may be left out for plain items."""
    inner = text.strip()
    if inner[:1] + inner[-1:] in ("[]", "()"):
        inner = inner[1:-1]
    written = [match["quoted"] or match["plain"].strip() for match in _ITEM.finditer(inner)]
    return [_unquoted(item) for item in written if item]


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _malformed(text: str, position: int, expected: str) -> OptionError:
    return OptionError(
        f"pipeline text: expected {expected} at column {position + 1}",
        where=f"{text}\n     {' ' * position}^",
        remedy="the form is name{option=value,option2=value},name2",
    )


def _read(text: str, kind: Any, where: str) -> Any:
    """A value of type ``kind`` from its text."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if type(None) in arguments and text in ("none", "None"):
            return None
        return _read_first(text, [item for item in arguments if item is not type(None)], where)
    if origin is Literal:
        matching = [item for item in arguments if str(item) == text]
        if matching:
            return matching[0]
        remedy = f"{_suggest(text, [str(item) for item in arguments])}one of {', '.join(map(str, arguments))}"
        raise OptionError(f"{where}: {text!r} is not understood", remedy=remedy)
    if origin in (tuple, list, Sequence) or kind is tuple:
        item_kind = arguments[0] if arguments else str
        return tuple(_read(item, item_kind, where) for item in _list_items(text))
    if kind is bool:
        if text.lower() in ("true", "yes", "1", "on", "false", "no", "0", "off"):
            return text.lower() in ("true", "yes", "1", "on")
        raise OptionError(f"{where}: {text!r} is not true or false")
    try:
        return {int: int, float: float, str: str}.get(kind, kind)(text)
    except (TypeError, ValueError) as error:
        name = getattr(kind, "__name__", str(kind))
        raise OptionError(f"{where}: {text!r} is not of type {name}", remedy=str(error)) from error


def _read_first(text: str, kinds: Sequence[Any], where: str) -> Any:
    for kind in kinds[:-1]:
        try:
            return _read(text, kind, where)
        except OptionError:
            continue
    return _read(text, kinds[-1], where)


def _show(value: object) -> str:
    if isinstance(value, tuple | list):
        return f"[{','.join(_show(item) for item in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    text = "none" if value is None else str(value)
    if re.fullmatch(r"[^\s,{}\[\]()\"\\]+", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _suggest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}? " if close else ""
