"""Replies that carry arrays with a word for each page: copied once, into the message that leaves.

**Invariants**: all arrays of one reply are equally long; parts put together are the whole.

**Absent**: which calls have such replies (device_calls.py, hmm_calls.py), how parts travel (session.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from hmm.units import Entries
from hmm_proto import convert

Arrays = Mapping[str, bytes]
"""Fields of a response, and what belongs in them."""


class ArrayReply(NamedTuple):
    """A response without its arrays, and the arrays, uint64[npages] each, by the names of their fields."""

    response: Any
    arrays: Mapping[str, Entries]

    def whole(self) -> Any:
        """The response with its arrays."""
        for name, array in self.arrays.items():
            setattr(self.response, name, convert.entries_to_proto(array))
        return self.response

    def without_arrays(self) -> ArrayReply:
        """The same for a caller who does not want them."""
        return ArrayReply(self.response, {})

    def parts(self, part_bytes: int) -> Iterator[tuple[Any, Arrays, bool]]:
        """Cut a long reply; everything but the arrays is in the last part.

        Yields: a response, its arrays, whether more follow.
        """
        npages = max((array.size for array in self.arrays.values()), default=0)
        step = max(1, (part_bytes >> 3) // max(1, len(self.arrays)))
        last = max(0, npages - 1) // step * step
        for start in range(0, last, step):
            yield type(self.response)(), self._slice(start, start + step), True
        yield self.response, self._slice(last, npages), False

    def _slice(self, start: int, end: int) -> Arrays:
        return {name: convert.entries_to_proto(array[start:end]) for name, array in self.arrays.items()}
