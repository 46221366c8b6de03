"""What one machine may hold.

**Source**: vm.max_map_count and vm.nr_hugepages of Linux; the rest is our own.

**Invariants**: they do not change while a machine lives.

**Absent**: what fails when one is reached (`Registry.require_room`, and whoever is given one).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one machine may hold; each is an ENOMEM when exceeded.

    Attributes:
        frames: of system memory, the zero page included.
        swap_pages: slots of the swap area; 0 for none: pages stay where they are, and memory runs out.
        device_frames: frame numbers kept for the memory of devices.
        hugetlb_pages: huge pages of system memory set aside for MAP_HUGETLB (vm.nr_hugepages).
        migrations: whose driver takes the steps, at a time.
        dma_pages: that one device's IOMMU can map at a time.
        directories: of one page table, the CPU's or a mirror's; address space is reserved for them, not memory.
    """

    frames: int = 1 << 20
    swap_pages: int = 0
    device_frames: int = 1 << 20
    hugetlb_pages: int = 0
    processes: int = 4096
    devices: int = 256
    mirrors: int = 4096
    files: int = 65536
    userfaultfds: int = 4096
    migrations: int = 256
    vmas: int = 65530
    dma_pages: int = 1 << 24
    directories: int = 1 << 16
