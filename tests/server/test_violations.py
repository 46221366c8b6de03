"""What devices and drivers did that they must not, asked of the daemon: attributed, bounded, and seen by its owner."""

from __future__ import annotations

import errno as errnos
from typing import Any

import pytest

from hmm_proto.v1 import device_pb2, inspection_pb2, process_pb2, violation_pb2

PAGE = 4096
BASE = 0x10000000000
END = BASE + 4 * PAGE


@pytest.fixture
async def mirrored(served: Any) -> Any:
    """A daemon, a driver, its mirror of a process of four pages, all faulted in."""
    return await served.mirrored(4, filled=True)


async def munmap(served: Any, driver: Any, pid: int, start: int, end: int) -> None:
    """Unmap, and let the driver acknowledge."""
    call = served.munmap(pid, start, end, metadata=(("hmm-caller", "program"),))
    await driver.acknowledge(await driver.events.get())
    await call


async def violations(served: Any, token: str = "", **fields: Any) -> inspection_pb2.GetViolationsResponse:
    """What is reported."""
    metadata = (("hmm-token", token),) if token else ()
    response: inspection_pb2.GetViolationsResponse = await served.inspection.GetViolations(
        inspection_pb2.GetViolationsRequest(**fields), metadata=metadata
    )
    return response


def write(mirror: int, address: int, **fields: Any) -> device_pb2.DeviceWriteRequest:
    """One byte."""
    return device_pb2.DeviceWriteRequest(mirror_id=mirror, addresses=[address], lengths=[1], data=b"x", **fields)


async def test_rejected_answers_are_those_of_the_device_that_is_asked_for(mirrored: Any) -> None:
    """As the violations of its mirrors."""
    served, driver, _, mirror = mirrored
    await driver.answer(mirror_ids=[mirror], acknowledged_up_to=[99])
    await driver.violations.get()
    (device,) = (await served.inspection.ListDevices(inspection_pb2.ListDevicesRequest())).devices
    assert len((await violations(served, device_id=device.device_id)).rejected_answers) == 1
    assert not (await violations(served, device_id=device.device_id + 1)).rejected_answers


async def test_error_names_the_event_its_call_and_who_acknowledged(mirrored: Any) -> None:
    """The reply itself says what had taken the page, for whom, and when the driver gave it up."""
    served, driver, pid, mirror = mirrored
    await munmap(served, driver, pid, BASE, BASE + PAGE)
    reply = await driver.make("device_write", write(mirror, BASE, heard_sequence=1))
    assert reply.result.errno == errnos.EFAULT
    violation = reply.result.violation
    assert violation.kind == violation_pb2.VIOLATION_KIND_USE_AFTER_INVALIDATION
    taking = violation.taking
    assert (taking.event, taking.event_sequence, taking.operation, taking.caller) == ("MUNMAP", 1, "munmap", "program")
    assert (taking.start, taking.end) == (BASE, BASE + PAGE)
    assert taking.acknowledged_by == "probe (pid 42)"
    assert taking.acknowledged_ns > 0
    (report,) = (await violations(served)).mirrors
    assert report.violations == [violation]
    assert dict(report.counts) == {"USE_AFTER_INVALIDATION": 1}


async def test_access_before_the_event_was_heard_means_an_early_answer(mirrored: Any) -> None:
    """heard_sequence says that the access was under way when the driver answered."""
    served, driver, pid, mirror = mirrored
    await munmap(served, driver, pid, BASE, BASE + PAGE)
    reply = await driver.make("device_write", write(mirror, BASE, heard_sequence=0))
    assert reply.result.violation.kind == violation_pb2.VIOLATION_KIND_EARLY_ACKNOWLEDGEMENT


async def test_named_entries_are_compared_with_the_mirrors(mirrored: Any) -> None:
    """An entry of another page is a frame that this address never had; half an entry makes no sense."""
    _, driver, _, mirror = mirrored
    entries = (await driver.fault(mirror, BASE, END)).entries
    good = await driver.make("device_write", write(mirror, BASE, entries=entries[:8]))
    assert good.result.errno == 0
    foreign = await driver.make("device_write", write(mirror, BASE, entries=entries[8:16]))
    assert foreign.result.violation.kind == violation_pb2.VIOLATION_KIND_FOREIGN_FRAME
    assert (await driver.make("device_write", write(mirror, BASE, entries=entries[:16]))).result.errno == errnos.EINVAL
    assert (await driver.make("device_write", write(mirror, BASE, entries=entries[:7]))).reason == "MALFORMED"


async def test_access_is_reported_and_does_not_fail_when_the_mirror_asks_for_that(served: Any) -> None:
    """report_only: reads give ones, writes go nowhere; the report is there for the end."""
    pid = await served.new_process()
    await served.mmap(pid, BASE, END)
    driver = await served.driver()
    mirror = await driver.mirror(pid, report_only=True)
    await driver.fault(mirror, BASE, END)
    await munmap(served, driver, pid, BASE, BASE + PAGE)
    assert (await driver.make("device_write", write(mirror, BASE))).result.errno == 0
    read = await driver.make(
        "device_read", device_pb2.DeviceReadRequest(mirror_id=mirror, addresses=[BASE], lengths=[3])
    )
    assert (read.result.errno, read.data) == (0, b"\xff\xff\xff")
    (report,) = (await violations(served, mirror_id=mirror)).mirrors
    assert [one.write for one in report.violations] == [True, False]


async def test_untracked_write_is_reported_when_the_answer_does_not_tell(mirrored: Any) -> None:
    """Written, given up, never reported as dirty; with the report in the answer all is well."""
    served, driver, pid, mirror = mirrored
    await driver.make("device_write", write(mirror, BASE, untracked=True))
    await munmap(served, driver, pid, BASE, BASE + PAGE)
    (report,) = (await violations(served)).mirrors
    assert report.violations[0].kind == violation_pb2.VIOLATION_KIND_DIRTY_NOT_REPORTED
    assert report.violations[0].taking.operation == "munmap"
    await driver.make("device_write", write(mirror, BASE + PAGE, untracked=True))
    call = served.munmap(pid, BASE + PAGE, BASE + 2 * PAGE)
    event = await driver.events.get()
    await driver.answer(answers=[{"mirror_id": mirror, "event_sequence": event.event_sequences[0],
                                  "dirty": {"starts": [BASE + PAGE], "ends": [BASE + 2 * PAGE]}}])  # fmt: skip
    await call
    (report,) = (await violations(served)).mirrors
    assert dict(report.counts) == {"DIRTY_NOT_REPORTED": 1}


async def test_reports_and_rejections_are_seen_by_their_owner_only(served: Any) -> None:
    """A token sees its own; what is gone is still told."""
    pid = await served.new_process()
    await served.mmap(pid, BASE, END)
    driver = await served.driver(token="mine")
    mirror = await driver.mirror(pid)
    await driver.make("device_write", write(mirror, BASE))
    await driver.answer(mirror_ids=[mirror], acknowledged_up_to=[99])
    await driver.violations.get()
    unregistering = await driver.send("unregister_mirror", device_pb2.UnregisterMirrorRequest(mirror_id=mirror))
    for _ in range(2):
        await driver.acknowledge(await driver.events.get())
    await unregistering
    mine = await violations(served, token="mine")
    assert [(report.mirror_id, report.gone) for report in mine.mirrors] == [(mirror, True)]
    assert [one.violation.event_sequence for one in mine.rejected_answers] == [99]
    theirs = await violations(served, token="theirs")
    assert (len(theirs.mirrors), len(theirs.rejected_answers)) == (0, 0)
    elsewhere = await violations(served, token="mine", device_id=77)
    assert not elsewhere.mirrors


async def test_cpu_calls_carry_no_violation(mirrored: Any) -> None:
    """Only devices break these rules."""
    served, _, pid, _ = mirrored
    response = await served.process.ReadMemory(process_pb2.ReadMemoryRequest(process_id=pid, address=0x1000, length=1))
    assert not response.result.HasField("violation")


async def test_reports_come_in_parts_when_there_are_many(serve: Any) -> None:
    """A part has as many mirrors as fit into a message, or as are asked for; rejected answers are in the first."""
    served = await serve(part_bytes=4096)
    pid = await served.new_process()
    await served.mmap(pid, BASE, END)
    driver = await served.driver()
    mirrors = [await driver.mirror(pid, f"gpu{number}") for number in range(3)]
    for mirror in mirrors:
        for _ in range(64):
            await driver.make("device_write", write(mirror, BASE))
    await driver.answer(mirror_ids=[mirrors[0]], acknowledged_up_to=[99])
    await driver.violations.get()
    whole = await violations(served)
    assert [report.mirror_id for report in whole.mirrors] == mirrors[:2]
    assert len(whole.rejected_answers) == 1
    told, token = list(whole.mirrors), whole.next_page_token
    while token:
        part = await violations(served, page_token=token, page_size=1)
        assert not part.rejected_answers
        told, token = [*told, *part.mirrors], part.next_page_token
    assert [report.mirror_id for report in told] == mirrors
    assert all(len(report.violations) == 64 for report in told)
