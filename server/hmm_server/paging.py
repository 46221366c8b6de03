"""Long lists, a page at a time: the page token is the last id of the page before.

**Invariants**: what exists during the whole listing is listed once, whatever comes and goes meanwhile.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from hmm_proto.convert import malformed


class ListRequest(Protocol):
    """What every list request has."""

    page_size: int
    page_token: str


@dataclass(frozen=True, slots=True)
class Page:
    """Some ids, ascending, and where to go on; an empty token ends the list."""

    keys: list[int]
    next_token: str


def page_of(keys: Iterable[int], request: ListRequest, entries_max: int) -> Page:
    """The page that a request asks for.

    Raises:
        InvalidRequestError: the token is none that was given out (EINVAL).
    """
    if request.page_token and not request.page_token.isdecimal():
        raise malformed(f"page token {request.page_token[:32]!r} was not given out here")
    ordered = sorted(keys)
    start = bisect_right(ordered, int(request.page_token or 0))
    end = start + min(request.page_size or entries_max, entries_max)
    return Page(ordered[start:end], str(ordered[end - 1]) if end < len(ordered) else "")
