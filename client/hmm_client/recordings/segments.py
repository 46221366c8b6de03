"""System V shared memory: how long what shmat maps is, and how much shmdt takes away.

Neither call says a length.  It is that of the segment, which shmget tells if it was recorded too; else what the
final layout shows at that address; else a page, which at least marks the place.

Source: Linux ipc/shm.c, do_shmat(), ksys_shmdt().
Absent: permissions and lifetime of segments.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from hmm.units import PAGE_SIZE, page_up
from hmm_client.recordings import flags as kernel
from hmm_client.recordings.arguments import flags, number
from hmm_client.recordings.maps import Area
from hmm_client.recordings.steps import Map, Origin, ProcessIndex, Unmap
from hmm_client.recordings.strace import Call

_SHMLBA = PAGE_SIZE


@dataclass(frozen=True, slots=True)
class _Segment:
    name: str
    length: int


@dataclass(slots=True)
class Segments:
    """The segments of a recording, and where each process has attached them.

    Attributes:
        final: the final layout of the first process.
    """

    final: Iterable[Area]
    known: dict[int, _Segment] = field(default_factory=dict)
    attached: dict[ProcessIndex, dict[int, int]] = field(default_factory=dict)

    def created(self, call: Call, result: int) -> None:
        """Take note of a successful shmget(key, size, flags)."""
        key = 0 if call.arguments[0] == "IPC_PRIVATE" else number(call.arguments[0]) & 0xFFFF_FFFF
        size = number(call.arguments[1])
        if size or result not in self.known:  # size 0 finds a segment that exists
            self.known[result] = _Segment(f"/SYSV{key:08x}", page_up(size) or PAGE_SIZE)

    def attach(self, origin: Origin, call: Call, result: int) -> Map:
        """The step of a successful shmat(id, address, flags)."""
        wanted = number(call.arguments[1])
        flag_bits = flags(call.arguments[2], kernel.SHM)
        segment = self.known.get(number(call.arguments[0])) or self._guess(result)
        self.attached.setdefault(origin.process, {})[result] = segment.length
        prot = kernel.PROT["PROT_READ"]
        prot |= 0 if flag_bits & kernel.SHM["SHM_RDONLY"] else kernel.PROT["PROT_WRITE"]
        prot |= kernel.PROT["PROT_EXEC"] if flag_bits & kernel.SHM["SHM_EXEC"] else 0
        map_flags = kernel.MAP["MAP_SHARED"]
        if wanted:
            remap = flag_bits & kernel.SHM["SHM_REMAP"]
            map_flags |= kernel.MAP["MAP_FIXED" if remap else "MAP_FIXED_NOREPLACE"]
            wanted -= wanted % _SHMLBA
        return Map(origin, wanted, segment.length, prot, map_flags, segment.name, 0, result)

    def detach(self, origin: Origin, call: Call) -> Unmap:
        """The step of a successful shmdt(address)."""
        address = number(call.arguments[0])
        length = self.attached.get(origin.process, {}).pop(address, PAGE_SIZE)
        return Unmap(origin, address, length)

    def inherit(self, parent: ProcessIndex, child: ProcessIndex) -> None:
        """A forked child has attached what its parent had."""
        if parent in self.attached:
            self.attached[child] = dict(self.attached[parent])

    def _guess(self, address: int) -> _Segment:
        for area in self.final:
            if area.start == address and (area.source or "").startswith("/SYSV"):
                return _Segment(area.source or "", area.length)
        return _Segment("/SYSV00000000", PAGE_SIZE)
