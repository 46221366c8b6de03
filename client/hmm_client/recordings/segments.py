"""System V shared memory: how long what shmat maps is.

shmat does not say.  It is as long as the segment, which is what the shmget that made it asked for.  If that was not
recorded, it is at least what another shmget asked for, and what a layout shows of it (the inode that maps shows of a
segment is its id; but mremap maps beyond its end, too); else the layout that the call meets has to tell.

Source: Linux ipc/shm.c, newseg(), shm_more_checks(), do_shmat().
Absent: permissions and lifetime of segments.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from hmm.units import PAGE_SIZE, page_up
from hmm_client.recordings import flags as kernel
from hmm_client.recordings.arguments import flag_names, flags, number
from hmm_client.recordings.maps import Area
from hmm_client.recordings.steps import Map, Origin
from hmm_client.recordings.strace import Call

NAME = "/SYSV"
"""What the names of segments begin with."""
_SHMLBA = PAGE_SIZE
_HUGE_SHIFT = re.compile(r"\b(\d+)<<SHM_HUGE_SHIFT\b")


@dataclass(frozen=True, slots=True)
class _Segment:
    name: str
    length: int
    exact: bool = False


@dataclass(slots=True)
class Segments:
    """The segments of a recording.

    Attributes:
        layouts: the areas of the first process at the start and at the end.
        known: segments by id.
    """

    layouts: Iterable[Area]
    known: dict[int, _Segment] = field(default_factory=dict)

    def created(self, call: Call, result: int) -> None:
        """Take note of a successful shmget(key, size, flags)."""
        key = 0 if call.arguments[0] == "IPC_PRIVATE" else number(call.arguments[0]) & 0xFFFF_FFFF
        size = number(call.arguments[1])
        unit = _page_size(call.arguments[2])
        found = self.known.get(result)  # a segment that exists may be asked for as a smaller one
        new = not key or {"IPC_CREAT", "IPC_EXCL"} <= flag_names(call.arguments[2])
        length = max(-(-size // unit) * unit, found.length if found and not new else 0)
        self.known[result] = _Segment(f"{NAME}{key:08x}", length, new or (found is not None and found.exact))

    def attach(self, origin: Origin, call: Call, result: int) -> Map:
        """The step of a successful shmat(id, address, flags)."""
        wanted = number(call.arguments[1])
        flag_bits = flags(call.arguments[2], kernel.SHM)
        segment = self._segment(number(call.arguments[0]))
        prot = kernel.PROT["PROT_READ"]
        prot |= 0 if flag_bits & kernel.SHM["SHM_RDONLY"] else kernel.PROT["PROT_WRITE"]
        prot |= kernel.PROT["PROT_EXEC"] if flag_bits & kernel.SHM["SHM_EXEC"] else 0
        map_flags = kernel.MAP["MAP_SHARED"]
        if wanted:
            remap = flag_bits & kernel.SHM["SHM_REMAP"]
            map_flags |= kernel.MAP["MAP_FIXED" if remap else "MAP_FIXED_NOREPLACE"]
            wanted -= wanted % _SHMLBA
        return Map(origin, wanted, segment.length, prot, map_flags, segment.name, 0, result)

    def _segment(self, identity: int) -> _Segment:
        shown = [area for area in self.layouts if area.inode == identity and (area.source or "").startswith(NAME)]
        known = self.known.get(identity)
        if known is not None and known.exact:
            return known
        known = known or _Segment((shown[0].source or "") if shown else f"{NAME}00000000", 0)
        return _Segment(known.name, max([known.length, *(page_up(area.offset + area.length) for area in shown)]))


def _page_size(flag_text: str) -> int:
    """The unit of a segment's length: `SHM_HUGETLB|30<<SHM_HUGE_SHIFT|0600` names another one."""
    if "SHM_HUGETLB" not in flag_text:
        return PAGE_SIZE
    shift = _HUGE_SHIFT.search(flag_text)
    return 1 << (int(shift[1]) if shift else kernel.HUGE_PAGE_SHIFT_DEFAULT)
