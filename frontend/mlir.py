"""``effcc plan --emit mlir``: the captured graphs in torch-mlir's ``torch`` dialect, and lowered to ``linalg``.

Each graph is a function: ``inference_0``, or ``forward_0`` and ``backward_0``, one for every graph that Dynamo makes.
The ``torch`` dialect file can be the input of ``effcc plan`` (``mlir_import``): ops keep their source lines as MLIR
locations, and a function's arguments say what they are (``parameter model.embed.weight``) in theirs.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ExportError, MissingExtraError, OutputError
from .capture import Traced, trace
from .model_file import load_model_file
from .without_weights import Weightless

__all__ = ["EmittedMlir", "emit_mlir", "torch_mlir"]

_AT = re.compile(r'"([^"]+)":(\d+)')
_FAILED_OP = re.compile(r"failed to legalize operation '([\w.]+)'(?:.*?name = \"([\w.]+)\")?", re.DOTALL)


def torch_mlir(what: str) -> Any:
    """The package torch-mlir. Raises MissingExtraError where it is not installed."""
    try:
        import torch_mlir.fx
    except ImportError as error:
        raise MissingExtraError(
            f"{what} needs torch-mlir, which is not installed ({error})",
            remedy='Install the extra: pip install "effcc[mlir]" (about 80 MB).',
        ) from None
    return torch_mlir


@dataclass(frozen=True)
class EmittedMlir:
    """The files written. ``not_lowered``: the functions that torch-mlir cannot lower to ``linalg``, and why."""

    torch_dialect: Path
    linalg: Path | None
    not_lowered: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        files = [str(path) for path in (self.torch_dialect, self.linalg) if path is not None]
        return ", ".join(files) + "".join(f" ({name} not in linalg: {why})" for name, why in self.not_lowered)


def emit_mlir(
    model: str, output: Path, train: bool, *, dtype: str | None = None, dynamic: bool | None = None
) -> EmittedMlir:
    """Capture a model file again with torch-mlir's decompositions, and write ``output`` with the suffixes ``.mlir``
    (torch dialect) and ``.linalg.mlir``.

    Repeated modules are written out, attention is decomposed, and mutated inputs (the statistics of a batch norm) come
    first among the outputs: both dialects lack these. A function that torch-mlir
    does not lower is left out of the second file and named in the result.

    Raises MissingExtraError without torch-mlir, ExportError for a graph that has no form in the torch dialect, and what
    ``capture`` raises.
    """
    torch_mlir("--emit mlir")
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch_mlir.extras.fx_decomp_util import get_decomposition_table

    with Weightless().building():
        spec = load_model_file(model)
    with sdpa_kernel(SDPBackend.MATH):
        traced = trace(
            spec,
            train=train,
            dtype=dtype,
            dynamic=dynamic,
            decompositions=get_decomposition_table(),
            share_repeated=False,
            writes_inputs=False,
        )
    functions = dict(_functions(traced))
    module = _import(functions)
    torch_dialect, linalg = output.with_suffix(".mlir"), output.with_suffix(".linalg.mlir")
    _write(torch_dialect, module.operation.get_asm(enable_debug_info=True))
    lowered, why_not = _lower(functions)
    not_lowered: dict[str, str] = {}
    if why_not:
        alone = {name: _lower({name: function})[1] for name, function in functions.items()}
        not_lowered = {name: why for name, why in alone.items() if why}
        rest = {name: function for name, function in functions.items() if name not in not_lowered}
        lowered = _lower(rest)[0] if rest else ""
    if lowered:
        _write(linalg, lowered)
    return EmittedMlir(torch_dialect, linalg if lowered else None, tuple(not_lowered.items()))


@dataclass(frozen=True)
class _Function:
    """A graph without outputs that are None, and what each of its inputs is."""

    graph: torch.fx.Graph
    inputs: tuple[str, ...]


def _functions(traced: Traced) -> Iterator[tuple[str, _Function]]:
    backend = traced.backend
    for module, (_, forward, backward, names) in zip(backend.modules, backend.frames, strict=True):
        first = module.inference if module.inference is not None else module.forward
        for gm, graph in ((first, forward), (module.backward, backward)):
            if gm is not None and graph is not None:
                inputs = (f"{node.role} {names.get(node.name, node.name)}" for node in graph.inputs)
                yield graph.name, _Function(_without_none(gm.graph), tuple(inputs))


def _without_none(graph: torch.fx.Graph) -> torch.fx.Graph:
    copied = torch.fx.Graph()
    outputs = copied.graph_copy(graph, val_map={})
    returned = outputs if isinstance(outputs, tuple | list) else (outputs,)
    copied.output(tuple(value for value in returned if value is not None))
    return copied


def _import(functions: dict[str, _Function]) -> Any:
    """One module of the torch dialect with all functions."""
    from torch_mlir import ir
    from torch_mlir.dialects import torch as dialect
    from torch_mlir.extras.fx_importer import FxImporter

    context = ir.Context()
    dialect.register_dialect(context)
    importer = FxImporter(context=context)
    for name, function in functions.items():
        try:
            made = importer.import_stateless_graph(function.graph, func_name=name)
        except Exception as error:  # the importer raises whatever its unsupported case happens to be
            raise ExportError(
                f"{name} has no form in the torch dialect: {type(error).__name__}: {error}",
                remedy="torch-mlir does not import some op or type of this model; plan it without --emit.",
            ) from error
        for argument, what in zip(made.regions[0].blocks[0].arguments, function.inputs, strict=True):
            argument.set_location(ir.Location.name(what, context=context))
    return importer.module


def _lower(functions: dict[str, _Function]) -> tuple[str, str]:
    """The functions as a module of the linalg dialect, or "" and why torch-mlir does not lower them."""
    from torch_mlir.compiler_utils import (
        OutputType,
        TorchMlirCompilerError,
        lower_mlir_module,
        run_pipeline_with_repro_report,
    )

    module = _import(functions)
    complaints: list[str] = []

    def note(diagnostic: Any) -> bool:
        complaints.append(f"{diagnostic.location} {diagnostic.message}")
        return True

    to_backend = "func.func(torch-match-quantized-custom-ops), torchdynamo-export-to-torch-backend-pipeline"
    handler = module.context.attach_diagnostic_handler(note)
    try:
        # What torch-mlir prints before it raises has been noted already.
        with contextlib.redirect_stderr(io.StringIO()):
            run_pipeline_with_repro_report(module, f"builtin.module({to_backend})", "the torch backend contract")
            lowered = lower_mlir_module(False, OutputType.LINALG_ON_TENSORS, module)
    except TorchMlirCompilerError:
        return "", _reason(complaints)
    finally:
        handler.detach()
    return str(lowered.operation.get_asm(enable_debug_info=False)), ""


def _reason(complaints: list[str]) -> str:
    """``torch-mlir does not lower aten.foo (model.py:88)``, from the diagnostics of a failed pipeline."""
    for text in complaints:
        if found := _FAILED_OP.search(text):
            op = (found[2] or found[1]).removeprefix("torch.")
            places = _AT.findall(text[: found.start()])
            return f"torch-mlir does not lower {op}" + (
                f" ({Path(places[0][0]).name}:{places[0][1]})" if places else ""
            )
    return f"torch-mlir's lowering failed{': ' + complaints[0][-200:] if complaints else ''}"


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}", where=str(path)) from None
