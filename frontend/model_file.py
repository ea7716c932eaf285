"""Model files: a Python file that offers a model to be planned.

``FILE.py`` offers ``model`` and ``example_inputs``, each an object or a function without arguments;
``example_inputs`` is a tuple of positional arguments or a dict of keyword arguments. Optional:

    loss        function (outputs) -> scalar, or (outputs, *targets) with a ``targets`` tuple or function beside it
    optimizer   a name ("adamw"), a torch.optim class, or a function (parameters) -> optimizer
    autocast    a dtype or its name: the forward runs under autocast with it

``FILE.py:gpt2`` takes the model from the name ``gpt2``: a module, a function that makes one, or an object or class
with the attributes above. Inputs are then looked up as ``gpt2_inputs``, then ``example_inputs``; likewise
``gpt2_loss`` and so on.
KernelBench's convention works as it is: ``class Model``, ``get_inputs()`` and ``get_init_inputs()``.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch

from ..errors import ModelFileError
from .quiet import quiet

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

_CONVENTION = (
    "Offer `model` (a torch.nn.Module or a function that returns one) and `example_inputs` "
    "(a tuple of arguments or a dict of keyword arguments, or a function that returns one)."
)


@dataclass(frozen=True)
class ModelSpec:
    """What a model file offers. ``build_model`` and ``example_inputs`` make new objects at each call where the file
    offers functions; call them inside ``Weightless.building()`` to allocate nothing. ``sources`` are the files read."""

    name: str
    build_model: Callable[[], torch.nn.Module]
    example_inputs: Callable[[], Inputs]
    loss: Callable[..., Any] | None = None
    targets: Callable[[], tuple[Any, ...]] | None = None
    optimizer: Any = None
    autocast: torch.dtype | None = None
    sources: tuple[Path, ...] = ()
    #: Instead of a Python file, one in MLIR's ``torch`` dialect.
    mlir: Path | None = None


def load_model_file(spec: str) -> ModelSpec:
    """``FILE.py``, ``FILE.py:name`` or ``FILE.mlir``. A Python file is executed; do it inside ``Weightless.building()``
    when its module level builds the model. Raises ModelFileError for everything that can be wrong with it."""
    path, name = _split(spec)
    if path.suffix == ".mlir":
        return ModelSpec(path.stem, lambda: _not_python(path), lambda: _not_python(path), sources=(path,), mlir=path)
    with quiet():
        module = _execute(path)
    offered: Any = module
    if name:
        if not hasattr(module, name):
            raise ModelFileError(
                f"{path.name} has no {name!r}", where=str(path), remedy=f"It offers: {_names(module)}."
            )
        offered = getattr(module, name)
    found = _find(module, offered, name, path)
    return ModelSpec(name=name or path.stem, sources=(path,), **found)


def _not_python(path: Path) -> NoReturn:
    raise ModelFileError(f"{path.name} is a graph in MLIR: it can be planned, not run", where=str(path))


def _split(spec: str) -> tuple[Path, str]:
    text, colon, name = spec.rpartition(":")
    if not colon or not name.isidentifier() or not text.endswith(".py"):
        text, name = spec, ""
    path = Path(text).expanduser()
    if path.is_dir():
        raise ModelFileError(f"{text} is a directory, not a model file", remedy="Name a .py file in it.")
    if not path.exists():
        raise ModelFileError(f"model file {text} does not exist", where=str(path.absolute()), remedy=_CONVENTION)
    if path.suffix not in (".py", ".mlir"):
        raise ModelFileError(f"{text} is not a Python file", where=str(path.absolute()), remedy=_CONVENTION)
    return path.absolute(), name


def _execute(path: Path) -> ModuleType:
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path.name} cannot be read: {error}", where=str(path)) from None
    identity = f"effcc_model_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    loader_spec = importlib.util.spec_from_file_location(identity, path)
    assert loader_spec is not None
    module = importlib.util.module_from_spec(loader_spec)
    with _errors_in(path, "while it was loaded"):
        code = compile(source, str(path), "exec")
    sys.modules[identity] = module
    sys.path.insert(0, str(path.parent))
    try:
        with _errors_in(path, "while it was loaded"):
            exec(code, module.__dict__)
    except BaseException:
        sys.modules.pop(identity, None)
        raise
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(path.parent))
    return module


@contextlib.contextmanager
def _errors_in(path: Path, when: str) -> Iterator[None]:
    """Whatever the user's file raises, as a ModelFileError with the user's own line."""
    try:
        yield
    except ModelFileError:
        raise
    except SyntaxError as error:
        place = f"{error.filename or path}:{error.lineno}"
        text = (error.text or "").strip()
        raise ModelFileError(
            f"{path.name} is not valid Python: {error.msg}", where=f'{place} "{text}"' if text else place
        ) from None
    except (Exception, SystemExit) as error:
        raise ModelFileError(
            f"{path.name} failed {when}: {_last_line(error)}",
            where=_place(error, path),
            remedy="The file must run by itself: python " + str(path),
        ) from error


def _last_line(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip()


def _place(error: BaseException, path: Path) -> str:
    """The last line of the user's file that the exception passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename) == path]
    if not own:
        return str(path)
    return f'{path}:{own[-1].lineno} "{own[-1].line}"'


def _find(module: ModuleType, offered: Any, name: str, path: Path) -> dict[str, Any]:
    if inspect.isclass(offered) and not issubclass(offered, torch.nn.Module):
        with _errors_in(path, f"while {name} was made"):
            offered = offered()
    if not name and not hasattr(module, "model") and hasattr(module, "Model"):
        return _kernelbench(module, path)
    if isinstance(offered, torch.nn.Module) or not (hasattr(offered, "model") or hasattr(offered, "build_model")):
        model = offered if name else None
        lookup = [(module, f"{name}_"), (module, "")]
    else:
        model = getattr(offered, "model", None) or offered.build_model
        lookup = [(offered, ""), (module, f"{name}_"), (module, "")] if name else [(offered, "")]
    if model is None:
        raise ModelFileError(f"{path.name} offers no model", where=str(path), remedy=_CONVENTION)

    def option(key: str) -> Any:
        for place, prefix in lookup:
            if hasattr(place, prefix + key):
                return getattr(place, prefix + key)
        return None

    inputs = option("inputs") if name and option("inputs") is not None else option("example_inputs")
    if inputs is None:
        raise ModelFileError(f"{path.name} offers no example_inputs", where=str(path), remedy=_CONVENTION)
    loss, targets = option("loss"), option("targets")
    if loss is not None and not callable(loss):
        raise ModelFileError(f"`loss` is {type(loss).__name__}, not a function", where=str(path))
    return {
        "build_model": lambda: _model(model, path),
        "example_inputs": lambda: _inputs(inputs, path),
        "loss": loss,
        "targets": None if targets is None else lambda: _targets(targets, path),
        "optimizer": option("optimizer"),
        "autocast": _autocast(option("autocast"), path),
    }


def _kernelbench(module: ModuleType, path: Path) -> dict[str, Any]:
    for function in ("get_inputs", "get_init_inputs"):
        if not callable(getattr(module, function, None)):
            raise ModelFileError(
                f"{path.name} has a class Model but no function {function}()", where=str(path), remedy=_CONVENTION
            )

    def build() -> Any:
        arguments = module.get_init_inputs()
        if isinstance(arguments, Mapping):
            return module.Model(**arguments)
        positional, keywords = _split_init(arguments)
        return module.Model(*positional, **keywords)

    return {
        "build_model": lambda: _model(build, path),
        "example_inputs": lambda: _inputs(lambda: tuple(module.get_inputs()), path),
    }


def _split_init(arguments: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """KernelBench also writes ``[args, {kwargs}]``: a list and a dict."""
    arguments = list(arguments)
    if len(arguments) == 2 and isinstance(arguments[0], list | tuple) and isinstance(arguments[1], dict):
        return tuple(arguments[0]), dict(arguments[1])
    return tuple(arguments), {}


def _model(model: Any, path: Path) -> torch.nn.Module:
    if not isinstance(model, torch.nn.Module):
        if not callable(model):
            raise ModelFileError(
                f"the model is {type(model).__name__}, neither a torch.nn.Module nor a function",
                where=str(path),
                remedy=_CONVENTION,
            )
        with _errors_in(path, "while the model was built"):
            model = model()
    if not isinstance(model, torch.nn.Module):
        raise ModelFileError(
            f"the model function returned {type(model).__name__}, not a torch.nn.Module",
            where=str(path),
            remedy=_CONVENTION,
        )
    return model


def _inputs(inputs: Any, path: Path) -> Inputs:
    if callable(inputs):
        with _errors_in(path, "while the example inputs were made"):
            inputs = inputs()
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, list | tuple):
        return tuple(inputs), {}
    raise ModelFileError(
        f"example_inputs is {type(inputs).__name__}, neither a tuple nor a dict", where=str(path), remedy=_CONVENTION
    )


def _targets(targets: Any, path: Path) -> tuple[Any, ...]:
    if callable(targets):
        with _errors_in(path, "while the targets were made"):
            targets = targets()
    return tuple(targets) if isinstance(targets, list | tuple) else (targets,)


def parse_dtype(name: str | torch.dtype) -> torch.dtype | None:
    """``bf16``, ``bfloat16``, ``torch.bfloat16`` or the dtype itself; None if it is none."""
    from ..ir.types import DTYPES

    if isinstance(name, torch.dtype):
        return name
    name = name.removeprefix("torch.")
    found = getattr(torch, DTYPES[name][0] if name in DTYPES else name, None)
    return found if isinstance(found, torch.dtype) else None


def _autocast(value: Any, path: Path) -> torch.dtype | None:
    if value is None or value is False:
        return None
    found = torch.bfloat16 if value is True else parse_dtype(value) if isinstance(value, str | torch.dtype) else None
    if found is None or not found.is_floating_point:
        raise ModelFileError(
            f"`autocast` is {value!r}, not a floating-point dtype",
            where=str(path),
            remedy='Write torch.bfloat16 or "bf16".',
        )
    return found


def _names(module: ModuleType) -> str:
    modules = [name for name, value in vars(module).items() if isinstance(value, ModuleType)]
    public = [name for name in vars(module) if not name.startswith("_") and name not in modules]
    return ", ".join(sorted(public)[:20]) or "nothing"
