"""Which handler lowers which op. A handler takes the program and a ``Call``, and returns a value or a tuple of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from .calls import Call
from .program import Program

Handler: TypeAlias = Callable[[Program, Call], Any]

#: Op without its overload (``aten.mm``), or with it where only that one is meant -> handler.
HANDLERS: dict[str, Handler] = {}


def lowers(*ops: str) -> Callable[[Handler], Handler]:
    """Register a handler for ATen ops, with or without their overload, or for ops of ``prims``."""

    def register(handler: Handler) -> Handler:
        for op in ops:
            HANDLERS[op if op.startswith("prims.") else f"aten.{op}"] = handler
        return handler

    return register


def handler_of(op: str) -> Handler | None:
    found = HANDLERS.get(op)
    return found if found is not None else HANDLERS.get(op.rpartition(".")[0])
