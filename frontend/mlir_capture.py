"""What ``capture`` gives for a ``.mlir`` file: its functions as graphs, with the memory of the parameters they name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from typing import Any

from ..errors import CaptureError, OptionError
from ..ir.graph import Graph
from ..ir.types import DTYPES, TensorType
from .capture import Captured, CapturedFrame
from .collect import with_paths
from .fx_import import from_fx
from .inputs import InputSpec
from .mlir_import import MlirFunction, read_mlir
from .model_file import ModelSpec
from .state import OPTIMIZERS, StateBytes, StateEntry, optimizer_name
from .target_device import rewrite_device

__all__ = ["capture_mlir"]


def capture_mlir(
    spec: ModelSpec, *, train: bool, optimizer: Any, dtype: Any, dynamic: bool | None, device: str
) -> Captured:
    """Arguments as of ``capture``. Raises OptionError for what does not apply to a finished graph, and what
    ``read_mlir`` raises."""
    assert spec.mlir is not None
    if dtype is not None or dynamic:
        raise OptionError(
            f"{spec.mlir.name} is a finished graph: its dtypes and sizes are fixed",
            remedy="Leave --dtype and --dynamic out, or plan the Python model.",
        )
    functions = {function.name: function for function in read_mlir(spec.mlir)}
    backwards = {name: function for name, function in functions.items() if name.startswith("backward")}
    if train and not backwards:
        raise CaptureError(
            f"{spec.mlir.name} holds no backward",
            where=str(spec.mlir),
            remedy="Emit it with `effcc plan --train --emit mlir`, or plan it without --train.",
        )
    frames = []
    for name, function in functions.items():
        if name in backwards:
            continue
        backward = backwards.get(name.replace("forward", "backward", 1)) if name.startswith("forward") else None
        frames.append(_frame(function, backward if train else None, device))
    key = optimizer_name(optimizer) if train else "none"
    return Captured(
        name=spec.name,
        train=train,
        frames=tuple(frames),
        state=StateBytes(tuple(_state(frames, train, OPTIMIZERS[key]))),
        inputs=tuple(
            InputSpec(node.name, node.type)
            for frame in frames
            for node in frame.forward.inputs
            if node.role == "input" and isinstance(node.type, TensorType)
        ),
        optimizer="" if key == "none" else key,
        notes=("made from MLIR: it matches no torch.compile of the Python model",),
    )


def _frame(forward: MlirFunction, backward: MlirFunction | None, device: str) -> CapturedFrame:
    phase = "inference" if backward is None else "forward"
    saved = 0 if backward is None else sum(role not in ("tangent", "seed") for role in backward.roles)
    graph = _graph(forward, phase, saved, device)
    return CapturedFrame(
        dynamo=replace(graph, phase="joint", saved=0),
        forward=graph,
        backward=None if backward is None else _graph(backward, "backward", 0, device),
        names=_names(forward),
    )


def _graph(function: MlirFunction, phase: str, saved: int, device: str) -> Graph:
    graph = from_fx(function.gm, function.name, phase, roles=function.roles, saved=saved)
    return rewrite_device(with_paths(graph, _names(function)), device)


def _names(function: MlirFunction) -> dict[str, str]:
    """Input -> path of the parameter or buffer that it is."""
    inputs = (node.name for node in function.gm.graph.find_nodes(op="placeholder"))
    return {name: path for name, path in zip(inputs, function.paths, strict=True) if path}


def _state(frames: list[CapturedFrame], train: bool, state: Callable[..., int]) -> Iterator[StateEntry]:
    """Parameters and buffers that the functions name; every parameter counts as trained."""
    seen = set()
    for frame in frames:
        for node in frame.forward.inputs:
            kind, path = node.type, frame.names.get(node.name, "")
            if node.role not in ("parameter", "buffer") or not isinstance(kind, TensorType) or path in seen:
                continue
            seen.add(path)
            shape = tuple(int(size) for size in kind.shape)
            element = kind.element_bytes
            sizes = {node.role: prod(shape) * element}
            if train and node.role == "parameter":
                sizes |= {"gradient": prod(shape) * element, "optimizer": state(shape, element)}
            for what, size in sizes.items():
                if size:
                    yield StateEntry(what, path, size, path.rpartition(".")[0], DTYPES[kind.dtype][0], shape)
