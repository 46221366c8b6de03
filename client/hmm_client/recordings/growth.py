"""Areas that grew downwards without a call: the stack, and what MAP_GROWSDOWN mapped.

A fault below such an area extends it; no log shows when.  The last layout shows how far.

Source: Linux mm/mmap.c, expand_downwards(); mm/mprotect.c, do_mprotect_pkey() for PROT_GROWSDOWN.
Absent: processes other than the first, whose last layouts are not known.
"""

from __future__ import annotations

from collections.abc import Sequence

from hmm_client.recordings.flags import MAP, PROT
from hmm_client.recordings.maps import STACK, Area
from hmm_client.recordings.steps import Map, Protect, Step


class Growth:
    """What has grown by the end, and is not yet known to have.

    Args:
        initial: layout of the first process at the start.
        final: its layout at the end.
    """

    def __init__(self, initial: Sequence[Area], final: Sequence[Area]) -> None:
        self._final = final
        self._pending: list[tuple[int, int]] = []
        for area in initial:
            if area.name == STACK:
                self._expect(area.start)

    def mapped(self, step: Map) -> None:
        """The first process has mapped an area, which may grow."""
        if step.flags & MAP["MAP_GROWSDOWN"]:
            self._expect(step.recorded)

    def before(self, step: Step) -> list[tuple[int, int]]:
        """The [start, end) by which areas have grown before a step names them, each once."""
        address = getattr(step, "address", None)
        if address is None or not self._pending:
            return []
        whole = isinstance(step, Protect) and step.prot & PROT["PROT_GROWSDOWN"]
        return self._take([grown for grown in self._pending if grown[0] <= address and (whole or address < grown[1])])

    def rest(self) -> list[tuple[int, int]]:
        """The [start, end) by which areas have grown at the end, as far as no step named them."""
        return self._take(list(self._pending))

    def _take(self, grown: list[tuple[int, int]]) -> list[tuple[int, int]]:
        self._pending = [other for other in self._pending if other not in grown]
        return grown

    def _expect(self, start: int) -> None:
        """Take note of an area that began at `start`, if at the end it begins lower."""
        index = next((index for index, area in enumerate(self._final) if area.start <= start < area.end), None)
        if index is None:
            return
        # mprotect may have split it; the kernel names only the part where the stack began.
        while index and self._continues(index):
            index -= 1
        if self._final[index].start < start:
            self._pending.append((self._final[index].start, start))

    def _continues(self, index: int) -> bool:
        below, area = self._final[index - 1], self._final[index]
        return below.end == area.start and not below.name and not below.is_shared
