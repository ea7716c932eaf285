"""What a kernel's schedule depends on: the limits of the GPU that it is made for."""

from __future__ import annotations

from dataclasses import dataclass

from ...cost_model.devices import Device, device_titled, load_device
from ...errors import DeviceError

#: Compute capability of the packaged devices (NVIDIA's CUDA C++ Programming Guide, table of compute capabilities).
CAPABILITIES = {"a100-80g": 80, "l4": 89, "rtx4090": 89, "h100": 90, "h200": 90}
#: Threads that a multiprocessor holds at once, by capability; elsewhere 2048 (same guide, technical specifications).
_THREADS = {86: 1536, 89: 1536, 120: 1536}
#: Bytes of shared memory of a multiprocessor that one block may use, by capability; elsewhere as for 80.
_SHARED = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}


@dataclass(frozen=True)
class Target:
    """A GPU. ``units``: multiprocessors; ``shared``: bytes of shared memory that one block may use; ``registers``: of
    32 bits, of a multiprocessor; ``threads``: that a multiprocessor holds."""

    capability: int
    units: int
    shared: int
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32

    @staticmethod
    def of_capability(capability: int, units: int = 132) -> Target:
        """A GPU of which only the architecture is known; it has as many multiprocessors as an H100."""
        shared = _SHARED.get(capability, _SHARED[80])
        return Target(capability, units, shared, threads=_THREADS.get(capability, 2048))

    @staticmethod
    def of_device(device: Device | str) -> Target:
        """From a device file. Raises ``DeviceError`` for what is no NVIDIA GPU with a known capability."""
        found = load_device(device) if isinstance(device, str) else device
        if found.name not in CAPABILITIES:
            raise DeviceError(
                f"no compute capability is known for {found.name!r}",
                remedy=f"kernels are made for {', '.join(sorted(CAPABILITIES))}",
            )
        capability = CAPABILITIES[found.name]
        return Target(
            capability,
            int(found.units.value),
            int(found.unit_scratch.value),
            threads=_THREADS.get(capability, 2048),
        )

    @staticmethod
    def of_cuda(index: int) -> Target:
        """The GPU with this number in this machine; its device file's figures, if there is one."""
        import torch

        properties = torch.cuda.get_device_properties(index)
        name = device_titled(properties.name)
        if name in CAPABILITIES:
            return Target.of_device(name)
        return Target.of_capability(properties.major * 10 + properties.minor, properties.multi_processor_count)

    def resident(self, threads: int, registers: int, shared: int) -> int:
        """Blocks that a multiprocessor holds at once, for a kernel's threads, registers a thread and shared memory."""
        # Registers are given out to warps, 256 at a time; 1 KiB of shared memory of each block is the system's.
        each = -(-registers * 32 // 256) * 256 * (threads // 32)
        by_registers = self.registers // each if each else self.blocks
        reserved = 1024 if self.capability >= 80 else 0
        by_shared = (self.shared + reserved) // (shared + reserved) if shared + reserved else self.blocks
        return min(self.blocks, self.threads // threads, by_registers, by_shared)

    def occupancy(self, threads: int, registers: int, shared: int) -> float:
        """Part of the threads that a multiprocessor could hold which are there."""
        return self.resident(threads, registers, shared) * threads / self.threads
