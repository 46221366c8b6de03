"""What tests of address spaces share: frames, spaces, files, and somebody who runs operations to their end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from area import BASE, PRIVATE, RW

from hmm.address_space import AddressSpace, SpaceLimits
from hmm.checked import Checked
from hmm.dispatch import Audience, Dispatch
from hmm.events import Delivery, Event, EventState
from hmm.file import File, FileKind
from hmm.fork import fork
from hmm.frames import Frames
from hmm.machine import Machine
from hmm.mman import MapFlag, mmap
from hmm.operation import Await, Current, Deliver, Operation, Pause, WaitFor
from hmm.spans import Spans
from hmm.subscriber import Home
from hmm.units import PAGE_SIZE, Address
from hmm.vma import Prot, VmFlag

T = TypeVar("T")


@dataclass(eq=False)
class Listener:
    """A mirror that hears of everything and keeps what it heard."""

    id: int
    events: list[Event] = field(default_factory=list)
    state: EventState = EventState.ACKNOWLEDGED
    home: Home | None = None
    may_abandon: bool = False
    is_selective: bool = False
    sequence: int = 0
    counters: Counter[str] = field(default_factory=Counter)

    def settling(self, _: Spans) -> bool:
        """Never."""
        return False

    def hears(self, event: Event) -> bool:
        """Every event."""
        return event.etype != 0

    def awaits_late_answer(self) -> bool:
        """Never."""
        return False

    def settle(self, _: Delivery) -> bool:
        """An answer never kills it."""
        return True


@dataclass
class World:
    """Frames, address spaces and files, without a machine round them.

    Attributes:
        meanwhile: called whenever an operation waits for mirrors, before they answer.
        pauses: how often an operation let others go first.
        spaces: that it has made.
    """

    frames: Frames
    current: Current = field(default_factory=lambda: Current(1))
    listeners: dict[int, Listener] = field(default_factory=dict)
    meanwhile: Callable[[], object] | None = None
    pauses: int = 0
    ids: int = 0
    spaces: list[AddressSpace] = field(default_factory=list)

    def new_id(self) -> int:
        """A number nobody has."""
        self.ids += 1
        return self.ids

    def space(self, **limits: int) -> AddressSpace:
        """An empty address space."""
        self.spaces.append(AddressSpace(self.new_id(), self.frames, self.current, SpaceLimits(**limits)))
        return self.spaces[-1]

    def fork(self, space: AddressSpace) -> AddressSpace:
        """A child of a space."""
        child = self.space()
        self.run(fork(space, child))
        return child

    def file(self, npages: float = 0, kind: FileKind = FileKind.FILE, **more: Any) -> File:
        """A file of so many pages, with one handle open."""
        file = File(self.new_id(), "file", kind, self.frames, int(npages * PAGE_SIZE), **more)
        file.open()
        return file

    def device_file(self, vm_flags: VmFlag) -> File:
        """A driver's device file."""
        return self.file(kind=FileKind.DEVICE, vm_flags=vm_flags)

    def shared_memory(self, size_bytes: int) -> File:
        """The object behind shared anonymous memory."""
        return File(self.new_id(), "", FileKind.SHARED_MEMORY, self.frames, size_bytes)

    def map(
        self,
        space: AddressSpace,
        npages: int,
        prot: Prot = RW,
        flags: MapFlag = PRIVATE,
        file: File | None = None,
        *,
        at: int = 0,
        offset: int = 0,
    ) -> Address:
        """Map pages at page number `at` behind BASE; `offset` in pages."""
        flags |= MapFlag(0) if file else MapFlag.ANONYMOUS
        start, length = BASE + at * PAGE_SIZE, npages * PAGE_SIZE
        return self.run(mmap(space, start, length, prot, flags, file, offset * PAGE_SIZE, self.shared_memory))

    def listen(self, space: AddressSpace) -> Listener:
        """Let a mirror listen to a space."""
        listener = Listener(self.new_id())
        space.notifier.subscribe(listener)
        self.listeners[listener.id] = listener
        return listener

    def run(self, operation: Operation[T]) -> T:
        """Run an operation to its end; mirrors answer as their `state` says."""
        reply: object = None
        while True:
            try:
                request = operation.send(reply)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            reply = self.answer(request)

    def answer(self, request: object) -> object:
        """What an operation gets for a request."""
        if isinstance(request, Pause):
            self.pauses += 1
            return None
        assert isinstance(request, Deliver), f"waits for ever: {request}"
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()
        listeners = [self.listeners[mirror_id] for mirror_id in request.mirrors]
        dispatch = Dispatch(request.event, 0, Audience(tuple(listeners)), [], set())
        for listener in listeners:
            listener.events.append(request.event)
            dispatch.sequences.append(len(listener.events))
            if listener.state is not EventState.ACKNOWLEDGED:
                delivery = Delivery(listener.id, len(listener.events), request.event, 0, listener.state)
                dispatch.outcomes[listener.id] = delivery
        return dispatch

    def start(self, operation: Operation[Any]) -> Await:
        """Run an operation up to where it waits for others."""
        request = operation.send(None)
        assert isinstance(request, Await), request
        return request

    def start_meanwhile(self, operation: Operation[Any]) -> list[WaitFor]:
        """Start another call's operation while mirrors are waited for.  Returns: what it waits for, from then on."""
        waiting: list[WaitFor] = []

        def meanwhile() -> None:
            self.current.operation_id = 2
            waiting.append(self.start(operation).wait_for)

        self.meanwhile = meanwhile
        return waiting


@pytest.fixture(autouse=True)
def invariants_hold_in_the_end(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every machine that a test has made is checked when it ends, unless it is marked as one that breaks something."""
    made: list[Machine] = []
    make = Machine.__init__

    def note(machine: Machine, *args: Any, **options: Any) -> None:
        make(machine, *args, **options)
        made.append(machine)

    monkeypatch.setattr(Machine, "__init__", note)
    yield
    if request.node.get_closest_marker("breaks_invariants") is None:
        for machine in made:
            machine.check()


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """A world with 1023 free frames, which is checked in the end as machines are."""
    made = World(Frames(1024, 64))
    yield made
    if request.node.get_closest_marker("breaks_invariants") is None:
        made.frames.check()
        for space in made.spaces:
            space.check(Checked())


@pytest.fixture
def space(world: World) -> AddressSpace:
    """An address space."""
    return world.space()
