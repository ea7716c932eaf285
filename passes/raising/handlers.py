"""All handlers, registered by being imported."""

from __future__ import annotations

from . import (
    lower_attention,
    lower_contractions,
    lower_indexing,
    lower_losses,
    lower_norms,
    lower_pointwise,
    lower_reductions,
    lower_views,
)
from .registry import HANDLERS, handler_of

__all__ = [
    "HANDLERS", "handler_of", "lower_attention", "lower_contractions", "lower_indexing", "lower_losses", "lower_norms",
    "lower_pointwise", "lower_reductions", "lower_views",
]  # fmt: skip
