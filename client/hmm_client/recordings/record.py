"""Making a recording of any program, with strace.

strace holds the program still at two moments, by injecting a delay: behind each exec, when the layout is that of a
program that has not run an instruction yet, and at the entry of exit_group (and exit), when it has done its last
call.  This module reads the log through a pipe, sees these moments as they come, and reads /proc/PID/maps then.

strace injects nothing into the exec that it starts a command with.  So it starts a launcher, which execs the command.

When the first process execs again (a shell's last command, `env`), the recording begins anew: it is one of the
program that ended.

Source: strace(1), -e inject=...:delay_enter, delay_exit; proc(5).
Invariants: the folder holds a complete recording, or nothing of it.
Absent: replaying; the last moments of a program whose other threads go on mapping memory while one exits.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from hmm_client.recordings.errors import RecordingError
from hmm_client.recordings.order import EXECUTING
from hmm_client.recordings.recording import FINAL, INITIAL, LOG, Recording
from hmm_client.recordings.strace import Call, Ended, LogReader

DELAY_S = 0.5
"""How long a process is held at exec and at exit, in seconds: time for this process to wake up and read."""
THREAD_DELAY_S = 0.1
"""How long a thread is held at exit: only the last one of a program without exit_group matters."""
_TRACED = "trace=%memory,%process,shmget,memfd_create,personality"
"""The last three say what memory calls do not: how long a segment is, what a file is made of, what may be executed."""
_ENDING = re.compile(rb"(\d+)\s+(exit|exit_group)\(")
_READ_BYTES = 1 << 16
# The interpreter ignores two signals and may set LC_CTYPE: the command gets both as we got them.  Unlike env(1) and
# sh(1) it takes no file for a script that the kernel can't execute.
_LAUNCHER = """
import os, signal, sys
for number in (signal.SIGPIPE, signal.SIGXFSZ):
    signal.signal(number, signal.SIG_DFL)
with open("/proc/self/environ", "rb") as block:
    environment = dict(entry.split(b"=", 1) for entry in block.read().split(b"\\0") if b"=" in entry)
try:
    os.execve(sys.argv[1], sys.argv[2:], environment)
except OSError:
    sys.exit(126)
"""
_HELP = (
    "its message is above. If it may not trace: kernel.yama.ptrace_scope must be below 2, "
    "and a container needs the capability SYS_PTRACE and a seccomp profile that allows ptrace"
)


@dataclass(frozen=True, slots=True)
class Recorded:
    """A recording just made.

    Attributes:
        recording: read back from its folder.
        status: the command's exit status; 128 + n when signal n ended it.
    """

    recording: Recording
    status: int


def record(command: Sequence[str], folder: Path, *, delay_s: float = DELAY_S) -> Recorded:
    """Run a command and record its memory calls into a folder.

    The command has this process's standard input and outputs.  Every process it makes is held for `delay_s` at each
    exec and at its exit.  Whoever interrupts the recording (KeyboardInterrupt, SystemExit) ends the command too.

    Args:
        folder: made if missing; must be empty.

    Raises:
        RecordingError: no strace, no such command, tracing not permitted, a folder that is not empty, or a program
            that a signal ended, so that its final layout was never seen.
    """
    strace = shutil.which("strace")
    if strace is None:
        raise RecordingError("strace is not installed; on Debian: apt-get install strace")
    program = shutil.which(command[0]) if command else None
    if program is None:
        raise RecordingError(f"no such command: {command[0] if command else '(none given)'}")
    with _new_folder(folder), tempfile.TemporaryDirectory(prefix="hmmctl-record-") as scratch:
        pipe = Path(scratch) / "log"
        os.mkfifo(pipe, 0o600)
        with (folder / LOG).open("w+b") as log:
            recorder = _Recorder(log, folder / LOG)
            launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, program]
            status = _run([strace, *_options(pipe, delay_s), "--", *launcher, *command], pipe, recorder)
        layouts = recorder.layouts(command[0])
        for name, text in zip((INITIAL, FINAL), layouts, strict=True):
            (folder / name).write_bytes(text)
        return Recorded(Recording.load(folder), status if status >= 0 else 128 - status)


def _options(pipe: Path, delay_s: float) -> list[str]:
    delay, thread_delay = (int(seconds * 1e6) for seconds in (delay_s, min(delay_s, THREAD_DELAY_S)))
    options = ["-f", "-y", "-q", "-o", str(pipe), "-e", _TRACED]
    options += ["-e", f"inject={','.join(sorted(EXECUTING))}:delay_exit={delay}"]
    options += ["-e", f"inject=exit_group:delay_enter={delay}"]
    return [*options, "-e", f"inject=exit:delay_enter={thread_delay}"]


@contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    """An empty folder, which is as it was before when the body fails."""
    existed = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise RecordingError("the folder is not empty", folder)
    except OSError as error:
        raise RecordingError(error.strerror or str(error), folder) from error
    try:
        yield
    except BaseException:
        for name in (LOG, INITIAL, FINAL):
            (folder / name).unlink(missing_ok=True)
        if not existed:
            folder.rmdir()
        raise


def _run(command: list[str], pipe: Path, recorder: _Recorder) -> int:
    """Run strace and follow its log; its exit status, which is the command's."""
    source = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        with subprocess.Popen(command) as strace:
            try:
                _follow(source, strace.pid, recorder)
            except BaseException as error:
                strace.terminate()  # it lets the program go, and ends
                if isinstance(error, KeyboardInterrupt | SystemExit) and recorder.first is not None:
                    with suppress(ProcessLookupError):
                        os.kill(recorder.first, signal.SIGTERM)
                raise
        return strace.returncode
    finally:
        os.close(source)


def _follow(source: int, strace_pid: int, recorder: _Recorder) -> None:
    """Give the recorder what strace writes, as it writes it, until strace has ended."""
    ended = os.pidfd_open(strace_pid)
    try:
        poll = select.poll()
        poll.register(source, select.POLLIN)
        poll.register(ended, select.POLLIN)
        while True:
            ready = dict(poll.poll())
            data = os.read(source, _READ_BYTES) if source in ready or ended in ready else b""
            if data:
                recorder.feed(data)
                if recorder.just_began and source not in dict(poll.poll(0)):
                    recorder.just_began = False
            elif ended in ready:
                return
            elif source in ready:  # strace closed its log; it is about to end
                poll.unregister(source)
    finally:
        os.close(ended)


@dataclass(slots=True)
class _Recorder:
    """Writes down the log of one program, and takes its layouts at the right lines.

    Attributes:
        launched: the exec of the launcher was seen.
        just_began: an exec of the first process was seen, and what strace wrote up to the reading of its layout is
            not all read yet.  A line of the process among that means that it was held no longer: `late`.
    """

    log: IO[bytes]
    path: Path
    first: int | None = None
    launched: bool = False
    initial: bytes = b""
    final: bytes = b""
    ended: Ended | None = None
    failed_exec: str | None = None
    tail: bytes = b""
    tail_seen: bool = False
    just_began: bool = False
    late: bool = False
    reader: LogReader = field(init=False)

    def __post_init__(self) -> None:
        self.reader = LogReader(self.path)

    def feed(self, data: bytes) -> None:
        """Take what strace wrote; the last line may be incomplete, as that of a call just entered is."""
        *lines, tail = (self.tail + data).split(b"\n")
        for line in lines:
            self.late = self.late or (self.just_began and self._is_of_first(line))
            if not self.tail_seen:
                self.look_for_end(line)
            self.tail_seen = False
            self.write(line)
        self.late = self.late or (self.just_began and self._is_of_first(tail))
        self.tail = tail
        if not self.tail_seen:
            self.tail_seen = self.look_for_end(tail)

    def write(self, line: bytes) -> None:
        self.log.write(line + b"\n")
        self.reader.read(line.decode("utf-8", "backslashreplace"))
        for event in self.reader.events:
            if self.first is None:
                self.first = event.pid
            if isinstance(event, Call) and event.name in EXECUTING and event.pid == self.first:
                self.look_at_exec(event)
            elif isinstance(event, Ended) and event.pid == self.first:
                self.ended = event
        self.reader.events.clear()

    def look_at_exec(self, call: Call) -> None:
        if not call.succeeded:
            self.failed_exec = call.errno
            return
        if not self.launched:
            self.launched = True
            return
        self.initial = _read_layout(call.pid)
        self.just_began, self.late = True, False
        self.final = b""
        self.log.seek(0)
        self.log.truncate()
        unfinished = [f"{pid} {text} <unfinished ...>" for pid, (_, text) in self.reader.entered.items()]
        for line in (f"{call.pid} {call.text}", *unfinished):
            self.log.write(line.encode() + b"\n")

    def look_for_end(self, line: bytes) -> bool:
        """Read the layout when a line says that the first process is about to end."""
        found = _ENDING.match(line)
        if found is None:
            return False
        first, thread = self.first, int(found[1])
        if first is not None and _is_thread_of(first, thread):
            leaves_nobody = found[2] == b"exit_group" or _is_last_thread(first, thread)
            self.final = (_read_layout(thread) if leaves_nobody else b"") or self.final
        return True

    def _is_of_first(self, line: bytes) -> bool:
        return self.first is not None and line.startswith(b"%d " % self.first)

    def layouts(self, program: str) -> tuple[bytes, bytes]:
        """The first and the last layout.

        Raises:
            RecordingError: one of them was not seen; the text says why.
        """
        if self.first is None:
            raise RecordingError(f"strace recorded nothing; {_HELP}")
        if not self.initial and self.failed_exec:
            raise RecordingError(f"{program} can't be executed: {self.failed_exec}")
        if self.ended is not None and self.ended.signal:
            raise RecordingError(f"{program} was ended by {self.ended.signal}; its final layout was not seen")
        if self.late or not self.initial or not self.final:
            moment = "exit" if self.initial and not self.late else "start"
            raise RecordingError(f"the layout of {program} at its {moment} was not seen in time; try a longer delay")
        return self.initial, self.final


def _read_layout(pid: int) -> bytes:
    """/proc/PID/maps; empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/maps").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
    except OSError as error:
        raise RecordingError(f"can't read the layout of process {pid}: {error.strerror}") from error


def _is_thread_of(process: int, thread: int) -> bool:
    return thread == process or Path(f"/proc/{process}/task/{thread}").exists()


def _is_last_thread(process: int, thread: int) -> bool:
    """True when every other thread of the process has ended; the first one stays as a zombie."""
    for task in Path(f"/proc/{process}/task").glob("*"):
        with suppress(OSError):
            state = (task / "stat").read_bytes().rpartition(b")")[2].split()[0]
            if int(task.name) != thread and state not in {b"Z", b"X"}:
                return False
    return True
