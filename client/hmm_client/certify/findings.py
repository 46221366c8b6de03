"""What counts as wrong, and how it is found: the daemon's reports, its view of the mirrors, and what the driver says.

Causes come before consequences: a driver that used a stale page, was refused and could not answer has done one thing
wrong.  Of one trial the consequences are told only when nothing explains them.

**Invariants**: every finding names a rule.

**Absent**: provoking it (`adversities`, `storm`).
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass

from hmm.units import AddressRange
from hmm.violation import Violation, ViolationKind
from hmm_client.certify.driver_process import DriverGoneError, DriverSilentError
from hmm_client.client import Client
from hmm_proto.v1 import inspection_pb2
from hmm_proto.violations import violation_from_proto

RULES = {
    "use-after-invalidation": ViolationKind.USE_AFTER_INVALIDATION.rule,
    "stale-fault": "what a fault has returned is thrown away when an event has taken it back meanwhile",
    "early-acknowledgement": ViolationKind.EARLY_ACKNOWLEDGEMENT.rule,
    "write-after-fork": "after FORK a device writes no page of the parent before it has faulted it for writing again",
    "write-after-write-protect": "after WRITE_PROTECT a device only reads, until it has faulted for writing again",
    "read-only-write": ViolationKind.READ_ONLY_WRITE.rule,
    "foreign-frame": ViolationKind.FOREIGN_FRAME.rule,
    "no-translation": ViolationKind.NO_TRANSLATION.rule,
    "access-after-fence": ViolationKind.ACCESS_AFTER_FENCE.rule,
    "dirty-not-reported": ViolationKind.DIRTY_NOT_REPORTED.rule,
    "dma-mapping-kept": ViolationKind.DMA_MAPPING_KEPT.rule,
    "unanswered": "every event is answered within the deadline",
    "refused": "an invalidation is not refused: whatever the driver answers, the page goes, and the mirror with it",
    "never-sent": "only events that were sent are answered",
    "old-epoch": "answers name the stream that the event came on",
    "rejected-answer": "answers follow the protocol",
    "lease-over": "a driver that has set a migration up takes the next step before its lease is over",
    "unfinalized": "a migration is finalized when its order is answered: whoever touches its pages waits for that",
    "lost-contents": "a page that is migrated holds what it held: it is copied to its own destination",
    "leaked-mirror": "a mirror that is no longer used is unregistered",
    "lost-session": "a driver whose session broke ends, or comes back with a new one",
    "died": "a driver does not end before its standard input does",
    "did-not-leave": "a driver leaves when its standard input ends",
    "silent": "a driver answers what it is asked",
    "unfinished": "a trial ends in time; its report says who waits for whom",
    "access-failed": "a device reaches what is mapped",
    "access-succeeded": "a device does not reach what is not mapped",
    "wrong-data": "a device sees what the CPU sees, and the other way round",
}
"""Every rule, in words."""
REJECTIONS = frozenset({"never-sent", "old-epoch", "rejected-answer"})
CONSEQUENCES = frozenset({"access-failed", "access-succeeded", "wrong-data", "silent"})
_KINDS = {
    ViolationKind.USE_AFTER_INVALIDATION: "use-after-invalidation",
    ViolationKind.EARLY_ACKNOWLEDGEMENT: "early-acknowledgement",
    ViolationKind.FOREIGN_FRAME: "foreign-frame",
    ViolationKind.NO_TRANSLATION: "no-translation",
    ViolationKind.ACCESS_AFTER_FENCE: "access-after-fence",
    ViolationKind.DIRTY_NOT_REPORTED: "dirty-not-reported",
    ViolationKind.DMA_MAPPING_KEPT: "dma-mapping-kept",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a driver got wrong.

    Attributes:
        rule: a key of RULES.
        detail: where and when, in words.
    """

    rule: str
    detail: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.detail}"


def causes_first(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The first finding of each rule; consequences only when there is no cause."""
    first: dict[str, Finding] = {}
    for finding in findings:
        first.setdefault(finding.rule, finding)
    if REJECTIONS.intersection(first):
        first.pop("unanswered", None)  # it was answered, in a way that does not count
    if {"unanswered", "died"}.intersection(first):
        first.pop("access-after-fence", None)  # the driver has not been told yet
    if "stale-fault" in first:
        first.pop("use-after-invalidation", None)  # the same, where chance has brought it about
    if "unanswered" in first:
        for rule in ("unfinished", "leaked-mirror"):  # a mirror that may wait cannot be unregistered either
            first.pop(rule, None)
    if "unfinalized" in first:
        first.pop("lease-over", None)
    causes = first.keys() - CONSEQUENCES - {"unfinished"}
    return tuple(finding for rule, finding in first.items() if not causes or rule not in CONSEQUENCES)


class Auditor:
    """Looks at the daemon, as anybody can, and remembers what it has told already."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._told: set[int] = set()
        self._rejections = 0
        self._leases_over = 0

    async def pending(self) -> inspection_pb2.GetPendingResponse:
        """Who waits for whom."""
        request = inspection_pb2.GetPendingRequest()
        answer: inspection_pb2.GetPendingResponse = await self._client.channel.request(
            self._client.inspection.GetPending, request
        )
        return answer

    async def mirrors(self, space_ids: frozenset[int]) -> list[inspection_pb2.MirrorStatus]:
        """The mirrors of some address spaces."""
        request = inspection_pb2.ListDevicesRequest()
        answer = await self._client.channel.request(self._client.inspection.ListDevices, request)
        return [mirror for device in answer.devices for mirror in device.mirrors if mirror.space_id in space_ids]

    async def spaces(self, process_ids: Iterable[int]) -> frozenset[int]:
        """The address spaces of some processes."""
        wanted = set(process_ids)
        request = inspection_pb2.ListProcessesRequest()
        answer = await self._client.channel.request(self._client.inspection.ListProcesses, request)
        return frozenset(one.space_id for one in answer.processes if one.process_id in wanted)

    async def reported(self, overtaken: Container[int] = ()) -> list[Finding]:
        """What the daemon reports and was not told yet.

        Args:
            overtaken: operations whose events came while a fault of the same page was under way.
        """
        answer: inspection_pb2.GetViolationsResponse = await self._client.channel.request(
            self._client.inspection.GetViolations, inspection_pb2.GetViolationsRequest()
        )
        findings = []
        for report in answer.mirrors:
            if report.mirror_id not in self._told:
                self._told.add(report.mirror_id)
                violations = [violation_from_proto(message) for message in report.violations]
                findings += [_of_violation(one, overtaken) for one in violations if one is not None]
        for rejected in answer.rejected_answers:
            if rejected.time_ns > self._rejections:
                self._rejections = rejected.time_ns
                findings += _of_rejection(rejected.violation.rule)
        return findings + await self._leases()

    async def _leases(self) -> list[Finding]:
        request = inspection_pb2.GetStatisticsRequest()
        answer = await self._client.channel.request(self._client.inspection.GetStatistics, request)
        told, self._leases_over = self._leases_over, answer.daemon.errors.get("LEASE_ENDED", 0)
        if self._leases_over == told:
            return []
        return [Finding("lease-over", "hmmd has ended a migration: its driver took no step for as long as its lease")]

    async def unfinalized(self, span: AddressRange) -> list[inspection_pb2.Holding]:
        """Migrations of pages of a range that a driver has set up and not finalized."""
        held = [holding for holding in (await self.pending()).holdings if holding.migration_id]
        return [one for one in held if one.ranges.starts[0] < span.end and span.start < one.ranges.ends[-1]]


def _of_violation(violation: Violation, overtaken: Container[int]) -> Finding:
    stale = violation.taking is not None and violation.taking.operation_id in overtaken
    if stale and violation.kind is ViolationKind.USE_AFTER_INVALIDATION:
        return Finding("stale-fault", str(violation))
    if violation.kind is not ViolationKind.READ_ONLY_WRITE:
        return Finding(_KINDS[violation.kind], str(violation))
    event = violation.taking.event if violation.taking else ""
    rules = {"FORK": "write-after-fork", "WRITE_PROTECT": "write-after-write-protect"}
    return Finding(rules.get(event, "read-only-write"), str(violation))


def _of_rejection(rule: str) -> list[Finding]:
    if rule.startswith("DEVICE_LOST"):
        return []  # how a driver that was too slow hears of it
    if rule.startswith("epoch"):
        return [Finding("old-epoch", rule)]
    return [Finding("never-sent" if "never sent" in rule else "rejected-answer", rule)]


def of_driver(error: DriverGoneError | DriverSilentError, when: str = "") -> Finding:
    """What it is called that the driver is gone, or does not answer."""
    return Finding("died" if isinstance(error, DriverGoneError) else "silent", f"{when}{error}")


def of_mirror(status: inspection_pb2.MirrorStatus, *, alive: bool) -> list[Finding]:
    """What the state of a mirror says, whose process is alive or has ended."""
    if status.state == "lost":
        rule = "died" if "without Bye" in status.lost_because or "cut off" in status.lost_because else "unanswered"
        return [Finding(rule, f"mirror {status.mirror_id} was fenced: {status.lost_because}")]
    if status.state == "released" and alive:
        return [Finding("refused", f"mirror {status.mirror_id} was killed: {status.lost_because}")]
    return []
