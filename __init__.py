"""effcc: a graph compiler and scheduler for PyTorch.

``torch.compile(model, backend="effcc", options={...})``, or ``effcc.compile(model, ...)``, compiles and runs;
``effcc.train_step`` trains a model that does not fit; ``effcc.plan`` predicts memory and time on any device;
``effcc.reports`` tells what was compiled, what fell back and what it took; ``effcc.explain`` says the same in words.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import EffccError
    from .ir.plan_file import load_plan
    from .options import Options
    from .planning import plan
    from .public import Explanation, compile, explain, train_step
    from .runtime.reports import reports
    from .runtime.reports import reset as reset_reports

__version__ = "0.1.0"

__all__ = [
    "EffccError",
    "Explanation",
    "Options",
    "__version__",
    "compile",
    "explain",
    "load_plan",
    "plan",
    "reports",
    "reset_reports",
    "train_step",
]

#: Public name -> (module, name in it). Imported on first use: commands that never run a model need not load torch.
_PLACES = {
    "EffccError": ("errors", "EffccError"),
    "Explanation": ("public", "Explanation"),
    "Options": ("options", "Options"),
    "compile": ("public", "compile"),
    "explain": ("public", "explain"),
    "load_plan": ("ir.plan_file", "load_plan"),
    "plan": ("planning", "plan"),
    "reports": ("runtime.reports", "reports"),
    "reset_reports": ("runtime.reports", "reset"),
    "train_step": ("public", "train_step"),
}


def __getattr__(name: str) -> Any:
    place = _PLACES.get(name)
    if place is None:
        raise AttributeError(f"module 'effcc' has no attribute {name!r}")
    module, attribute = place
    return getattr(import_module(f".{module}", __name__), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
