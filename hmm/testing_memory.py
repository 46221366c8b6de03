"""Fakes for tests: the memory of devices whose drivers copy.

`CarriedMemory` is the far end of COPY_TO_DEVICE and COPY_FROM_DEVICE: it keeps what it was given under the address
where it was told to put it, and gives back what it finds there.  So a page whose place was given to another one, or was
freed too early, is seen by its bytes.

**Source**: linux-mm, "HMM/dummy: add fake device memory to dummy HMM device driver".

**Absent**: which pages are where (mirror_memory.py); what pages have to hold (testing_contents.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from hmm import commands_device, pte
from hmm.events import Event, EventType
from hmm.machine import Machine
from hmm.operation_record import Caller
from hmm.testing_coverage import Coverage
from hmm.units import PAGE_SHIFT, PAGE_SIZE, MirrorId

EIO = 5
"""What a page that failed is answered with."""


class LostPageError(AssertionError):
    """A device is asked for a page that it was never given."""


@dataclass(slots=True)
class CarriedMemory:
    """The memories of all devices of a machine.

    Attributes:
        pages: what stands where: (device, address in its memory) -> 4096 bytes.
        fails: which pages of a copy fail, by their number in the event.
        coverage: where the driver's own calls are counted.
    """

    machine: Machine
    pages: dict[tuple[int, int], bytes] = field(default_factory=dict)
    fails: Callable[[Event, int], bool] = lambda _, __: False
    coverage: Coverage = field(default_factory=Coverage)

    def carry(self, mirror_id: MirrorId, event: Event) -> bytes:
        """Do what a driver does with the event of a copy.  Returns: its results."""
        caller = Caller(name="driver", token=self.machine.receivers[mirror_id].owner)
        failed = [self.fails(event, number) for number in range(event.npages)]
        places = [(event.owner, address) for address in self.addresses(event)]
        if event.etype is EventType.COPY_TO_DEVICE:
            record = self.machine.start(caller, commands_device.read_copy, mirror_id, event.copy, 0, event.npages)
            self.coverage.ended(record)
            if record.error is not None:  # the daemon no longer waits for this copy
                return bytes(event.npages)
            for number, place in enumerate(places):
                if not failed[number]:
                    self.pages[place] = record.result[number << PAGE_SHIFT : (number + 1) << PAGE_SHIFT]
            return bytes(EIO * one for one in failed)
        for number, place in enumerate(places):
            if failed[number]:
                continue
            if place not in self.pages:
                raise LostPageError(f"mirror {mirror_id} has nothing at {place[1]:#x}, asked by {event}")
            data = self.pages[place]
            brought = self.machine.start(caller, commands_device.write_copy, mirror_id, event.copy, number, data)
            self.coverage.ended(brought)
            if not event.keeps and brought.error is None:
                del self.pages[place]
        return bytes(EIO * one for one in failed)

    @staticmethod
    def addresses(event: Event) -> list[int]:
        """Where in the device's memory the pages of a copy are, in order."""
        addresses: list[int] = pte.pte_dev_addr(np.frombuffer(event.entries, "<u8").copy()).tolist()
        return addresses

    def write(self, device_id: int, address: int, data: bytes) -> None:
        """The device writes the start of a page of its memory."""
        old = self.pages[device_id, address]
        self.pages[device_id, address] = data + old[len(data) : PAGE_SIZE]
