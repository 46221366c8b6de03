"""Long lists, a page at a time: the page token is the last id of the page before, or the address that it reached.

**Source**: of mappings, Linux fs/proc/task_mmu.c, m_start(): the next page begins with what lies behind that address.

**Invariants**: what exists during the whole listing is listed once, whatever comes and goes meanwhile; a page of
mappings fits into a message.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from google.protobuf.message import Message

from hmm.errors import InvalidRequestError
from hmm.units import TASK_SIZE, AddressRange
from hmm.vma import Vma
from hmm.vma_map import VmaMap
from hmm_proto.convert import malformed, number_from_text

M = TypeVar("M", bound=Message)


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


def mappings_of(
    vmas: VmaMap, request: ListRequest, entries_max: int, part_bytes: int, make: Callable[[Vma], M]
) -> tuple[list[M], str]:
    """Mappings as messages, ascending, and the token of the next page.

    Raises:
        InvalidRequestError: the token is none that was given out (EINVAL).

    Cost: that of `make` for each of the page, and O(mappings).
    """
    start = _last_of(request.page_token) if request.page_token else 0
    if start >= TASK_SIZE:
        return [], ""
    most = min(request.page_size or entries_max, entries_max)
    page: list[M] = []
    size_bytes = 0
    reached = start
    for vma in vmas.overlapping(AddressRange(start, TASK_SIZE)):
        message = make(vma)
        size_bytes += message.ByteSize()
        if page and (len(page) == most or size_bytes > part_bytes):
            return page, str(reached)
        page.append(message)
        reached = vma.end
    return page, ""


def fitting(messages: Iterable[M], part_bytes: int) -> list[M]:
    """The first of some messages, as many as fit into one: one at least, if there is any; no more of them are made."""
    fit: list[M] = []
    size_bytes = 0
    for message in messages:
        size_bytes += message.ByteSize()
        if fit and size_bytes > part_bytes:
            break
        fit.append(message)
    return fit


def _last_of(page_token: str) -> int:
    try:
        return number_from_text(page_token)
    except InvalidRequestError:
        raise malformed(f"page token {page_token[:32]!r} was not given out here") from None
