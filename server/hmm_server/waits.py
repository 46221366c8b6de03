"""Who waits for whom, and why: the answer to GetPending.

The core knows operations, requests and blockers; ages, deadlines and what was sent are the daemon's.

**Absent**: who may see what (services/inspection.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from hmm import inspection
from hmm.events import EventState
from hmm.inspection import Blocked, Holding
from hmm.receiver import DeadlinePolicy
from hmm.units import MirrorId
from hmm_proto import convert
from hmm_proto.v1 import inspection_pb2, types_pb2
from hmm_server.circles import Edge, circles
from hmm_server.executor import Executor, Running
from hmm_server.holds import Hold
from hmm_server.served import Stream
from hmm_server.streams import Streams

Sees = Callable[[str], bool]
"""Whether an owner's things may be shown."""


class Waits:
    """Looks at what waits on one daemon."""

    def __init__(self, executor: Executor, streams: Streams) -> None:
        self._executor = executor
        self._machine = executor.machine
        self._streams = streams

    def pending(self, now_s: float, sees: Sees) -> inspection_pb2.GetPendingResponse:
        """Everything that waits, oldest first.

        Args:
            now_s: on the monotonic clock.
        """
        blocked = [
            one for one in inspection.pending(self._machine)
            if sees(self._executor.running[one.operation_id].record.caller.token)
        ]  # fmt: skip
        operations = [self._operation(one, now_s) for one in blocked]
        operations += [
            self._ended(running, now_s) for running in self._executor.running.values()
            if running.record.done and sees(running.record.caller.token)
        ]  # fmt: skip
        return inspection_pb2.GetPendingResponse(
            operations=operations,
            cycles=[wait_cycle(circle) for circle in circles(self._edges(blocked))],
            streams=[stream_status(stream, now_s) for stream in self._streams.open.values() if sees(stream.owner)],
            holds=[hold_status(hold, now_s) for hold in self._executor.holds.placed.values() if sees(hold.owner)],
            holdings=[self._holding(one) for one in inspection.holdings(self._machine) if sees(one.owner)],
            broken_spaces=[
                inspection_pb2.BrokenSpace(space_id=one.space_id, process_ids=one.processes, because=one.because)
                for one in inspection.broken(self._machine)
                if sees(one.owner)
            ],
        )

    def _holding(self, one: Holding) -> inspection_pb2.Holding:
        stream = self._streams.holder(one.mirror_id, one.pin)
        left_s = self._streams.leases.left_s(stream, one.migration)
        return inspection_pb2.Holding(
            mirror_id=one.mirror_id,
            pin_id=one.pin,
            space_id=one.space_id,
            ranges=convert.ranges_to_proto(one.spans),
            page_count=one.npages,
            driver_name=stream.name if stream else "",
            driver_pid=stream.pid if stream else 0,
            migration_id=one.migration,
            lease_ms=_milliseconds(left_s),
        )

    def _ended(self, running: Running, now_s: float) -> inspection_pb2.PendingOperation:
        """A call that has its result, and is held before its caller is told."""
        record = running.record
        return inspection_pb2.PendingOperation(
            operation_id=record.id,
            name=record.name,
            caller=record.caller.name,
            space_id=running.space_id,
            waits_for="the end of a hold",
            age_ms=_milliseconds(now_s - running.started_s),
            abandoned_by_caller=running.given_up,
            held=self._held(record.id, now_s),
        )

    def _held(self, operation_id: int, now_s: float) -> inspection_pb2.HoldStatus | None:
        hold = self._executor.holds.of(operation_id)
        return hold_status(hold, now_s) if hold else None

    def _operation(self, one: Blocked, now_s: float) -> inspection_pb2.PendingOperation:
        running = self._executor.running[one.operation_id]
        processes = inspection.processes_of(self._machine, one.space_id)
        migration = inspection.migration_of(self._machine, running.record)
        return inspection_pb2.PendingOperation(
            operation_id=one.operation_id,
            name=one.name,
            caller=one.caller,
            process_id=processes[0] if processes else 0,
            space_id=one.space_id,
            waits_for=one.request,
            ranges=convert.ranges_to_proto(one.event.spans if one.event else ()),
            blocked_by=one.operations,
            events=[self._event(mirror_id, sequence, running, now_s) for mirror_id, sequence in one.answers],
            age_ms=_milliseconds(now_s - running.started_s),
            abandoned_by_caller=running.given_up,
            held=self._held(one.operation_id, now_s),
            userfault=_userfault(one),
            migration=None if migration is None else self._holding(migration),
        )

    def _event(self, mirror_id: MirrorId, sequence: int, running: Running, now_s: float) -> inspection_pb2.PendingEvent:
        mirror = self._machine.receivers[mirror_id]
        sent = mirror.unanswered[sequence]
        served = self._streams.served.get(mirror_id)
        event = inspection_pb2.PendingEvent(
            mirror_id=mirror_id,
            event_sequence=sequence,
            type=convert.event_type_to_proto(sent.event.etype),
            state=convert.event_state_to_proto(sent.state),
            age_ms=_milliseconds(now_s - running.event_s) if running.event_s else 0,
            policy=convert.policy_to_proto(mirror.policy),
            driver_name=served.stream.name if served else "",
            driver_pid=served.stream.pid if served else 0,
        )
        if sent.state is EventState.SENT and served and sequence not in served.outstanding:
            event.state = types_pb2.EVENT_STATE_QUEUED
        if running.due_s and mirror.policy is not DeadlinePolicy.BLOCK:
            event.deadline_ms = _milliseconds(running.event_s + self._executor.acknowledgement_s - now_s)
        return event

    def _edges(self, blocked: Iterable[Blocked]) -> dict[int, list[Edge]]:
        """For every call the calls that have to get on first, through drivers that owe answers if need be."""
        inside: dict[tuple[MirrorId, int], list[int]] = defaultdict(list)
        unmarked: dict[int, list[Running]] = defaultdict(list)
        for running in self._executor.running.values():
            if running.record.replied:
                continue  # nobody waits for it any more but those who want its pages
            callback = running.record.caller.callback
            if callback is not None:
                inside[callback].append(running.record.id)
            elif running.epoch:
                unmarked[running.epoch].append(running)
        edges: dict[int, list[Edge]] = {}
        for one in blocked:
            edges[one.operation_id] = [Edge(other) for other in one.operations]
            migration = inspection.migration_of(self._machine, self._executor.running[one.operation_id].record)
            if migration is not None:
                stream = self._streams.holder(migration.mirror_id, 0)
                edges[one.operation_id] += [
                    Edge(other.record.id, migration.mirror_id, suspected=True)
                    for other in unmarked[stream.epoch if stream else 0]
                ]
            for mirror_id, sequence in one.answers:
                served = self._streams.served.get(mirror_id)
                edges[one.operation_id] += [Edge(other, mirror_id) for other in inside[mirror_id, sequence]]
                edges[one.operation_id] += [
                    Edge(other.record.id, mirror_id, suspected=True)
                    for other in unmarked[served.stream.epoch if served else 0]
                    if other.started_s >= self._executor.running[one.operation_id].event_s  # not made before the event
                ]
        return edges


def _userfault(one: Blocked) -> inspection_pb2.PendingUserfault | None:
    if one.userfaultfd is None:
        return None
    told = one.userfault is not None and one.userfault.told
    return inspection_pb2.PendingUserfault(
        userfaultfd_id=one.userfaultfd.id, handler=one.userfaultfd.handler, told=told
    )


def wait_cycle(edges: Sequence[tuple[int, Edge]]) -> inspection_pb2.WaitCycle:
    """A circle as a message, from its calls and the edge that leaves each."""
    return inspection_pb2.WaitCycle(
        operation_ids=[operation_id for operation_id, _ in edges],
        mirror_ids=[edge.mirror_id for _, edge in edges if edge.mirror_id],
        suspected=any(edge.suspected for _, edge in edges),
    )


def stream_status(stream: Stream, now_s: float) -> inspection_pb2.StreamStatus:
    """One open stream and how full it is."""
    mailbox = stream.mailbox
    return inspection_pb2.StreamStatus(
        epoch=stream.epoch,
        driver_name=stream.name,
        driver_pid=stream.pid,
        mirror_ids=sorted(stream.mirrors),
        unanswered_events=mailbox.in_flight,
        credit=mailbox.window.credit,
        queued_events=len(mailbox.events),
        queued_bytes=mailbox.reply_bytes,
        silent_ms=_milliseconds(now_s - stream.heard_s),
    )


def hold_status(hold: Hold, now_s: float) -> inspection_pb2.HoldStatus:
    """One hold, as a message."""
    return inspection_pb2.HoldStatus(
        hold_id=hold.id,
        point=hold.where.point.value,
        owner=hold.name,
        lease_ms=_milliseconds(hold.until_s - now_s),
        operation_id=hold.operation_id,
        awaits=str(hold.where),
    )


def _milliseconds(seconds: float) -> int:
    return max(0, round(seconds * 1000))
