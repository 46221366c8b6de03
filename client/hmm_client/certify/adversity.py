"""What an adversity is, and what all of them need.

**Absent**: the adversities (`adversities`, `neighbours`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from hmm.units import PAGE_SIZE, AddressRange
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot
from hmm_client.certify.stage import Stage, stamp
from hmm_client.process import Process

RW = Prot.READ | Prot.WRITE
FIXED = MapFlag.PRIVATE | MapFlag.ANONYMOUS | MapFlag.FIXED
PAGES = 8

Run = Callable[[Stage], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Adversity:
    """One of them.

    Attributes:
        title: what is asked of the driver, in a sentence.
        order: which the driver has to offer; empty: none but those that all take.
    """

    name: str
    title: str
    run: Run
    order: str = ""


class Suite(dict[str, Adversity]):
    """Adversities by name, in the order in which they run.

    Args:
        order: which the driver has to offer.
    """

    def __init__(self, order: str = "") -> None:
        self._order = order

    def add(self, title: str) -> Callable[[Run], Run]:
        """A decorator: the function's name is the adversity's."""

        def decorate(run: Run) -> Run:
            name = run.__name__.replace("_", "-")
            self[name] = Adversity(name, title, run, self._order)
            return run

        return decorate


def page(span: AddressRange, index: int) -> int:
    """The address of one page of a range."""
    return span.start + index * PAGE_SIZE


async def use(stage: Stage, process: Process, span: AddressRange) -> None:
    """Let the device read and write every page, so that it has a translation of each: 100 + its index is there then."""
    for index in range(span.npages):
        await stage.device_may(process, page(span, index), write=False)
        await stage.device_writes(process, page(span, index), stamp(100 + index))
