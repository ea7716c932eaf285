"""Parameters of a model on the meta device, read from a checkpoint one at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ... import torch_internals
from ...errors import OutputError, TrainStepError
from ...formatting import first_line
from ..host_tier import extent, laid_out
from ..swap_file import memory_at
from . import optimizers

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class _Place:
    """Where a tensor's elements are."""

    file: Path
    offset: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]


class Checkpoint:
    """Tensors of a file, or of a folder with several: what ``torch.save`` wrote of a state dict, or safetensors.

    Raises TrainStepError for a path that is neither.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        #: What a safetensors file says besides its tensors.
        self.metadata: dict[str, str] = {}
        self.places: dict[str, _Place] = {}
        #: What had to be read whole: torch's format before zip files.
        self.read_whole: dict[str, torch.Tensor] = {}
        try:
            if self.path.is_dir():
                files = sorted(self.path.glob("*.safetensors"))
                if not files:
                    raise self._unreadable("the folder has no .safetensors files")
                for file in files:
                    self._open_safetensors(file)
            elif self.path.suffix == ".safetensors":
                self._open_safetensors(self.path)
            else:
                self._open_torch()
        except OSError as error:
            raise self._unreadable(error.strerror or str(error)) from error

    def _unreadable(self, why: str) -> TrainStepError:
        return TrainStepError(
            f"the checkpoint cannot be read: {why}",
            where=str(self.path),
            remedy="Give a file that torch.save made of a state dict, a .safetensors file, or a folder of those.",
        )

    def _open_torch(self) -> None:
        found = self._state_dict(self.path, "meta")
        offsets = {name: torch_internals.record_offset(value) for name, value in found.items()}
        if None in offsets.values():
            self.read_whole = self._state_dict(self.path, "cpu")
            return
        for name, value in found.items():
            begin = (offsets[name] or 0) + int(value.storage_offset()) * value.element_size()
            self.places[name] = _Place(self.path, begin, value.dtype, value.size(), value.stride())

    def _state_dict(self, file: Path, device: str) -> dict[str, torch.Tensor]:
        try:
            found = torch.load(file, map_location=device, weights_only=True)
        except (OSError, MemoryError):  # not the file's fault
            raise
        except Exception as error:  # whatever pickle and zip readers raise for a file that is something else
            raise self._unreadable(first_line(error)) from error
        if isinstance(found, dict) and isinstance(found.get("model"), dict):
            found = found["model"]  # what TrainStep.state_dict gives
        if not isinstance(found, dict):
            raise self._unreadable(f"it holds {type(found).__name__}, not a state dict")
        return {str(name): value for name, value in found.items() if isinstance(value, torch.Tensor)}

    def _open_safetensors(self, file: Path) -> None:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= file.stat().st_size - 8:
                raise self._unreadable(f"{file.name} has no safetensors header")
            try:
                header: dict[str, Any] = json.loads(stream.read(length))
            except ValueError as error:
                raise self._unreadable(f"{file.name} has a damaged header") from error
        for name, entry in header.items():
            if name == "__metadata__":
                self.metadata |= entry
                continue
            begin, end = entry["data_offsets"]
            if entry["dtype"] not in _DTYPES or 8 + length + end > file.stat().st_size:
                raise self._unreadable(f"{name} in {file.name} is of an unknown dtype or cut short")
            shape = torch.Size(entry["shape"])
            stride = torch.empty(shape, device="meta").stride()
            self.places[name] = _Place(file, 8 + length + begin, _DTYPES[entry["dtype"]], shape, stride)

    def read(self, name: str) -> torch.Tensor | None:
        """The tensor of that name, in memory; None where there is none."""
        place = self.places.get(name)
        if place is None:
            return self.read_whole.get(name)
        size = extent(torch.empty_strided(place.size, place.stride, dtype=place.dtype, device="meta"))
        data = torch.empty(size, dtype=torch.uint8)
        with place.file.open("rb") as stream:
            stream.seek(place.offset)
            if size and stream.readinto(memory_at(data.data_ptr(), size)) < size:
                raise self._unreadable(f"{name} is cut short")
        return laid_out(data, place.size, place.stride, place.dtype)


def write_safetensors(path: Path, model: nn.Module) -> None:
    """Write the state dict of ``model``, with one tensor in memory at a time; one with several names has its first.

    Raises OutputError where the file cannot be written; one that was there before stays then.
    """
    named: dict[int, tuple[str, torch.Tensor]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        named.setdefault(id(value), (name, value))
    write_tensors(path, dict(named.values()), {})


def write_tensors(path: Path, named: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, with one tensor in memory at a time. Raises OutputError."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, value in named.items():
        if value.dtype not in names:
            raise OutputError(
                f"{name} is of {value.dtype}, which safetensors has no name for here",
                where=str(path),
                remedy="Save state_dict() with torch.save.",
            )
        begin, end = end, end + value.numel() * value.element_size()
        header[name] = {"dtype": names[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for value in named.values():
                whole = value.detach().to("cpu").contiguous()
                stream.write(memory_at(whole.data_ptr(), whole.nbytes))
                del whole
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OutputError(
            f"the checkpoint cannot be written: {error.strerror}",
            where=str(path),
            remedy="Choose a folder that exists, can be written to, and has room.",
        ) from error


def fill_meta(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    checkpoint: str | os.PathLike[str] | None,
    adopt: Callable[[torch.Tensor, str], None],
) -> None:
    """Give the parameters and buffers of ``model`` that are on the meta device the checkpoint's values; ``adopt`` is
    given each parameter as it is there. A checkpoint also replaces the values of a model that has its own.

    Raises TrainStepError for a tensor that the checkpoint does not have, or has in another shape.
    """
    aliases: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    persistent = model.state_dict(keep_vars=True)
    everything = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in everything:
        aliases.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    meta = [tensor for tensor in tensors.values() if tensor.is_meta]
    if checkpoint is None:
        if meta:
            raise _missing([aliases[id(tensor)][0] for tensor in meta], "and no checkpoint is given")
        return
    source = Checkpoint(checkpoint)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    lost = []
    for key, tensor in tensors.items():
        found = next((value for name in aliases[key] if (value := source.read(name)) is not None), None)
        if found is None:
            if tensor.is_meta or any(name in persistent for name in aliases[key]):
                lost.append(aliases[key][0])
            continue
        if found.shape != tensor.shape:
            raise TrainStepError(
                f"{aliases[key][0]} has shape {list(found.shape)} in the checkpoint and {list(tensor.shape)} in the "
                "model",
                where=str(checkpoint),
                remedy="Build the model from the configuration that the checkpoint was made with.",
            )
        if tensor.is_meta:
            _materialize(tensor)
        with torch.no_grad():
            tensor.copy_(found)
        del found
        if key in groups and tensor in optimizer.state:
            optimizer.state[tensor] = optimizers.first_state(optimizer, groups[key], tensor)
        adopt(tensor, aliases[key][0])
    if lost:
        raise _missing(lost, f"and {checkpoint} does not have them")


def _materialize(tensor: torch.Tensor) -> None:
    """Turn a meta tensor into one with memory, without another identity: modules and optimizers hold it."""
    made = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        made = nn.Parameter(made, tensor.requires_grad)
    torch.utils.swap_tensors(tensor, made)  # type: ignore[no-untyped-call]


def _missing(names: list[str], why: str) -> TrainStepError:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return TrainStepError(
        f"these are on the meta device or missing, {why}: {shown}",
        where="effcc.train_step(checkpoint=...)",
        remedy="Give a checkpoint that has them. Buffers that no checkpoint holds need values: build them on the CPU.",
    )
