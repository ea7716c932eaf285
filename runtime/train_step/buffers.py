"""A module's buffers as they are at one moment, and again later."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

#: A buffer: the number of its module among ``modules()``, and its name there.
Place = tuple[int, str]


class Buffers:
    """The buffers of ``module`` now. Values are copied for those in ``copied`` (None: for all)."""

    def __init__(self, module: nn.Module, copied: Collection[Place] | None = None) -> None:
        self.modules = list(module.modules())
        self.tensors: dict[Place, torch.Tensor | None] = {
            (index, name): buffer for index, each in enumerate(self.modules) for name, buffer in each._buffers.items()
        }
        self.copies = {
            place: buffer.detach().clone()
            for place, buffer in self.tensors.items()
            if buffer is not None and (copied is None or place in copied)
        }

    def changed(self) -> set[Place]:
        """Those that are another tensor since, or have other values: compared as such, for batch normalisation changes
        its statistics without a new version."""
        other = {place for place, buffer in self.tensors.items() if self._now(place) is not buffer}
        values = {place for place, copy in self.copies.items() if not torch.equal(copy, self._tensor(place))}
        return other | values

    def forget_all_but(self, places: Collection[Place]) -> None:
        self.copies = {place: copy for place, copy in self.copies.items() if place in places}

    def restore(self) -> None:
        """Make them what they were."""
        for (index, name), buffer in self.tensors.items():
            if self._now((index, name)) is not buffer:
                self.modules[index]._buffers[name] = buffer
        for place, copy in self.copies.items():
            self._tensor(place).data.copy_(copy)

    def _now(self, place: Place) -> torch.Tensor | None:
        return self.modules[place[0]]._buffers.get(place[1])

    def _tensor(self, place: Place) -> torch.Tensor:
        tensor = self.tensors[place]
        assert tensor is not None
        return tensor
