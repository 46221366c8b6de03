"""A device: what a driver registers before it can mirror anything.

**Source**: linux-mm, "HMM: introduce heterogeneous memory management v4", hmm_device_register(),
hmm_device_unregister(); `device->dev` decides whether mirrors hold frame numbers or DMA addresses.

**Invariants**: at most one mirror per (device, address space).

**Absent**: the mirrors' tables (mirror.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from hmm.iommu import Iommu
from hmm.units import DeviceId


@dataclass(slots=True, eq=False)
class Device:
    """`struct hmm_device`.

    Attributes:
        iommu: present when the device does DMA, so that its mirrors' entries hold DMA addresses.
        region: number of its memory among the regions of frames; 0 when it has none.
        evicts: pages that are to be moved to its full memory take the place of those that went there longest ago.
    """

    id: DeviceId
    name: str
    owner: str
    iommu: Iommu | None = None
    region: int = 0
    evicts: bool = False

    def __str__(self) -> str:
        return f"device {self.id} ({self.name})"
