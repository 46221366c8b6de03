"""Making a recording of any program, with strace.

This module reads the log through a pipe and has strace itself stopped by each line, until the line is read: what the
line is about goes no further meanwhile.  So /proc/PID/maps is read behind the exec, when the layout is that of a
program that has not run an instruction yet, and at the entry of exit_group (and exit) or when a signal is about to end
the program: when it has done its last call.  Nothing announces a SIGKILL from elsewhere: for that it is read when the
program makes no calls for a while.

When the first process execs again (a shell's last command, `env`), the recording begins anew: it is one of the
program that ended.

Source: strace(1); proc(5); fcntl(2), F_SETSIG: Linux fs/pipe.c, pipe_write() signals before it returns.
Invariants: the folder holds a complete recording, or nothing of it.
Absent: replaying; the last moments of a program whose other threads go on mapping memory while one exits; how far its
    stack grew after the last look before a SIGKILL from elsewhere.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import shutil
import signal
import subprocess
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

IDLE_MS = 50
"""How long a program makes no call before its layout is read, in milliseconds."""
_TRACED = "trace=%memory,%process,shmget,memfd_create,personality"
"""The last three say what memory calls do not: how long a segment is, what a file is made of, what may be executed."""
_LINE = re.compile(rb"(\d+)\s+(.*)", re.DOTALL)
_EXIT = re.compile(rb"(exit|exit_group)\(")
_SIGNAL = re.compile(rb"--- SIG(?!CHLD|CONT|STOP|TSTP|TTIN|TTOU|URG|WINCH)(\w+)")
"""One that ends a program by default."""
_KILL = re.compile(rb"(?:kill|tkill|tgkill|rt_sigqueueinfo|rt_tgsigqueueinfo|pidfd_send_signal)\(.*\bSIGKILL\b")
_SIGRT_0 = 32
_READ_BYTES = 1 << 16
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


def record(command: Sequence[str], folder: Path) -> Recorded:
    """Run a command and record its memory calls into a folder.

    The command has this process's standard input and outputs.  Whoever interrupts the recording (KeyboardInterrupt,
    SystemExit) ends the command too.

    Args:
        folder: made if missing; must be empty.

    Raises:
        RecordingError: no strace, no such command, tracing not permitted, a folder that is not empty, or a program
            that was killed in the middle of its calls, so that its final layout was never seen.
    """
    strace = shutil.which("strace")
    if strace is None:
        raise RecordingError("strace is not installed; on Debian: apt-get install strace")
    if not command or shutil.which(command[0]) is None:
        raise RecordingError(f"no such command: {command[0] if command else '(none given)'}")
    with _new_folder(folder), tempfile.TemporaryDirectory(prefix="hmmctl-record-") as scratch:
        pipe = Path(scratch) / "log"
        os.mkfifo(pipe, 0o600)
        with (folder / LOG).open("w+b") as log:
            recorder = _Recorder(log, folder / LOG)
            status = _run([strace, "-f", "-y", "-q", "-o", str(pipe), "-e", _TRACED, "--", *command], pipe, recorder)
        layouts = recorder.layouts(command[0])
        for name, text in zip((INITIAL, FINAL), layouts, strict=True):
            (folder / name).write_bytes(text)
        return Recorded(Recording.load(folder), status if status >= 0 else 128 - status)


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
                _have_it_stopped_by_writing(source, strace.pid)
                _follow(source, strace.pid, recorder)
            except BaseException as error:
                fcntl.fcntl(source, fcntl.F_SETFL, os.O_NONBLOCK)
                strace.terminate()  # it lets the program go, and ends
                strace.send_signal(signal.SIGCONT)
                if isinstance(error, KeyboardInterrupt | SystemExit) and recorder.first is not None:
                    with suppress(ProcessLookupError):
                        os.kill(recorder.first, signal.SIGTERM)
                raise
        return strace.returncode
    finally:
        os.close(source)


def _have_it_stopped_by_writing(source: int, strace_pid: int) -> None:
    """From now on every write to the pipe stops who makes it; it is stopped now, too, whatever it wrote before."""
    fcntl.fcntl(source, fcntl.F_SETSIG, signal.SIGSTOP)
    fcntl.fcntl(source, fcntl.F_SETOWN, strace_pid)
    fcntl.fcntl(source, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
    os.kill(strace_pid, signal.SIGSTOP)


def _follow(source: int, strace_pid: int, recorder: _Recorder) -> None:
    """Give the recorder what strace writes, each time before strace goes on, until it has ended."""
    poll = select.poll()
    poll.register(source, select.POLLIN)
    while True:
        found = os.waitid(os.P_PID, strace_pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert found is not None, "it waited"
        with suppress(BlockingIOError):
            while data := os.read(source, _READ_BYTES):
                recorder.feed(data)
        if found.si_code != os.CLD_STOPPED:
            return
        os.waitid(os.P_PID, strace_pid, os.WSTOPPED)
        os.kill(strace_pid, signal.SIGCONT)
        if not poll.poll(IDLE_MS):
            recorder.look_between_calls()


@dataclass(slots=True)
class _Recorder:
    """Writes down the log of one program, and takes its layouts at the right lines.

    Attributes:
        first: its process.
        final: its layout; empty when a call may have changed it since it was read.
        leaving: threads of it that entered exit.
        ending: all of it is about to end, and what its other threads still do is not waited for.
        killing: somebody sends a SIGKILL: if it is for this process, each call of it may be the last.
    """

    log: IO[bytes]
    path: Path
    first: int | None = None
    initial: bytes = b""
    final: bytes = b""
    leaving: set[int] = field(default_factory=set)
    ending: bool = False
    killing: bool = False
    ended: Ended | None = None
    failed_exec: str | None = None
    tail: bytes = b""
    reader: LogReader = field(init=False)

    def __post_init__(self) -> None:
        self.reader = LogReader(self.path)

    def feed(self, data: bytes) -> None:
        """Take what strace wrote; the last line may be incomplete, as that of a call just entered is."""
        *lines, self.tail = (self.tail + data).split(b"\n")
        for line in lines:
            self.look_for_end(line)
            self.write(line)
        self.look_for_end(self.tail)

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
        self.initial = _read_layout(call.pid)
        self.final, self.ending, self.killing = b"", False, False
        self.leaving.clear()
        self.log.seek(0)
        self.log.truncate()
        unfinished = [f"{pid} {text} <unfinished ...>" for pid, (_, text) in self.reader.entered.items()]
        for line in (f"{call.pid} {call.text}", *unfinished):
            self.log.write(line.encode() + b"\n")

    def look_for_end(self, line: bytes) -> None:
        """Read the layout when a line says that the first process is about to end; forget it when it goes on."""
        found = _LINE.match(line)
        if found is None or self.first is None or self.ending:
            return
        thread, text = int(found[1]), found[2]
        if _KILL.match(text):
            self.killing = True
            self.look_between_calls()
        elif not _is_thread_of(self.first, thread):
            return
        elif called := _EXIT.match(text):
            self.leaving.add(thread)
            self.ending = called[1] == b"exit_group" or self.leaving >= _living_threads(self.first)
        elif received := _SIGNAL.match(text):
            self.ending = _is_fatal(thread, received[1].decode())
        elif not (text.startswith((b"+++", b"---")) or text.endswith(b"<unfinished ...>")):
            # A call that is killed as it begins does nothing: the layout is the one before it.
            self.final = _read_layout(self.first) if self.killing else b""
        if self.ending:
            self.final = _read_layout(thread)

    def look_between_calls(self) -> None:
        """Read the layout of a program that may be killed without another word."""
        if self.first is not None and not self.final:
            self.final = _read_layout(self.first)

    def layouts(self, program: str) -> tuple[bytes, bytes]:
        """The first and the last layout.

        Raises:
            RecordingError: one of them was not seen; the text says why.
        """
        if self.first is None:
            raise RecordingError(f"strace recorded nothing; {_HELP}")
        if not self.initial:
            raise RecordingError(f"{program} can't be executed: {self.failed_exec}")
        if not self.final:
            how = f"{self.ended.signal} ended it" if self.ended is not None and self.ended.signal else "it ended"
            raise RecordingError(f"the final layout of {program} was not seen: {how} in the middle of its calls")
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


def _living_threads(process: int) -> set[int]:
    """Those that have not ended; the first one stays as a zombie."""
    living = set()
    for task in Path(f"/proc/{process}/task").glob("*"):
        with suppress(OSError):
            if (task / "stat").read_bytes().rpartition(b")")[2].split()[0] not in {b"Z", b"X"}:
                living.add(int(task.name))
    return living


def _is_fatal(thread: int, name: str) -> bool:
    """Whether a signal, without SIG, that is about to be delivered to a thread ends its process."""
    real_time = name.removeprefix("RT_")
    number = _SIGRT_0 + int(real_time) if real_time != name else signal.Signals[f"SIG{name}"].value
    status = Path(f"/proc/{thread}/status").read_text("utf-8", "replace")
    heeded = re.findall(r"^Sig(?:Ign|Cgt):\t([0-9a-f]+)$", status, re.MULTILINE)
    return not any(int(mask, 16) >> (number - 1) & 1 for mask in heeded)
