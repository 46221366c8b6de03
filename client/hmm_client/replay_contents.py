"""What a replayed program has written, so that a run with devices can be compared with one without.

Recordings hold no contents.  So the program writes here: at every place where it comes, a stamp into the first pages,
where no device writes.  When it ends, everything it ever stamped is read back.  Whatever devices did meanwhile, all of
it must be the same as if there were none.

A page of a private mapping of a file is the file's until somebody writes to it, a device too.  Who comes first decides
what it holds, so only what the program wrote there itself is compared.

**Invariants**: the stamps of two replays of one recording are the same.

**Absent**: what devices do (`replay_devices.py`).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hmm.errors import OutOfFramesError
from hmm.units import PAGE_SIZE, Address, AddressRange
from hmm_client import calls
from hmm_client.client import Client
from hmm_client.process import Process
from hmm_client.results import Accessed

if TYPE_CHECKING:
    from hmm_client.replay import Devices

STAMP_OFFSET = 1024
"""Behind the slots of all devices."""
STAMPED_PAGES = 4
READ_AT_ONCE = 512
LOST = "not readable"
NOT_WRITTEN = "not written"
OF_THE_FILE = "what the file has"


class NoDevices:
    """Nobody mirrors the program."""

    async def attach(self, process: Process) -> None:
        """Nobody does."""

    async def follow(self, process: Process, span: AddressRange) -> None:
        """Nobody does."""

    async def idle(self) -> None:
        """Nobody does anything."""

    async def settle(self) -> None:
        """Nothing to settle."""


class Stamping:
    """Between a program and its devices: writes stamps where the program is.

    Attributes:
        contents: after `settle`, what the first process reads at every address that it stamped, or why the last stamp
            was not written (so little memory is not enough), or `OF_THE_FILE`.
    """

    def __init__(self, client: Client, devices: Devices) -> None:
        self.contents: dict[Address, str] = {}
        self._client = client
        self._devices = devices
        self._first: Process | None = None
        self._stamped: dict[Address, str] = {}
        self._count = 0

    async def attach(self, process: Process) -> None:
        """As the devices."""
        if self._first is None:
            self._first = process
        await self._devices.attach(process)

    async def follow(self, process: Process, span: AddressRange) -> None:
        """The program writes where it has memory, and its devices come after it.

        Elsewhere a write below a stack would make it grow, as the program did not.
        """
        pages = range(span.page_aligned().start, span.end, PAGE_SIZE)[:STAMPED_PAGES]
        self._count += 1
        stamp = struct.pack("<Q", self._count)
        mapped = await self._client.execute([calls.mincore(process.id, page, PAGE_SIZE) for page in pages])
        places = [page + STAMP_OFFSET for page, there in zip(pages, mapped, strict=True) if there.error is None]
        outcomes = await self._client.execute([calls.write_memory(process.id, place, stamp) for place in places])
        if process is self._first:
            self._stamped |= {
                place: f"{NOT_WRITTEN}, {outcome.error}" if isinstance(outcome.error, OutOfFramesError) else stamp.hex()
                for place, outcome in zip(places, outcomes, strict=True)
            }
        await self._devices.follow(process, span)

    async def idle(self) -> None:
        """Let the devices finish what they do."""
        await self._devices.idle()

    async def settle(self) -> None:
        """Let the devices finish, then read back what was stamped."""
        await self._devices.settle()
        assert self._first is not None
        lines = (await self._first.maps()).lines
        of_files = [line.span for line in lines if line.file_id and line.permissions.endswith("p")]
        places = list(self._stamped)
        for at in range(0, len(places), READ_AT_ONCE):
            part = places[at : at + READ_AT_ONCE]
            outcomes = await self._client.execute([calls.read_memory(self._first.id, place, 8) for place in part])
            for place, outcome in zip(part, outcomes, strict=True):
                written, read = self._stamped[place], outcome.value
                if written.startswith(NOT_WRITTEN):
                    self.contents[place] = written
                elif not isinstance(read, Accessed) or read.signal:
                    self.contents[place] = LOST
                elif read.data.hex() != written and any(span.start <= place < span.end for span in of_files):
                    self.contents[place] = OF_THE_FILE
                else:
                    self.contents[place] = read.data.hex()


def compare_contents(expected: Mapping[Address, str], found: Mapping[Address, str]) -> list[str]:
    """Where two runs of a program ended with other contents, in words."""
    pairs = [
        (place, expected.get(place, LOST), found.get(place, LOST)) for place in sorted(expected.keys() | found.keys())
    ]
    return [
        f"at {place:#x} the program reads {now}, without devices {alone}"
        for place, alone, now in pairs
        if alone != now and OF_THE_FILE not in {alone, now}
    ]
