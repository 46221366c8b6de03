"""What the layout that a call meets says about it, where the call itself does not."""

from __future__ import annotations

import dataclasses

import pytest

from hmm.units import AddressRange
from hmm_client.recordings import Call, Interrupted, Origin, Protect
from hmm_client.replay_layouts import attached, changed, gap_above, mapped, moved_pieces
from hmm_client.results import MapsLine

CALL = Call(1, "mprotect", (), None, None, 1, 1, "")
R, RW, X = 1, 3, 4


def line(
    start: int, end: int, permissions: str = "rw-p", file: str = "", offset: int = 0, file_id: int = 0
) -> MapsLine:
    """A mapping, of pages."""
    file_id = file_id or (1 if file else 0)
    return MapsLine(start << 12, end << 12, permissions, offset << 12, file_id, file, 0, 0)


def interrupted(errno: str, first: int, last: int, prot: int, *sealed: tuple[int, int]) -> Interrupted:
    """An mprotect of pages that failed."""
    origin = Origin(0, CALL)
    attempt = Protect(origin, first << 12, (last - first << 12) - 7, prot)
    return Interrupted(origin, errno, attempt, tuple((start << 12, end << 12) for start, end in sealed))


def test_mapped_ends_when_a_hole_comes() -> None:
    """Mappings behind a hole, and below or behind the range, do not count."""
    lines = [line(1, 2), line(2, 4), line(4, 5, "r--p"), line(6, 7)]
    assert list(mapped(lines, AddressRange(0x3000, 0x7000))) == lines[1:3]
    assert list(mapped(lines, AddressRange(0x3000, 0x4000))) == lines[1:2]
    assert list(mapped(lines, AddressRange(0x5000, 0x7000))) == []


def test_detaching_takes_what_lies_where_shmat_put_it_when_other_things_are_between() -> None:
    """ipc/shm.c, ksys_shmdt(): pieces of the same file, at the distance from the address that is their offset."""
    lines = [
        line(9, 10, "rw-s", "/SYSV00000000", 4, 7),  # attached elsewhere
        line(10, 12, "rw-s", "/SYSV00000000", 0, 7),
        line(12, 13),  # mapped over it
        line(13, 14, "r--s", "/SYSV00000000", 3, 7),
        line(14, 15, "rw-s", "/SYSV00000000", 0, 7),  # attached once more
        line(15, 16, "rw-s", "/tmp/x", 5, 8),
        line(16, 17, "rw-s", "/SYSV00000000", 6, 9),  # another segment, moved
    ]
    assert attached(lines, 10 << 12) == [lines[1].span, lines[3].span]
    assert attached(lines, 11 << 12) == []


def test_length_is_the_gap_when_nothing_else_says_it() -> None:
    """mm/mmap.c, vm_unmapped_area(): what is placed top-down ends where something begins, or at the base."""
    lines = [line(1, 2), line(20, 21), line(30, 31)]
    assert gap_above(lines, 0x40000, 17 << 12) == 0x3000
    assert gap_above(lines, 0x40000, 36 << 12) == 28 << 12
    assert gap_above(lines, 0x40000, 50 << 12) == 14 << 12


@pytest.mark.parametrize(
    ("step", "end"),
    [
        (interrupted("EPERM", 1, 9, R, (4, 5)), 4),
        (interrupted("EPERM", 1, 9, R, (7, 8), (3, 4)), 3),
        (interrupted("EPERM", 4, 9, R, (3, 5)), 4),
        (interrupted("EPERM", 1, 9, R), 1),
        (interrupted("EACCES", 1, 9, RW), 5),
        (interrupted("EACCES", 1, 9, R | X), 5),
        (interrupted("EACCES", 1, 5, RW), 1),
        (interrupted("ENOMEM", 1, 9, RW), 3),
        (interrupted("ENOMEM", 3, 9, RW), 3),
        (interrupted("ENOMEM", 1, 3, RW), 1),
    ],
)
def test_mprotect_has_changed_what_lies_below_the_mapping_that_stopped_it(step: Interrupted, end: int) -> None:
    """mm/mprotect.c, mprotect_fixup(): seals, a file that may not be written or executed, and limits stop it."""
    lines = [line(1, 3), line(3, 5, "r--p"), line(5, 7, "r--s", "/lib/x"), line(7, 9, "r--p", "/lib/x")]
    assert changed(lines, step) == end << 12


@pytest.mark.parametrize(("writable", "end"), [((), 3), (("/a",), 5), (("/a", "/b"), 3), (("/a", "/b", "/lib/x"), 3)])
def test_mprotect_passed_what_may_be_written_when_a_file_stopped_it(writable: tuple[str, ...], end: int) -> None:
    """mm/mprotect.c, do_mprotect_pkey(): EACCES where VM_MAYWRITE is missing.

    Shared memory without a file has it, and a file that was mapped to be written was open for that.  If all that lies
    there may be written (a seal has taken the right away since, or another descriptor lacked it), it was the first.
    """
    lines = [line(1, 3, "r--s", "/dev/zero (deleted)"), line(3, 5, "r--s", "/a"), line(5, 7, "r--s", "/b")]
    step = dataclasses.replace(interrupted("EACCES", 1, 7, RW), writable=frozenset(writable))
    assert changed(lines, step) == end << 12


def test_moving_takes_every_mapping_when_holes_are_between() -> None:
    """mm/mremap.c, remap_move(): each mapping moves for itself, cut to the range."""
    lines = [line(1, 4), line(5, 6, "r--p"), line(6, 9)]
    pieces = list(moved_pieces(lines, AddressRange(0x2000, 0x8000)))
    assert pieces == [AddressRange(0x2000, 0x4000), AddressRange(0x5000, 0x6000), AddressRange(0x6000, 0x8000)]
