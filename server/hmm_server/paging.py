"""Long lists, a page at a time: the page token is the last id of the page before.

**Invariants**: what exists during the whole listing is listed once, whatever comes and goes meanwhile.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from hmm.errors import InvalidRequestError
from hmm_proto.convert import malformed, number_from_text


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
    ordered = sorted(keys)
    start = bisect_right(ordered, _last_of(request.page_token)) if request.page_token else 0
    end = start + min(request.page_size or entries_max, entries_max)
    return Page(ordered[start:end], str(ordered[end - 1]) if end < len(ordered) else "")


def _last_of(page_token: str) -> int:
    try:
        return number_from_text(page_token)
    except InvalidRequestError:
        raise malformed(f"page token {page_token[:32]!r} was not given out here") from None
