"""/proc/PID/smaps: what each mapping costs, in bytes.

**Source**: Linux fs/proc/task_mmu.c (smaps_pte_entry(), smaps_account(), smaps_page_accumulate(),
smaps_hugetlb_range(), smap_gather_stats(), show_smap_vma_flags()), Documentation/filesystems/proc.rst, 6.12.

**Invariants**: nothing is changed by looking; `rss` is the sum of the four clean and dirty parts.

**Absent**: what is always 0 here: pages mapped by huge entries of files that are no shared memory; THPeligible.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.file import FILE_SIZE_MAX, File
from hmm.frames import PageFlag
from hmm.swap import area_of, slots_of
from hmm.units import PAGE_SHIFT, PAGE_SIZE
from hmm.vma import Vma, VmFlag

__all__ = ["MemoryUse", "memory_use", "vm_flag_letters"]

_PSS_SHIFT = 12
_LETTERS = (
    (VmFlag.READ, "rd"), (VmFlag.WRITE, "wr"), (VmFlag.EXEC, "ex"), (VmFlag.SHARED, "sh"), (VmFlag.MAYREAD, "mr"),
    (VmFlag.MAYWRITE, "mw"), (VmFlag.MAYEXEC, "me"), (VmFlag.MAYSHARE, "ms"), (VmFlag.GROWSDOWN, "gd"),
    (VmFlag.UFFD_MISSING, "um"), (VmFlag.PFNMAP, "pf"), (VmFlag.LOCKED, "lo"), (VmFlag.IO, "io"),
    (VmFlag.SEQ_READ, "sr"), (VmFlag.RAND_READ, "rr"),
    (VmFlag.DONTCOPY, "dc"), (VmFlag.DONTEXPAND, "de"), (VmFlag.LOCKONFAULT, "lf"), (VmFlag.ACCOUNT, "ac"),
    (VmFlag.NORESERVE, "nr"), (VmFlag.HUGETLB, "ht"), (VmFlag.SYNC, "sf"), (VmFlag.WIPEONFORK, "wf"),
    (VmFlag.DONTDUMP, "dd"), (VmFlag.SOFTDIRTY, "sd"), (VmFlag.MIXEDMAP, "mm"), (VmFlag.HUGEPAGE, "hg"),
    (VmFlag.NOHUGEPAGE, "nh"), (VmFlag.MERGEABLE, "mg"), (VmFlag.UFFD_MINOR, "ui"),
)  # fmt: skip

_Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Of one mapping, or of several together, in bytes.

    Attributes:
        pss, pss_dirty: each page divided by the number of entries that map it.
        referenced: used since that was last forgotten.
        ksm: merged with equal pages (MADV_MERGEABLE).
        lazy_free: may go without being written (MADV_FREE).
        shmem_pmd: pages of files mapped by huge entries.
        shared_hugetlb, private_hugetlb: hugetlb pages, which count as nothing else.
        locked: the pss of locked mappings.
    """

    rss: int = 0
    pss: int = 0
    pss_dirty: int = 0
    shared_clean: int = 0
    shared_dirty: int = 0
    private_clean: int = 0
    private_dirty: int = 0
    referenced: int = 0
    anonymous: int = 0
    ksm: int = 0
    lazy_free: int = 0
    anon_huge: int = 0
    shmem_pmd: int = 0
    shared_hugetlb: int = 0
    private_hugetlb: int = 0
    swap: int = 0
    swap_pss: int = 0
    locked: int = 0


def vm_flag_letters(space: AddressSpace, vma: Vma) -> str:
    """The line VmFlags: two letters for each."""
    flags = vma.flags | VmFlag.SOFTDIRTY if space.is_soft_dirty(vma) else vma.flags
    return " ".join(letters for flag, letters in _LETTERS if flags & flag)


def memory_use(space: AddressSpace, vma: Vma) -> MemoryUse:
    """What one mapping costs.  Cost: O(entries), vectorised."""
    frames = space.frames
    _, entries = space.table.valid(vma.start, vma.end)
    held = cpu_pte.holds_frame(entries) | cpu_pte.is_migration(entries) | cpu_pte.is_hwpoison(entries)
    entries, swapped = entries[held], slots_of(entries)
    pfns, present = cpu_pte.cpu_pfn(entries), cpu_pte.is_present(entries)
    if vma.has(VmFlag.HUGETLB):
        shared = ~present | (frames.mapcount[pfns] > 1)
        return MemoryUse(shared_hugetlb=_bytes(shared), private_hugetlb=_bytes(~shared))
    flags, mapcount = frames.flags[pfns], np.maximum(frames.mapcount[pfns], 1)

    def flagged(flag: PageFlag) -> _Mask:
        found: _Mask = (flags & np.uint16(flag)) != 0
        return found

    dirty = flagged(PageFlag.DIRTY) | (present & cpu_pte.is_dirty(entries))
    anonymous, huge = flagged(PageFlag.ANON), cpu_pte.is_huge(entries)
    # Others are "maybe shared, but not sure how often", huge pages of devices too: smaps_pmd_entry().
    countable = present | (cpu_pte.is_device_private(entries) & ~cpu_pte.is_huge(entries))
    private = countable & ((mapcount < 2) | (frames.refcount[pfns] == 1))
    whole = private | ~countable
    shares = np.where(whole, np.int64(PAGE_SIZE << _PSS_SHIFT), (PAGE_SIZE << _PSS_SHIFT) // mapcount)
    young = present & ((entries & np.uint64(cpu_pte.ACCESSED)) != 0)
    pss = int(shares.sum()) >> _PSS_SHIFT
    counts = area_of(frames).counts[swapped] if swapped.size else np.ones(0, np.int32)
    return MemoryUse(
        rss=entries.size << PAGE_SHIFT,
        pss=pss,
        pss_dirty=int(shares[dirty].sum()) >> _PSS_SHIFT,
        shared_clean=_bytes(~private & ~dirty),
        shared_dirty=_bytes(~private & dirty),
        private_clean=_bytes(private & ~dirty),
        private_dirty=_bytes(private & dirty),
        referenced=_bytes(young | flagged(PageFlag.REFERENCED)),
        anonymous=_bytes(anonymous),
        ksm=_bytes(flagged(PageFlag.KSM)),
        lazy_free=_bytes(anonymous & ~flagged(PageFlag.SWAPBACKED) & ~dirty),
        anon_huge=_bytes(anonymous & huge),
        shmem_pmd=_bytes(~anonymous & huge & ~cpu_pte.is_special(entries)),
        swap=(swapped.size << PAGE_SHIFT) + _swapped_of_file(space, vma),
        swap_pss=int(((PAGE_SIZE << _PSS_SHIFT) // np.maximum(counts, 1)).sum()) >> _PSS_SHIFT,
        locked=pss if vma.has(VmFlag.LOCKED) else 0,
    )


def _bytes(pages: _Mask) -> int:
    return int(np.count_nonzero(pages)) << PAGE_SHIFT


def _swapped_of_file(space: AddressSpace, vma: Vma) -> int:
    """shmem_swap_usage(), and of private mappings only where nothing else stands: smaps_pte_hole_lookup()."""
    if not isinstance(vma.backing, File) or space.frames.swap is None:
        return 0
    shift = vma.mapping.delta << PAGE_SHIFT
    first, end = vma.start + shift, min(vma.end + shift, FILE_SIZE_MAX)
    if first >= end:
        return 0
    offsets, entries = vma.backing.pages.valid(first, end)
    offsets = offsets[cpu_pte.is_swap(entries)]
    if not vma.shared and vma.writable:
        offsets = offsets[space.table.lookup((offsets.view(np.int64) - shift).view(np.uint64)) == 0]
    return offsets.size << PAGE_SHIFT
