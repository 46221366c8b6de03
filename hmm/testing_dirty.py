"""What devices of 2015 wrote: that it is noted of the page before the entry is gone in which it was recorded.

**Source**: linux-mm, `hmm_mirror_update_pt()`; invariant 11 of the project.

**Invariants**: a page of which a mirror's entry was dirty is dirty when that entry is gone or clean, unless the page is
another one now, or this was to make it clean.

**Absent**: what the page holds (testing_contents.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from hmm import cpu_pte, pte
from hmm.address_space import AddressSpace
from hmm.checked import Checked
from hmm.events import Cause, Delivery
from hmm.frames import PageFlag
from hmm.machine import Machine
from hmm.mirror import Mirror, MirrorState
from hmm.spans import inside
from hmm.units import AddressRange, MirrorId

__all__ = ["DirtyPages", "LostDirtyError"]

_CLEANING = frozenset({Cause.WRITE_BACK, Cause.MADV_FREE, Cause.RECLAIM, Cause.MREMAP_MOVE, Cause.OOM_REAP})
"""Besides those that discard: after these a frame may be there again, as that of another page."""


class LostDirtyError(AssertionError):
    """A page that a device wrote is taken for clean."""


@dataclass(slots=True)
class DirtyPages:
    """What mirrors' entries record.

    Attributes:
        checked: what was looked at already.
        recorded: mirror -> its address space, and page -> frame of its dirty entries.
        cleaning: (mirror, event) -> ranges that are about to be made clean, or to get other pages.
    """

    machine: Machine
    checked: Checked
    recorded: dict[MirrorId, tuple[AddressSpace, dict[int, int]]] = field(default_factory=dict)
    cleaning: dict[tuple[MirrorId, int], tuple[AddressRange, ...]] = field(default_factory=dict)

    def sent(self, delivery: Delivery) -> None:
        """An event is on its way."""
        cause = delivery.event.cause
        if cause is not None and (cause in _CLEANING or cause.discards):
            self.cleaning[delivery.mirror_id, delivery.sequence] = delivery.event.spans

    def check(self) -> None:
        """Raise LostDirtyError when what a device wrote is forgotten."""
        mirrors = self.machine.mirrors
        for mirror_id, (space, before) in list(self.recorded.items()):
            mirror = mirrors.get(mirror_id)
            now = {} if mirror is None or mirror.state is not MirrorState.LIVE else self._dirty(mirror)
            gone = {page: pfn for page, pfn in before.items() if now.get(page) != pfn}
            if gone:
                self._require_noted(mirror_id, space, gone)
            del self.recorded[mirror_id]
        for mirror in mirrors.values():
            if mirror.state is MirrorState.LIVE and (now := self._dirty(mirror)):
                self.recorded[mirror.id] = mirror.space, now
        if self.cleaning:
            running = {(one.id, number) for one in mirrors.values() for number in one.unsettled}
            self.cleaning = {key: spans for key, spans in self.cleaning.items() if key in running}

    def _dirty(self, mirror: Mirror) -> dict[int, int]:
        addresses, entries = self.checked.look(mirror.table, mirror.table.in_use)
        dirty = pte.pte_test_dirty(entries) & ~pte.pte_test_valid_dev(entries)
        return dict(zip(addresses[dirty].tolist(), mirror.pfns(entries[dirty]).tolist(), strict=True))

    def _require_noted(self, mirror_id: MirrorId, space: AddressSpace, gone: dict[int, int]) -> None:
        pages, pfns = np.array(list(gone), np.uint64), np.array(list(gone.values()), np.int64)
        entries = space.table.lookup(pages)
        lost = cpu_pte.is_present(entries) & (cpu_pte.cpu_pfn(entries) == pfns)
        lost &= ~self.machine.frames.test_flags(pfns, PageFlag.DIRTY)
        for (number, _), spans in self.cleaning.items():
            if number == mirror_id:
                lost &= ~inside(pages, spans)
        if lost.any():
            raise LostDirtyError(f"what mirror {mirror_id} wrote to {int(pages[lost][0]):#x} is not noted")
