"""What the lowering of cascades raises."""

from __future__ import annotations

from ...errors import EffccError


class NotLowerable(EffccError):  # a verdict, not a failure: the caller falls back
    """A cascade has no tile program here. ``message`` is the reason; the caller leaves its ops as they are."""

    def __init__(self, reason: str, *, where: str = "") -> None:
        super().__init__(f"not lowered to a tile program: {reason}", where=where)
        self.reason = reason
