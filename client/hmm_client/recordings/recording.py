"""A recording of one program: its memory calls, and its layout before the first and after the last of them.

    FOLDER/strace.log      strace -f -y -e trace=%memory,%process
    FOLDER/maps.initial    /proc/PID/maps of the first process, right after its exec
    FOLDER/maps.final      the same, when it was about to exit

Source: Linux fs/binfmt_elf.c (where the stack, the loader and the break lie), fs/proc/task_mmu.c.
Invariants: a Recording can be planned: its log is read and its calls are understood.
Absent: how recordings are made (`record`), and what they are replayed against.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hmm.units import TASK_SIZE, page_up
from hmm_client.recordings.arguments import ArgumentError, string
from hmm_client.recordings.errors import RecordingError
from hmm_client.recordings.maps import STACK, VDSO, VSYSCALL, Area, read_maps
from hmm_client.recordings.plan import FIRST, Plan, make_plan
from hmm_client.recordings.steps import Map, Remap
from hmm_client.recordings.strace import Log, read_log

LOG = "strace.log"
INITIAL = "maps.initial"
FINAL = "maps.final"


@dataclass(frozen=True, slots=True)
class Recording:
    """A folder, read and planned.

    Attributes:
        folder: where it came from.
        log: the calls as they stand in the log.
        initial: layout of the first process at the start, without [vsyscall].
        final: its layout at the end, without [vsyscall].
        plan: the steps between the two.
    """

    folder: Path
    log: Log
    initial: tuple[Area, ...]
    final: tuple[Area, ...]
    plan: Plan

    @classmethod
    def load(cls, folder: Path | str) -> Recording:
        """Read a recording.

        Raises:
            RecordingError: a file is missing, empty or not understood; the text names file and line.

        Cost: O(size), about 30 µs per call.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise RecordingError("no such folder" if not folder.exists() else "not a folder", folder)
        missing = [name for name in (LOG, INITIAL, FINAL) if not (folder / name).is_file()]
        if missing:
            raise RecordingError(f"not a recording: it has no {' and no '.join(missing)}", folder)
        log = read_log(folder / LOG)
        initial = tuple(area for area in read_maps(folder / INITIAL) if area.name != VSYSCALL)
        if initial[-1:] and initial[-1].end > TASK_SIZE:
            raise RecordingError(f"no process has memory at {initial[-1].end - 1:#x}", folder / INITIAL)
        final = tuple(area for area in read_maps(folder / FINAL) if area.name != VSYSCALL)
        return cls(folder, log, initial, final, make_plan(log, initial, final))

    def require_comparable(self) -> None:
        """Nothing, if the last layout can be compared.

        Raises:
            RecordingError: the first process started another program, whose first layout was not recorded.
        """
        if self.plan.incomparable is not None:
            raise RecordingError(f"it cannot be compared: {self.plan.incomparable}", self.folder)

    @property
    def program(self) -> str:
        """What to call it: the folder's name."""
        return self.folder.resolve().name

    @property
    def command(self) -> str:
        """Path of the program that ran; empty when the log does not begin with its exec."""
        first = self.log.calls[0]
        try:
            return string(first.arguments[0]) if first.name == "execve" else ""
        except (ArgumentError, IndexError):
            return ""

    @property
    def mmap_base(self) -> int:
        """Where top-down placement begins, in bytes.

        The kernel's own base lies where the loader ends, and [vdso] below it: they are placed first.  Where [vdso] lies
        above the stack (before 6.16), it is the end of the highest mapping below the stack.
        """
        stack = next((area.start for area in self.initial if area.name == STACK), None)
        below = [area for area in self.initial if stack is None or area.end <= stack]
        vdso = next((index for index, area in enumerate(below) if area.name == VDSO), None)
        if vdso is None:
            return max((area.end for area in below), default=0)
        while vdso + 1 < len(below) and below[vdso].end == below[vdso + 1].start:
            vdso += 1
        return below[vdso].end

    @property
    def brk_start(self) -> int | None:
        """The break at the start, in bytes, not page-aligned; None when the program never asked."""
        pid = self.plan.processes[FIRST].pid
        return next((call.result for call in self.log.calls if call.name == "brk" and call.pid == pid), None)

    def file_sizes(self) -> dict[str, int]:
        """How large each mapped file must be at least for every mapping to lie inside it.

        Returns: name -> bytes, a multiple of the page size, in order of first use.

        Cost: O(steps).
        """
        sizes: dict[str, int] = {}
        for name, end in self._file_extents():
            sizes[name] = max(sizes.get(name, 0), page_up(end))
        return sizes

    def _file_extents(self) -> Iterator[tuple[str, int]]:
        for area in (*self.initial, *self.final):
            if area.source:
                yield area.source, area.offset + area.length
        mapped: dict[tuple[int, int], tuple[str, int]] = {}
        for step in self.plan.steps:
            if isinstance(step, Map) and step.source:
                yield step.source, step.offset + step.length
                mapped[step.process, step.recorded] = step.source, step.offset
            elif isinstance(step, Remap) and (step.process, step.address) in mapped:
                source, offset = mapped.pop((step.process, step.address))
                yield source, offset + step.new_length
                mapped[step.process, step.recorded] = source, offset
