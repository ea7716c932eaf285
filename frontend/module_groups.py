"""Which modules of a model repeat: siblings of one container that are equal in everything a trace can read from them.

Two modules are in one group when class, forward code, submodule names, parameter and buffer types, training flags and
the way their tensors alias each other are equal. Plain attributes (``layer_idx``) may differ: a trace that reads them
is guarded, and is then not reused. Modules with convolutions over images or volumes are in no group: their stretch of
the graph is compiled as a whole, so that its tensors may stay channels-last from one to the next.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

import torch

#: From so many equal siblings on one subgraph is shared. It saves the compile time of all but one; but where layers
#: meet nothing is fused any more, which costs a few percent of a step (measured at 6 layers, hidden size 256 to 384, on
#: CPU: 1 to 3 % of the time, 1 to 7 % of the peak).
MINIMUM_SIBLINGS = int(os.environ.get("EFFCC_MINIMUM_REPEATS") or 8)

_HOOK_TABLES = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_pre_hooks",
)


@dataclass(frozen=True)
class ModuleGroup:
    """Modules that may share one trace. ``shared`` holds the ids of tensors that they use but do not own."""

    key: Hashable
    class_name: str
    size: int
    shared: frozenset[int] = frozenset()


@dataclass
class ModuleGroups:
    """Groups of one model. All is forgotten when one of the ``roots`` is freed: its ids may then be used again."""

    by_module: dict[int, ModuleGroup] = field(default_factory=dict)
    tensors: set[int] = field(default_factory=set)
    seen: set[int] = field(default_factory=set)
    roots: list[weakref.ref[torch.nn.Module]] = field(default_factory=list)

    def add(self, root: torch.nn.Module) -> None:
        """Find the groups below ``root``; its modules are afterwards in ``seen``."""
        self.roots.append(weakref.ref(root, lambda _: self.forget()))
        owners = _tensor_owners(root)
        self.tensors.update(owners)
        modules = list(root.modules())
        self.seen.update(id(module) for module in modules)
        for container in modules:
            children = [child for child in container._modules.values() if child is not None]
            if len(children) < MINIMUM_SIBLINGS:
                continue
            buckets: dict[Hashable, list[torch.nn.Module]] = {}
            for child in children:
                if _is_worth_a_region(child):
                    shared = _shared_tensors(child, owners)
                    structure = _structure(child, shared)
                    if structure is not None:
                        buckets.setdefault((structure, frozenset(shared)), []).append(child)
            for key, members in buckets.items():
                if len(members) < MINIMUM_SIBLINGS:
                    continue
                class_name = type(members[0]).__qualname__
                shared_ids = frozenset(_shared_tensors(members[0], owners))
                group = ModuleGroup((type(members[0]), key), class_name, len(members), shared_ids)
                for member in members:
                    self.by_module[id(member)] = group

    def forget(self) -> None:
        for table in (self.by_module, self.tensors, self.seen, self.roots):
            table.clear()


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers with their path, each path listed even when the tensor is shared."""
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for table in (owner._parameters, owner._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    yield f"{prefix}.{name}" if prefix else name, tensor


def _tensor_owners(root: torch.nn.Module) -> dict[int, set[int]]:
    """Tensor id -> ids of the modules that hold it directly."""
    owners: dict[int, set[int]] = {}
    for module in root.modules():
        for table in (module._parameters, module._buffers):
            for tensor in table.values():
                if tensor is not None:
                    owners.setdefault(id(tensor), set()).add(id(module))
    return owners


def _shared_tensors(module: torch.nn.Module, owners: dict[int, set[int]]) -> set[int]:
    """Ids of the module's tensors that some module outside of it holds as well."""
    inside = {id(child) for child in module.modules()}
    return {id(tensor) for _, tensor in _tensors(module) if owners.get(id(tensor), set()) - inside}


def _is_worth_a_region(module: torch.nn.Module) -> bool:
    """A single matmul or a bare activation fuses better with what surrounds it."""
    with_parameters = sum(1 for child in module.modules() if any(p is not None for p in child._parameters.values()))
    return bool(module._modules) and with_parameters >= 2


def is_layout_sensitive(module: torch.nn.Module) -> bool:
    """Whether the module itself is a convolution over two or more dimensions."""
    from torch.nn.modules.conv import _ConvNd

    return isinstance(module, _ConvNd) and len(module.kernel_size) > 1


def _structure(module: torch.nn.Module, shared: set[int]) -> Hashable | None:
    """What equal modules agree on; None where a module cannot be shared (hooks, patched forward, convolutions)."""
    parts: list[Hashable] = []
    for prefix, child in module.named_modules(remove_duplicate=False):
        if any(child.__dict__.get(table) for table in _HOOK_TABLES) or "forward" in child.__dict__:
            return None
        if isinstance(child, torch.jit.ScriptModule | torch.fx.GraphModule) or is_layout_sensitive(child):
            return None
        tensors = {name for name, value in child.__dict__.items() if isinstance(value, torch.Tensor)}
        unregistered = tuple(sorted((name, id(child.__dict__[name])) for name in tensors))
        parts.append((prefix, type(child), child.training, unregistered))
    first_path: dict[int, str] = {}
    for path, tensor in _tensors(module):
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) and not _is_fake(tensor):
            return None
        alias = first_path.setdefault(id(tensor), path)
        identity = id(tensor) if id(tensor) in shared else 0
        parts.append((path, alias, identity, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device))
        parts.append((tensor.requires_grad, tensor.layout))
    return tuple(parts)


def _is_fake(tensor: torch.Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)
