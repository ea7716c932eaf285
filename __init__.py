"""effcc: a graph compiler and scheduler for PyTorch."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

__all__ = ["Options", "compile", "reports", "reset_reports"]


def __getattr__(name: str) -> Any:
    # Imported on first use, so that commands that never run a model need not load torch.
    if name == "Options":
        from .options import Options

        return Options
    if name == "reports":
        from .runtime.reports import reports

        return reports
    if name == "reset_reports":
        from .runtime.reports import reset

        return reset
    if name == "compile":
        from .backend import compile_model

        return compile_model
    raise AttributeError(f"module 'effcc' has no attribute {name!r}")
