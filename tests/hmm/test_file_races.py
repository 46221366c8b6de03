"""Calls that change a file while another one does: they come one after the other, as the inode is locked."""

from __future__ import annotations

from typing import Any

import pytest
from machine_world import RW, START, World, error_of, span

from hmm import commands_device as devices
from hmm import commands_file as files
from hmm import commands_process as processes
from hmm.errors import OutOfFramesError, TimedOutError, WouldDeadlockError
from hmm.events import Delivery
from hmm.file import File
from hmm.inspection import pending
from hmm.limits import Limits
from hmm.mirror import DeadlinePolicy
from hmm.operation_record import Caller, OperationRecord
from hmm.units import PAGE_SIZE
from hmm.unmapped_area import MapFlag


class Truncating(World):
    """A file of four pages of "a", which a mirror has; it is to end after ten bytes, and a driver has not answered."""

    def __init__(self) -> None:
        super().__init__(policy=DeadlinePolicy.FAIL)
        self.file = self.do(files.open_file, "file", create=True)
        self.do(files.write_file, self.file, 0, b"a" * 4 * PAGE_SIZE)
        shared = MapFlag.SHARED | MapFlag.FIXED
        self.do(processes.mmap, self.pid, START, 4 * PAGE_SIZE, RW, shared, self.file)
        self.do(devices.fault, self.mirrors[0], [span(0, 4)], write=True)
        self.truncating: OperationRecord[Any] = self.start(files.truncate_file, self.file, 10)
        self.owed: Delivery
        (self.owed,) = self.sent()

    def contents(self) -> bytes:
        """All bytes of the file."""
        data: bytes = self.do(files.read_file, self.file, 0, 4 * PAGE_SIZE)
        return data


@pytest.fixture
def world() -> Truncating:
    """A file that is being truncated."""
    return Truncating()


def test_write_waits_for_a_truncation_and_finds_nothing_of_what_was_cut_off(world: Truncating) -> None:
    """What is written lasts, and what lay behind the new end reads as zeroes.  Source: fs/open.c, do_truncate()."""
    ends = [world.start(files.write_file, world.file, at, b"b") for at in (20, 2 * PAGE_SIZE)]
    assert not any(write.done for write in ends)
    waiting = pending(world.machine)[1:]
    assert ["a call that changes the file" in blocked.request for blocked in waiting] == [True, True]
    assert [blocked.operations for blocked in waiting] == [(world.truncating.id,)] * 2
    world.machine.answer(world.owed.mirror_id, world.owed.sequence)
    world.settle()
    assert [write.result for write in ends] == [1, 1]
    assert world.contents() == b"a" * 10 + bytes(10) + b"b" + bytes(2 * PAGE_SIZE - 21) + b"b"
    world.machine.check()


def test_truncation_that_fails_leaves_what_comes_after_it_the_whole_file(world: Truncating) -> None:
    """A second truncation begins when the first has put its size back."""
    second = world.start(files.truncate_file, world.file, 3 * PAGE_SIZE)
    world.machine.abandon(world.owed.mirror_id, world.owed.sequence)
    world.resume(world.truncating)
    assert isinstance(error_of(world.truncating), TimedOutError)
    world.machine.answer(world.owed.mirror_id, world.owed.sequence)
    world.settle()
    assert second.error is None
    assert world.contents() == b"a" * 3 * PAGE_SIZE


def test_write_fails_inside_the_callback_that_the_truncation_waits_for(world: Truncating) -> None:
    """EDEADLK: its driver would wait for itself."""
    inside = Caller(name="driver", callback=(world.owed.mirror_id, world.owed.sequence))
    write = world.start(files.write_file, world.file, 0, b"b", caller=inside)
    assert isinstance(error_of(write), WouldDeadlockError)
    world.machine.answer(world.owed.mirror_id, world.owed.sequence)
    world.settle()
    assert world.contents() == b"a" * 10


def test_memory_that_is_about_to_be_mapped_is_not_forgotten() -> None:
    """An mmap waits for a driver of what it maps over; others make room among the files meanwhile."""
    world = World(limits=Limits(frames=64, device_frames=0, files=1))
    shared = MapFlag.SHARED | MapFlag.ANONYMOUS | MapFlag.FIXED
    world.do(devices.fault, world.mirrors[0], [span(0)], write=True)
    mapping = world.start(processes.mmap, world.pid, START, PAGE_SIZE, RW, shared)
    (told,) = world.sent()
    other = world.start(processes.mmap, world.do(processes.create_process), START, PAGE_SIZE, RW, shared)
    assert isinstance(error_of(other), OutOfFramesError)
    world.machine.answer(told.mirror_id, told.sequence)
    world.settle()
    assert mapping.error is None
    (vma,) = world.machine.processes[world.pid].space.vmas.mapped_pieces(span(0))
    assert isinstance(vma.backing, File)
    assert world.machine.files == {vma.backing.id: vma.backing}
