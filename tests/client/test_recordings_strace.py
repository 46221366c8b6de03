"""What strace prints, read back."""

from __future__ import annotations

from pathlib import Path

import pytest

from hmm_client.recordings import Call, Log, RecordingError, parse_log, read_log
from hmm_client.recordings.arguments import (
    ArgumentError,
    Descriptor,
    descriptor,
    fields,
    flag_names,
    flags,
    number,
    split,
    string,
    unescape,
)
from hmm_client.recordings.flags import MADV, MAP, PROT
from hmm_client.recordings.strace import Ended, Signal, Superseded


def read(text: str) -> Log:
    """A log of these lines."""
    return parse_log(line.strip() for line in text.strip().split("\n"))


def only_call(text: str) -> Call:
    """The call of a log that holds one."""
    (call,) = read(text).calls
    return call


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("NULL", 0),
        ("0", 0),
        ("4096", 4096),
        ("-1", -1),
        ("0600", 0o600),
        ("0x7f14e3893000", 0x7F14E3893000),
        ("0xc8 /* MADV_??? */", 200),
        (" 0x7ffe /* 38 vars */", 0x7FFE),
    ],
)
def test_number_reads_every_notation_when_strace_uses_it(text: str, value: int) -> None:
    """Pointers are hexadecimal or NULL, modes octal, everything else decimal."""
    assert number(text) == value


@pytest.mark.parametrize("text", ["", "abc", "0x", "089", "12 monkeys", '"1"'])
def test_number_refuses_a_text_when_it_is_none(text: str) -> None:
    """A text that is no number is never taken for 0."""
    with pytest.raises(ArgumentError, match="is not a number"):
        number(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("MAP_PRIVATE|MAP_ANONYMOUS", 0x22),
        ("MAP_PRIVATE|0x40", 0x42),
        ("MAP_PRIVATE|MAP_ANONYMOUS|MAP_HUGETLB|21<<MAP_HUGE_SHIFT", 0x40022 | 21 << 26),
        ("MAP_FILE|MAP_ANONYMOUS", 0x20),
        ("0 /* MAP_??? */", 0),
        ("0x3 /* PROT_READ|PROT_WRITE */", 3),
    ],
)
def test_flags_are_summed_when_names_and_numbers_are_mixed(text: str, value: int) -> None:
    """Bits that strace has no name for stand as a number among the names."""
    assert flags(text, MAP) == value


def test_flags_refuse_a_name_when_it_is_unknown() -> None:
    """A flag that nobody knows may change what a call does: it is not dropped."""
    with pytest.raises(ArgumentError, match="unknown flag 'MAP_NEW'"):
        flags("MAP_PRIVATE|MAP_NEW", MAP)
    assert flags("PROT_READ|PROT_GROWSDOWN", PROT) == 0x1000001
    assert flags("0x66 /* MADV_??? */", MADV) == 102
    assert flag_names("CLONE_VM|SIGCHLD") == {"CLONE_VM", "SIGCHLD"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-1", Descriptor(-1, None)),
        ("3", Descriptor(3, None)),
        ("3</lib/libc.so.6>", Descriptor(3, "/lib/libc.so.6")),
        ("5</memfd:x>(deleted)", Descriptor(5, "/memfd:x")),
        ("5</tmp/x (deleted)>", Descriptor(5, "/tmp/x")),
        ("4<anon_inode:[perf_event]>", Descriptor(4, "anon_inode:[perf_event]")),
        ("6<socket:[1234]>", Descriptor(6, "socket:[1234]")),
        ("1</dev/pts/0<char 136:0>>", Descriptor(1, "/dev/pts/0<char 136:0>")),
        (r"3</tmp/a\74b\76\303\244\n\\x>", Descriptor(3, "/tmp/a<b>ä\n\\x")),
        ("AT_FDCWD</home/x>", Descriptor(-100, "/home/x")),
    ],
)
def test_descriptor_gives_the_path_when_strace_knows_it(text: str, expected: Descriptor) -> None:
    """With -y a descriptor carries what it is open on; brackets in it are escaped."""
    assert descriptor(text) == expected


def test_descriptor_and_string_refuse_a_text_when_it_is_something_else() -> None:
    """Both name the text they could not read."""
    with pytest.raises(ArgumentError, match="'NULL' is not a file descriptor"):
        descriptor("NULL")
    with pytest.raises(ArgumentError, match="'NULL' is not a string"):
        string("NULL")
    assert string(r'"a\"b\tc"...') == 'a"b\tc'


def test_unescape_keeps_bytes_when_they_are_no_text() -> None:
    """A path need not be UTF-8: its bytes stay to be seen."""
    assert unescape(r"\xff\377") == r"\xff\xff"
    assert unescape("plain") == "plain"


def test_split_ignores_commas_when_they_are_inside_something() -> None:
    """Strings, structures, arrays, remarks and annotations are one argument each."""
    text = r'"a,\"b)", {x=1, y={2, 3}}, [4, 5], 3</a,b)c<char 1:3>>, 7 /* a, b) */, 21<<MAP_HUGE_SHIFT) = 0'
    parts, end = split(text)
    assert parts == (
        r'"a,\"b)"',
        "{x=1, y={2, 3}}",
        "[4, 5]",
        "3</a,b)c<char 1:3>>",
        "7 /* a, b) */",
        "21<<MAP_HUGE_SHIFT",
    )
    assert text[end:] == " = 0"
    assert split(")") == ((), 1)
    assert split("1, 2") == (("1", "2"), None)


def test_fields_name_the_members_when_a_structure_is_printed() -> None:
    """What the call wrote back stands behind an arrow and belongs to the result."""
    assert fields("{flags=CLONE_VM|CLONE_VFORK, stack=0x7f, set={1, 2}} => {parent_tid=[7]}") == {
        "flags": "CLONE_VM|CLONE_VFORK",
        "stack": "0x7f",
        "set": "{1, 2}",
    }
    assert fields("child_stack=NULL, flags=SIGCHLD") == {"child_stack": "NULL", "flags": "SIGCHLD"}


@pytest.mark.parametrize(
    ("line", "result", "errno"),
    [
        ("brk(NULL) = 0x556f4cff6000 (DELAYED)", 0x556F4CFF6000, None),
        ("munmap(0x1000, 4096) = 0", 0, None),
        ("mmap(NULL, 0, 0, 0, -1, 0) = -1 EINVAL (Invalid argument)", -1, "EINVAL"),
        ("mmap(NULL, 0, 0, 0, -1, 0) = -1 ENOMEM (Cannot allocate memory) (INJECTED)", -1, "ENOMEM"),
        ("fork() = ? ERESTARTNOINTR (To be restarted)", None, "ERESTARTNOINTR"),
        ("exit_group(0) = ?", None, None),
        ("fcntl(1, F_GETFL) = 0x8001 (flags O_WRONLY|O_LARGEFILE)", 0x8001, None),
        ("dup(3</tmp/a>) = 4</tmp/a>(deleted)", 4, None),
        ("poll([{fd=3}], 1, 0) = 0 (Timeout)", 0, None),
        ("madvise(0x1000, 4096, MADV_FREE) = 0 <0.000012>", 0, None),
        ("odd(1) = -1 (errno 530)", -1, "errno 530"),
    ],
)
def test_call_has_its_result_when_it_is_on_one_line(line: str, result: int | None, errno: str | None) -> None:
    """Errors have names, delays and remarks behind the result mean nothing, `?` is no result."""
    call = only_call("7 " + line)
    assert (call.result, call.errno) == (result, errno)
    assert call.returned is (result is not None)
    assert call.failed is (result == -1)
    assert call.succeeded is (result not in {None, -1})


@pytest.mark.parametrize(
    "prefix",
    ["", "123 ", "  123 ", "123<python3> ", "[pid   123] ", "12:00:01 ", "123 12:00:01.123456 ", "123 1700000000.5 "],
)
def test_call_has_its_process_when_the_line_begins_with_more(prefix: str) -> None:
    """Times (-t, -r) and command names (-Y) may stand before a call; a single process may be nameless."""
    call = only_call(f"{prefix}mlockall(MCL_CURRENT) = 0")
    assert call.pid == (123 if "123 " in prefix or "123]" in prefix or "123<" in prefix else 0)
    assert (call.name, call.arguments) == ("mlockall", ("MCL_CURRENT",))


def test_split_call_is_one_when_other_lines_interrupt_it() -> None:
    """`<unfinished ...>` and `<... resumed>` are two halves of one call, which knows both lines."""
    log = read(
        """
        1 mmap(NULL, 8192, PROT_NONE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0 <unfinished ...>
        2 clone3({flags=CLONE_VM, stack_size=0x7fff80} <unfinished ...>
        1 <... mmap resumed>)               = 0x7000
        2 <... clone3 resumed> => {parent_tid=[9]}, 88) = 9
        2 vfork( <unfinished ...>
        2 <... vfork resumed>)              = 10
        """
    )
    mmap, clone, vfork = log.calls
    assert (mmap.line, mmap.end_line, mmap.result, len(mmap.arguments)) == (1, 3, 0x7000, 6)
    assert (clone.line, clone.end_line, clone.result) == (2, 4, 9)
    assert fields(clone.arguments[0])["stack_size"] == "0x7fff80"
    assert (vfork.arguments, vfork.result, vfork.is_split) == ((), 10, True)


@pytest.mark.parametrize(
    "end",
    [
        "1 <... mmap resumed>) = ?",
        "1 <... mmap resumed> <unfinished ...>) = ?",
        "1 +++ killed by SIGKILL +++",
        "2 munmap(0x1000, 4096) = 0",
    ],
)
def test_call_has_no_result_when_its_thread_never_came_back(end: str) -> None:
    """A thread that is killed inside a call leaves it unfinished, in one of several ways."""
    mmap = read(f"1 mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE, -1, 0 <unfinished ...>\n{end}").calls[0]
    assert (mmap.name, mmap.result, mmap.errno, mmap.returned) == ("mmap", None, None, False)


def test_events_tell_how_threads_end_when_they_do() -> None:
    """Exit, signal and core dump are told apart; a delivered signal is an event of its own."""
    log = read(
        """
        1 --- SIGCHLD {si_signo=SIGCHLD, si_code=CLD_EXITED, si_pid=2} ---
        1 --- stopped by SIGSTOP ---
        2 +++ exited with 3 +++
        3 +++ killed by SIGKILL +++
        4 +++ killed by SIGSEGV (core dumped) +++
        """
    )
    assert log.events == (
        Signal(1, 1, "SIGCHLD"),
        Signal(1, 2, "SIGSTOP"),
        Ended(2, 3, 3, None),
        Ended(3, 4, None, "SIGKILL"),
        Ended(4, 5, None, "SIGSEGV"),
    )


@pytest.mark.parametrize(
    "entry",
    [
        '2 execve("/bin/true", ["true"], 0x7ffd /* 3 vars */ <pid changed to 1 ...>',
        '2 execve("/bin/true", ["true"], 0x7ffd /* 3 vars */ <unfinished ...>',
    ],
)
def test_execve_returns_under_the_leaders_id_when_another_thread_called_it(entry: str) -> None:
    """The kernel gives a thread that execs the id of its process; strace says so on two more lines."""
    log = read(
        f"""
        1 wait4(-1,  <unfinished ...>
        {entry}
        1 +++ superseded by execve in pid 2 +++
        1 <... execve resumed>) = 0
        """
    )
    wait, execve = log.calls
    assert (wait.name, wait.result) == ("wait4", None)
    assert (execve.pid, execve.line, execve.end_line, execve.result) == (1, 2, 4, 0)
    assert Superseded(1, 3, 2) in log.events


def test_call_has_a_name_when_strace_knows_only_its_number() -> None:
    """mseal and map_shadow_stack are younger than the strace of Debian 12."""
    assert only_call("syscall_0x1ce(0x7000, 0x1000, 0, 0, 0, 0) = 0").name == "mseal"
    assert only_call("syscall_0x1c5(0, 0x1000, 0, 0, 0, 0) = 0x7000").name == "map_shadow_stack"
    assert only_call("syscall_0x1f4(0x1) = -1 ENOSYS (Function not implemented)").name == "syscall_0x1f4"
    assert only_call("????( <unfinished ...>").name == "????"
    assert only_call("???( <unfinished ...>").name == "???"


def test_remarks_of_strace_are_no_events_when_they_stand_in_the_log() -> None:
    """What strace says about itself is not what the program did."""
    log = read("strace: Process 7 attached\n[ Process PID=7 runs in 32 bit mode. ]\n\nmunlockall() = 0")
    assert [call.line for call in log.calls] == [4]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("1 munmap(0x1000, 4096) = 0\n1 <... mmap resumed>) = 0", "mmap resumes, but process 1 has entered no call"),
        ("1 munmap(0x1000, 4096) = 0\n1 munmap(0x1000", "the call has no result"),
        ("1 munmap(0x1000, 4096) = 0\n1 hello world", "not a line of strace: 'hello world'"),
        ("1 munmap(0x1000, 4096) = 0\n1 +++ ascended +++", "not a line of strace: '+++ ascended +++'"),
        ("1 munmap(0x1000, 4096) = 0\nmunmap(0x1000, 4096) = 0", "some lines name their process and some do not"),
        ("1 munmap(0x1000, 4096) = 0\n1 ---", "not a line of strace: '---'"),
    ],
)
def test_log_is_refused_with_its_line_when_strace_would_not_write_it(lines: str, message: str) -> None:
    """A log that can't be understood is not replayed in part."""
    with pytest.raises(RecordingError) as caught:
        parse_log(lines.split("\n"), Path("some/strace.log"))
    assert str(caught.value).startswith("some/strace.log:2: ")
    assert message in str(caught.value)
    assert (caught.value.path, caught.value.line) == (Path("some/strace.log"), 2)


def test_log_is_refused_when_it_can_not_be_opened(tmp_path: Path) -> None:
    """The system's reason is passed on, with the file."""
    with pytest.raises(RecordingError, match=r"absent\.log: No such file or directory"):
        read_log(tmp_path / "absent.log")
