"""Mirrors that go with their process: a driver hears of the end in a callback, where it cannot unregister them.

**Source**: 2015: `hmm_mirror_unregister()` must not be called from `release`.

**Invariants**: a mirror is unregistered once.

**Absent**: what else the driver has for a mirror.
"""

from __future__ import annotations

from contextlib import suppress

from hmm.errors import DeviceLostError, NoSuchObjectError
from hmm_client.mirror import Mirror


class Releases:
    """The mirrors of one device that were released, and those that are being unregistered."""

    def __init__(self) -> None:
        self._released: list[Mirror] = []
        self._leaving: set[Mirror] = set()

    def note(self, mirror: Mirror) -> None:
        """It was released: because its address space has ended, or because it is being unregistered."""
        if mirror not in self._leaving:
            self._released.append(mirror)

    def take(self) -> Mirror | None:
        """One that is to be unregistered, which is up to the caller from now on; None when there is none."""
        return self._released.pop() if self._released else None

    async def unregister(self, mirror: Mirror) -> None:
        """Unregister a mirror, which may be gone already."""
        self._leaving.add(mirror)
        try:
            with suppress(NoSuchObjectError, DeviceLostError):
                await mirror.unregister()
        finally:
            self._leaving.discard(mirror)
