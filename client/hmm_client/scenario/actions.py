"""What the steps of a scenario do: memory calls, what drivers do, holds, failures.

**Invariants**: addresses are looked up when a step is taken, not before.

**Absent**: waiting, expectations and what is looked at (`run.py`).
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

from hmm.errors import InvalidRequestError
from hmm.mremap import MremapFlag
from hmm.units import AddressRange, page_up
from hmm.unmapped_area import MapFlag
from hmm_client.client import Client
from hmm_client.file import File
from hmm_client.harness.holds import Harness, Hold
from hmm_client.interval_driver import IntervalDriver
from hmm_client.mirror import Mirror
from hmm_client.pin import Pin
from hmm_client.process import Process
from hmm_client.results import Mapped
from hmm_client.scenario import today, values
from hmm_client.scenario.driver import Driven
from hmm_client.scenario.model import Step
from hmm_client.scenario.program import Program
from hmm_client.userfaultfd import Userfaultfd
from hmm_proto.v1 import event_pb2

T = TypeVar("T")


class Actions:
    """The things of a scenario, and what can be done with them.

    Attributes:
        processes, files, driven, programs, holds, pins, userfaultfds: by name.
        labels: ranges that were mapped, by name.
    """

    def __init__(self, client: Client) -> None:
        self.processes: dict[str, Process] = {}
        self.files: dict[str, File] = {}
        self.driven: dict[str, Driven] = {}
        self.programs: dict[str, Program] = {}
        self.holds: dict[str, Hold] = {}
        self.pins: dict[str, Pin] = {}
        self.userfaultfds: dict[str, Userfaultfd] = {}
        self.labels: dict[str, AddressRange] = {}
        self._harness = Harness(client)

    def take(self, step: Step) -> Coroutine[Any, Any, object]:
        """Do what a step says.

        Returns: a result of `hmm_client`: Completed, bytes, a number, or None.

        Raises:
            HmmError: how the call ended.
            ProgramError: how what a program was asked for ended.
            HoldEndedError: a hold had ended before its time.
        """
        match step.kind:
            case "process":
                return self._process_call(self.processes[step.subject], step)
            case "driver":
                return self._driver_call(self.driven[step.subject], step)
            case "program":
                return self._program_call(self.programs[step.subject], step)
            case "file":
                return self._file_call(self.files[step.subject], step)
            case "fail":
                return self._fail(step)
            case _:
                return self._hold_step(step)

    # ---- processes

    async def _process_call(self, process: Process, step: Step) -> object:
        given = step.arguments
        result: object = None
        match step.call:
            case "mmap":
                result = self._label(given["as"], await self._mmap(process, step))
            case "mremap":
                result = self._label(given["as"], await self._mremap(process, step))
            case "fork":
                self.processes[given["as"]] = await process.fork()
            case "exit":
                result = await process.exit()
            case "mrelease":
                result = await process.mrelease()
            case "clear_refs":
                result = await process.clear_refs(given["what"])
            case "write":
                result = await process.write(self._address(given["at"]), given["data"])
            case "unpin":
                await self.pins.pop(given["pin"]).unpin()
            case "userfaultfd":
                userfaultfd = self.userfaultfds[given["as"]] = await process.userfaultfd().open()
                await userfaultfd.register(self._span(given).page_aligned())
            case "copy":
                data = given["data"].ljust(page_up(len(given["data"])), b"\0")
                await self.userfaultfds[given["userfaultfd"]].copy(self._address(given["at"]), data)
            case "close":
                await self.userfaultfds.pop(given["userfaultfd"]).close()
            case _:
                result = await self._range_call(process, step, self._span(given))
        return result

    async def _range_call(self, process: Process, step: Step, span: AddressRange) -> object:
        given = step.arguments
        match step.call:
            case "munmap":
                return await process.munmap(span.start, span.size_bytes)
            case "mprotect":
                return await process.mprotect(span.start, span.size_bytes, given["prot"])
            case "madvise":
                return await process.madvise(span.start, span.size_bytes, given["advice"])
            case "read":
                return await process.read(span.start, span.size_bytes)
            case "pin":
                self.pins[given["as"]] = await process.pin(span.page_aligned(), write=given["write"])
                return None
            case _:
                return await process.touch(span.start, span.size_bytes, write=given["write"])

    async def _mmap(self, process: Process, step: Step) -> Mapped:
        given = step.arguments
        file = self.files[given["file"]] if given["file"] else None
        flags = given["flags"] or MapFlag.PRIVATE
        flags |= MapFlag(0) if file else MapFlag.ANONYMOUS
        address = self._address(given["at"]) if given["at"] else 0
        return await process.mmap(
            given["length"], given["prot"], flags, address=address, file=file, offset=given["offset"]
        )

    async def _mremap(self, process: Process, step: Step) -> Mapped:
        span, to = self._span(step.arguments), step.arguments["to"]
        flags = MremapFlag.MAYMOVE | (MremapFlag.FIXED if to else MremapFlag(0))
        target = self._address(to) if to else 0
        new_length = step.arguments["new_length"]
        return await process.mremap(span.start, span.size_bytes, new_length, flags, new_address=target)

    # ---- drivers

    async def _driver_call(self, driven: Driven, step: Step) -> object:
        given = step.arguments
        if step.call in today.CALLS and not (driven.mirrors and step.call in today.MIGRATIONS):
            return await today.today_call(driven, step, self._span(given) if "at" in given else None)
        match step.call:
            case "mirror":
                process = self.processes[given["process"]]
                driven.mirrors[given["process"]] = await driven.device.mirror(
                    process, driven.driver, policy=given["policy"], misbehaviour=driven.script
                )
            case "attach":
                process = self.processes[given["process"]]
                driven.attached[given["process"]] = await driven.device.attach(
                    process, IntervalDriver(), misbehaviour=driven.script
                )
            case "behave":
                driven.behave(given["on_update"], given["on_fault"])
                driven.driver.inside = given["inside"] or driven.driver.inside
            case "held":
                await driven.script.wait_held(given["count"])
            case "release":
                driven.script.release()
            case "inside":
                driven.driver.tell()
            case "read_on":
                (await driven.client.session()).go_on_reading()
            case "die":
                (await driven.client.session()).drop()
            case "leave":
                await driven.client.close()
            case _:
                return await self._mirror_call(driven.mirror(given["mirrors"]), step)
        return None

    async def _mirror_call(self, mirror: Mirror, step: Step) -> object:
        given = step.arguments
        match step.call:
            case "unregister":
                await mirror.unregister()
            case "answer":
                for _ in range(given["times"]):
                    answer = event_pb2.Answer(mirror_id=mirror.id, event_sequence=given["sequence"])
                    mirror.session.answer(mirror.id, given["sequence"], answer)
            case "write":
                await mirror.write([(self._address(given["at"]), len(given["data"]))], given["data"])
            case _:
                return await self._mirror_range_call(mirror, step, self._span(given))
        return None

    async def _mirror_range_call(self, mirror: Mirror, step: Step, span: AddressRange) -> object:
        given = step.arguments
        match step.call:
            case "fault":
                faulted = await mirror.fault(span.page_aligned(), write=given["write"], wait=given["wait"])
                return int((faulted.entries != 0).sum())
            case "table":
                return int(((await mirror.read_table(span.page_aligned())) != 0).sum())
            case "to_device":
                return (await mirror.migrate(span.page_aligned())).npages
            case "to_system":
                return (await mirror.migrate_back(span.page_aligned())).npages
            case "dirty":
                await mirror.dirty(span.page_aligned())
            case "discard":
                await mirror.discard(span.page_aligned())
            case _:
                return await mirror.read([(span.start, span.size_bytes)])
        return None

    # ---- programs

    async def _program_call(self, program: Program, step: Step) -> object:
        given = step.arguments
        if step.call in ("kill", "stop", "go_on", "end"):
            await getattr(program, step.call)()
            return None
        process = _first_or(self.processes, given["process"], "process")
        match step.call:
            case "mirror":
                await program.mirror(process)
            case "unmirror":
                await program.unmirror(process)
            case "read":
                span = self._span(given)
                return await program.read(process, span.start, span.size_bytes)
            case _:
                await program.write(process, self._address(given["at"]), given["data"])
        return None

    # ---- files, holds, failures

    async def _file_call(self, file: File, step: Step) -> object:
        given = step.arguments
        match step.call:
            case "truncate":
                return await file.truncate(given["size"])
            case "punch":
                return await file.punch(given["offset"], given["length"])
            case _:
                await file.write(given["offset"], given["data"])
                return None

    async def _hold_step(self, step: Step) -> None:
        if step.kind == "hold":
            await self._hold(step)
        elif step.kind == "reached":
            await self.holds[step.subject].reached()
        else:
            await self.holds[step.subject].release()

    async def _hold(self, step: Step) -> None:
        given = step.arguments
        process, driver = given["process"], given["driver"]
        hold = self._harness.hold(
            given["point"],
            given["operation"],
            process=self.processes[process] if process else None,
            mirror=self.driven[driver].of(process) if driver else None,
            skip=given["skip"],
        )
        self.holds[step.subject] = await hold.__aenter__()

    async def _fail(self, step: Step) -> None:
        given = step.arguments
        if step.subject == "allocation":
            await self._harness.fail_allocation(given["nth"])
        else:
            driven, nth = _first_or(self.driven, given["driver"], "driver"), given["nth"]
            match step.subject:
                case "copy":
                    await self._harness.fail_copy(driven.of(given["mirrors"]), nth)
                case "migrate to ram":
                    await self._harness.fail_migrate_to_ram(driven.device, nth)
                case _:
                    await self._harness.fail_dma_mapping(driven.device, nth)

    # ---- places

    def _label(self, name: str | None, mapped: Mapped) -> Mapped:
        if name:
            self.labels[name] = AddressRange(mapped.address, page_up(mapped.address + mapped.length))
        return mapped

    def _address(self, place: str) -> int:
        label, _, offset = (part.strip() for part in place.partition("+"))
        start = self.labels[label].start if label in self.labels else int(label, 16)
        return start + (values.offset(offset) if offset else 0)

    def _span(self, given: Any) -> AddressRange:
        start = self._address(given["at"])
        if given["length"] is not None:
            return AddressRange(start, start + given["length"])
        label = given["at"].partition("+")[0].strip()
        return AddressRange(start, max(start, self.labels[label].end) if label in self.labels else start + 1)


def _first_or(known: dict[str, T], name: str | None, kind: str) -> T:
    if not known:
        raise InvalidRequestError(f"there is no {kind}")
    return known[name or next(iter(known))]
