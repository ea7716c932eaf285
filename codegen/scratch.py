"""Give the internal buffers of a compiled region fixed addresses in a scratch arena.

rewrite: ``buf3 = empty_strided_cpu((8, 4), (4, 1), torch.float32)``
      -> ``buf3 = reinterpret_tensor(_scratch_float32, (8, 4), (4, 1), 64)``

Only buffers that cannot leave the region are moved: neither inputs nor outputs, and never touched by an op that may
return a view of what it reads.
"""

from __future__ import annotations

import ast
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..cost_model.region_memory import RegionBuffer, RegionMemory

ALIGNMENT = 64


class Arenas(Protocol):
    """Where a region's wrapper takes an arena from, and gives it back to."""

    def take(self) -> torch.Tensor: ...

    def give(self, arena: torch.Tensor) -> None: ...


@dataclass(frozen=True)
class ScratchLayout:
    """Offsets in bytes of the moved buffers, and the arena's height."""

    offsets: Mapping[str, int]
    height: int


def layout(buffers: Sequence[RegionBuffer], limit: int) -> ScratchLayout:
    """Place as many buffers as fit below ``limit`` bytes: largest first, each at the lowest address that is free while
    it lives. First-fit by decreasing size is within a few percent of optimal for the few dozen buffers of a region."""
    placed: list[tuple[RegionBuffer, int, int]] = []
    for buffer in sorted(buffers, key=lambda item: (-item.bytes, item.first, item.name)):
        size = -(-buffer.bytes // ALIGNMENT) * ALIGNMENT
        offset = 0
        for other, begin, end in sorted(placed, key=lambda item: item[1]):
            if other.first <= buffer.last and buffer.first <= other.last:
                if offset + size <= begin:
                    break
                offset = max(offset, end)
        if offset + size <= limit:
            placed.append((buffer, offset, offset + size))
    return ScratchLayout(
        {buffer.name: begin for buffer, begin, _ in placed}, max((end for *_, end in placed), default=0)
    )


def movable(memory: RegionMemory, source: str) -> list[RegionBuffer]:
    """Internal buffers that the wrapper allocates itself and that cannot escape from it."""
    call = _call(source)
    if call is None:
        return []
    allocated = {name for name, _ in _allocations(call)}
    exposed = _exposed(call)
    return [
        buffer
        for buffer in memory.buffers
        if buffer.bytes > 0 and not buffer.values and buffer.name in allocated and buffer.name not in exposed
    ]


def use_scratch(function: types.FunctionType, source: str, moved: ScratchLayout, pool: Arenas) -> types.FunctionType:
    """The wrapper's ``call`` with moved allocations; ``source`` is the text of its module."""
    call = _call(source)
    assert call is not None
    dtypes: dict[str, None] = {}
    for statement in ast.walk(call):
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            name = statement.targets[0].id
            if name in moved.offsets and _is_allocation(statement.value):
                allocation = statement.value
                assert isinstance(allocation, ast.Call)
                dtype = ast.unparse(allocation.args[2]).removeprefix("torch.")
                dtypes[dtype] = None
                offset = moved.offsets[name] // getattr(torch, dtype).itemsize
                statement.value = _expression(
                    f"reinterpret_tensor(_scratch_{dtype}, {ast.unparse(allocation.args[0])}, "
                    f"{ast.unparse(allocation.args[1])}, {offset})"
                )
    opening = ["_arena = _effcc_scratch.take()", *(f"_scratch_{d} = _arena.view(torch.{d})" for d in dtypes)]
    # Views of the arena are dropped before it is handed to somebody else.
    closing = [f"del {', '.join(f'_scratch_{d}' for d in dtypes)}", "_effcc_scratch.give(_arena)"]
    body = call.body
    last = body[-1]
    assert isinstance(last, ast.Return)
    result = _statements(f"_result = {ast.unparse(last.value) if last.value else 'None'}")
    ending = [*result, *_statements("\n".join(closing)), *_statements("return _result", wrap=True)]
    call.body = [*_statements("\n".join(opening)), *body[:-1], *ending]
    module = ast.Module(body=[call], type_ignores=[])
    scope: dict[str, Any] = {}
    exec(compile(ast.fix_missing_locations(module), "<effcc scratch>", "exec"), function.__globals__, scope)
    made: types.FunctionType = scope["call"]
    return made


def call_function(run: Any) -> tuple[types.FunctionType, Any] | None:
    """The generated function behind a compiled region and its ``self``, or None if torch has wrapped it."""
    current = getattr(run, "current_callable", None)
    if isinstance(current, types.MethodType) and isinstance(current.__func__, types.FunctionType):
        return current.__func__, current.__self__
    return None


def _call(source: str) -> ast.FunctionDef | None:
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and node.name == "call"]
    if not found or not isinstance(found[-1].body[-1], ast.Return):
        return None
    return found[-1]


def _is_allocation(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "empty_strided_cpu"


def _allocations(call: ast.FunctionDef) -> list[tuple[str, ast.expr]]:
    return [
        (statement.targets[0].id, statement.value)
        for statement in ast.walk(call)
        if isinstance(statement, ast.Assign)
        and isinstance(statement.targets[0], ast.Name)
        and _is_allocation(statement.value)
    ]


def _exposed(call: ast.FunctionDef) -> set[str]:
    """Buffers that an op of unknown aliasing reads, under any of their names."""
    alias: dict[str, str] = {}
    exposed: set[str] = set()
    for statement in ast.walk(call):
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            target, value = statement.targets[0].id, statement.value
            if isinstance(value, ast.Name):
                alias[target] = value.id
            elif isinstance(value, ast.Call):
                name = ast.unparse(value.func)
                if name == "reinterpret_tensor" and isinstance(value.args[0], ast.Name):
                    alias[target] = value.args[0].id
                elif not _is_allocation(value) and not _returns_fresh(name):
                    exposed |= {item.id for item in ast.walk(value) if isinstance(item, ast.Name)}
    names = set(exposed)
    for name in exposed:
        while name in alias:
            name = alias[name]
            names.add(name)
    return names


def _returns_fresh(name: str) -> bool:
    """Whether an op (``torch.ops.aten.cumsum.default``) surely returns memory of its own."""
    if not name.startswith("torch.ops."):
        return False
    found: Any = torch.ops
    for part in name.split(".")[2:]:
        found = getattr(found, part, None)
    schema = getattr(found, "_schema", None)
    return schema is not None and all(result.alias_info is None for result in schema.returns)


def _expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _statements(text: str, wrap: bool = False) -> list[ast.stmt]:
    if wrap:
        body = ast.parse(f"def f():\n    {text}").body[0]
        assert isinstance(body, ast.FunctionDef)
        return body.body
    return list(ast.parse(text).body)
