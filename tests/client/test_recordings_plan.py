"""From lines to steps: in which order calls took effect, who made whom, and what each call means."""

from __future__ import annotations

from pathlib import Path

import pytest

from hmm_client.recordings import (
    Advise,
    Appear,
    Area,
    Brk,
    Detach,
    Exec,
    Exit,
    Failed,
    Fork,
    GrowStack,
    Ignored,
    Interrupted,
    Lock,
    LockAll,
    Map,
    Plan,
    ProcessInfo,
    Protect,
    RecordingError,
    Remap,
    RemapFile,
    Step,
    Sync,
    Thread,
    ThreadExit,
    Unknown,
    Unlock,
    UnlockAll,
    Unmap,
    Vfork,
    make_plan,
    parse_log,
)
from hmm_client.recordings.order import effects

ANON = "PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0"
START = '1 execve("/bin/a", ["a"], 0x7ffd /* 3 vars */) = 0'


def plan(text: str, initial: list[Area] | None = None, final: list[Area] | None = None) -> Plan:
    """The plan of a log with these lines."""
    lines = [line.strip() for line in text.strip().split("\n")]
    return make_plan(parse_log(lines, Path("strace.log")), initial or [], final or [])


def kinds(steps: Plan) -> list[str]:
    """The class of each step, and the process it concerns."""
    return [f"{type(step).__name__}({step.process})" for step in steps.steps]


def only_step(line: str) -> Step:
    """The step of a single call."""
    (step,) = plan(f"1 {line}").steps
    return step


def order(text: str) -> list[int]:
    """First lines of the calls, in the order in which they take effect."""
    lines = [line.strip() for line in text.strip().split("\n")]
    return [effect.event.line for effect in effects(parse_log(lines))]


# What each call means.


def test_mmap_is_mapped_where_it_was_put_when_it_succeeds() -> None:
    """Hint, length, protection, flags, file and offset as given; the address as the kernel answered."""
    step = only_step(
        "mmap(0x5000, 4097, PROT_READ|PROT_EXEC, MAP_PRIVATE|MAP_DENYWRITE, 3</lib/a.so>, 0x2000) = 0x7000"
    )
    assert isinstance(step, Map)
    assert (step.address, step.length, step.prot, step.flags) == (0x5000, 4097, 5, 0x802)
    assert (step.source, step.offset, step.recorded) == ("/lib/a.so", 0x2000, 0x7000)


def test_mmap_is_anonymous_when_the_flags_say_so() -> None:
    """The descriptor and the offset mean nothing then."""
    step = only_step("mmap(NULL, 4096, PROT_NONE, MAP_SHARED|MAP_ANONYMOUS, 3</lib/a.so>, 0x2000) = 0x7000")
    assert isinstance(step, Map)
    assert (step.source, step.offset) == (None, 0)


@pytest.mark.parametrize(
    ("flags", "length"),
    [
        ("MAP_HUGETLB", 1 << 21),
        ("MAP_HUGETLB|21<<MAP_HUGE_SHIFT", 1 << 21),
        ("MAP_HUGETLB|30<<MAP_HUGE_SHIFT", 1 << 30),
    ],
)
def test_mmap_takes_whole_huge_pages_when_hugetlb_is_asked(flags: str, length: int) -> None:
    """mm/mmap.c, ksys_mmap_pgoff() rounds up; maps calls the memory /anon_hugepage."""
    step = only_step(f"mmap(NULL, 4096, PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS|{flags}, -1, 0) = 0x7f0000000000")
    assert isinstance(step, Map)
    assert (step.source, step.length) == ("/anon_hugepage", length)
    assert step.flags == 0x02  # a daemon that sets no huge pages aside can map as much of a file


def test_every_memory_call_is_its_step_when_it_succeeds() -> None:
    """Arguments go over as numbers with the kernel's values."""
    steps = plan(
        """
        1 munmap(0x1000, 37807) = 0
        1 mprotect(0x1000, 4096, PROT_READ|PROT_GROWSDOWN) = 0
        1 pkey_mprotect(0x1000, 4096, PROT_NONE, 1) = 0
        1 mremap(0x1000, 4096, 8192, MREMAP_MAYMOVE|MREMAP_FIXED, 0x9000) = 0x9000
        1 mremap(0x1000, 4096, 8192, 0) = 0x1000
        1 madvise(0x1000, 4096, MADV_DONTNEED) = 0
        1 brk(NULL) = 0x5555
        1 brk(0x6666) = 0x6666
        1 mlock(0x1000, 4096) = 0
        1 mlock2(0x1000, 4096, MLOCK_ONFAULT) = 0
        1 munlock(0x1000, 4096) = 0
        1 mlockall(MCL_CURRENT|MCL_FUTURE) = 0
        1 munlockall() = 0
        1 msync(0x1000, 4096, MS_SYNC) = 0
        1 remap_file_pages(0x1000, 4096, PROT_NONE, 3, MAP_FILE) = 0
        1 map_shadow_stack(0, 0x1000, 0) = 0x7000
        """
    ).steps
    at = [step.origin for step in steps]
    assert list(steps) == [
        Unmap(at[0], 0x1000, 37807),
        Protect(at[1], 0x1000, 4096, 0x1000001),
        Protect(at[2], 0x1000, 4096, 0),
        Remap(at[3], 0x1000, 4096, 8192, 3, 0x9000, 0x9000),
        Remap(at[4], 0x1000, 4096, 8192, 0, 0, 0x1000),
        Advise(at[5], 0x1000, 4096, 4),
        Brk(at[6], 0, 0x5555),
        Brk(at[7], 0x6666, 0x6666),
        Lock(at[8], 0x1000, 4096, 0),
        Lock(at[9], 0x1000, 4096, 1),
        Unlock(at[10], 0x1000, 4096),
        LockAll(at[11], 3),
        UnlockAll(at[12]),
        Sync(at[13], 0x1000, 4096, 4),
        RemapFile(at[14], 0x1000, 4096, 0x3000),
        Map(at[15], 0, 0x1000, 3, 0x22, None, 0, 0x7000),
    ]


@pytest.mark.parametrize(
    ("line", "attempt"),
    [
        ("madvise(0x1000, 8192, MADV_DONTNEED) = -1 ENOMEM (x)", Advise),
        ("mmap(0x1000, 8192, PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS|MAP_FIXED_NOREPLACE, -1, 0) = -1 EEXIST (x)", Map),
        ("mremap(0x1000, 4096, 8192, 0) = -1 EFAULT (x)", None),
        ("munmap(0x1001, 8192) = -1 EINVAL (x)", Unmap),
        ("munmap(0x1000, 0) = -1 EINVAL (x)", Unmap),
        ("munmap(0x7ffffffff000, 4096) = -1 EINVAL (x)", Unmap),
        ("munmap(0x200000, 4096) = -1 EINVAL (x)", None),
        ("mprotect(0x1000, 8192, PROT_WRITE) = -1 EINVAL (x)", None),
        ("madvise(0x1000, 8192, MADV_HWPOISON) = -1 ENOMEM (x)", None),
        ("mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, 3, 0) = -1 ENODEV (x)", None),
        ("munmap(0x1000, 8192) = -1 EPERM (x)", None),
        ("mremap(0x1000, 4096, 8192, 0) = -1 ENOMEM (x)", None),
        ("mmap(NULL, 4096, PROT_READ, MAP_NEW, 3, 0) = -1 EOPNOTSUPP (x)", None),
        ("shmat(0, NULL, 0) = -1 EINVAL (x)", None),
        ('execve("/bin/absent", ["x"], 0x7ffd) = -1 ENOENT (x)', None),
        ("clone3({flags=CLONE_VM}, 88) = -1 ENOSYS (x)", None),
    ],
)
def test_failed_call_is_attempted_when_its_error_follows_from_the_layout(line: str, attempt: type[Step] | None) -> None:
    """madvise(2): ENOMEM comes with the rest of the range done; limits, modes and cut huge pages change nothing."""
    step = only_step(line)
    assert isinstance(step, Failed)
    assert step.errno == line.split(" = -1 ")[1].split(maxsplit=1)[0]
    assert type(step.attempt) is (attempt or type(None))


@pytest.mark.parametrize("name", ["???", "????"])
def test_call_is_ignored_when_its_thread_was_gone_before_it_could_be_seen(name: str) -> None:
    """strace 6.1: a thread that another one's exec or exit ends has no arguments to be read."""
    text = f"1 clone(child_stack=0x7, flags=CLONE_VM|CLONE_THREAD) = 2\n2 {name}( <unfinished ...>\n1 exit_group(0) = ?"
    steps = plan(f"{text}\n2 +++ exited with 0 +++\n1 +++ exited with 0 +++")
    assert [step.call.name for step in steps.steps if isinstance(step, Ignored)] == [name]
    assert steps.counts()["Unknown"] == 0


@pytest.mark.parametrize("errno", ["ENOMEM", "EACCES", "EPERM"])
def test_mprotect_is_interrupted_when_it_fails_at_a_mapping(errno: str) -> None:
    """mm/mprotect.c, do_mprotect_pkey(): the mappings below have changed; fork copies seals, exec ends them."""
    steps = plan(
        f"""
        1 mseal(0x3000, 0x1001, 0) = 0
        1 fork() = 2
        2 pkey_mprotect(0x1000, 0x8000, PROT_READ, 1) = -1 {errno} (x)
        1 execve("/bin/b", ["b"], 0x7ffd) = 0
        1 mprotect(0x1000, 8192, PROT_READ) = -1 {errno} (x)
        """
    ).steps
    interrupted = [step for step in steps if isinstance(step, Interrupted)]
    assert [step.sealed for step in interrupted] == [((0x3000, 0x5000),), ()]
    assert interrupted[0].errno == errno
    assert interrupted[0].attempt == Protect(interrupted[0].origin, 0x1000, 0x8000, 1)


@pytest.mark.parametrize(
    ("call", "attempt"), [("mlock(", Lock), ("mlock2(", Lock), ("munlock(", Unlock)], ids=["mlock", "mlock2", "munlock"]
)
def test_locking_is_interrupted_when_it_fails_at_a_hole(call: str, attempt: type[Step]) -> None:
    """mm/mlock.c, apply_vma_lock_flags(): what lies below the hole is locked, or no longer."""
    step = only_step(
        f"{call}0x1000, 8192{', MLOCK_ONFAULT' if attempt is Lock and '2' in call else ''}) = -1 ENOMEM (x)"
    )
    assert isinstance(step, Interrupted)
    assert isinstance(step.attempt, attempt)
    assert isinstance(only_step(f"{call}0x1000, 8192, 0) = -1 EAGAIN (x)"), Failed)


def test_interrupted_mprotect_knows_which_files_were_written_when_they_were_mapped_before() -> None:
    """mmap(2): MAP_SHARED with PROT_WRITE needs a descriptor open for writing."""
    steps = plan(
        """
        1 mmap(NULL, 4096, PROT_READ|PROT_WRITE, MAP_SHARED, 3</shared>, 0) = 0x10000
        1 mmap(NULL, 4096, PROT_READ, MAP_SHARED, 4</read>, 0) = 0x20000
        1 mmap(NULL, 4096, PROT_READ|PROT_WRITE, MAP_PRIVATE, 4</private>, 0) = 0x30000
        1 mmap(NULL, 4096, PROT_READ|PROT_WRITE, MAP_SHARED, 4</refused>, 0) = -1 EACCES (Permission denied)
        1 mprotect(0x20000, 4096, PROT_READ|PROT_WRITE) = -1 EACCES (Permission denied)
        1 mmap(NULL, 4096, PROT_WRITE, MAP_SHARED_VALIDATE, 4</later>, 0) = 0x40000
        """
    ).steps
    (interrupted,) = (step for step in steps if isinstance(step, Interrupted))
    assert interrupted.writable == {"/shared"}


@pytest.mark.parametrize(
    ("advice", "kind"),
    [
        ("MADV_FREE", Advise),
        ("0x66 /* MADV_??? */", Ignored),
        ("MADV_GUARD_REMOVE", Ignored),
        ("MADV_SOFT_OFFLINE", Ignored),
        ("0x77 /* MADV_??? */", Unknown),
    ],
)
def test_advice_is_replayed_when_it_concerns_the_layout(advice: str, kind: type[Step]) -> None:
    """Guard pages and failures of memory show in no layout; what nobody knows is reported."""
    assert type(only_step(f"madvise(0x1000, 4096, {advice}) = 0")) is kind


def test_call_is_unknown_when_nothing_is_known_about_it() -> None:
    """It is reported, whether it succeeded or not."""
    assert isinstance(only_step("io_submit(0x7000, 1, [{}]) = 1"), Unknown)
    assert isinstance(only_step("prctl(PR_SET_MM) = -1 EPERM (x)"), Unknown)
    assert isinstance(only_step("syscall_0x1f4(0x1) = 0"), Unknown)


@pytest.mark.parametrize(
    "line",
    [
        "mincore(0x1000, 4096, [1]) = 0",
        "mbind(0x1000, 4096, MPOL_PREFERRED, NULL, 0, 0) = 0",
        "wait4(-1, [{WIFEXITED(s)}], 0, NULL) = 7",
        "process_madvise(3, [], 0, MADV_COLD, 0) = 0",
        "syscall_0x1ce(0x7000, 0x1000, 0, 0, 0, 0) = 0",
        "userfaultfd(O_CLOEXEC) = 3",
        "io_uring_register(3, IORING_REGISTER_FILES, [4], 1) = 0",
        "syscall_0x1c4(0xffffff9c, 0x7000, 0x1ff, 0, 0, 0) = 0",
        "syscall_0x1d6(0, 0, 0, 0, 0, 0) = 0",
        "munmap(0x1000, 4096) = ? ERESTARTNOINTR (x)",
        "fork() = ? ERESTARTNOINTR (x)",
        "munmap(0x1000, 4096 <Cannot restart pid 1 with ptrace(PTRACE_SYSCALL): No such process>",
    ],
)
def test_call_is_ignored_with_a_reason_when_it_changes_no_layout(line: str) -> None:
    """What a call did not do, or did not come back from, is counted and explained."""
    step = only_step(line)
    assert isinstance(step, Ignored)
    assert step.why


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, 3, 0) = 0x7000",
            "'3' does not say which file it is; record with strace -y",
        ),
        ("mmap(NULL, 4096, PROT_NEW, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x7000", "unknown flag 'PROT_NEW'"),
        ("mmap(NULL, 4096) = 0x7000", "not enough values to unpack"),
        ("brk() = 0x7000", "brk: too few arguments"),
        ("clone3(0x7ffd, 88) = 7", "no flags in '0x7ffd, 88'"),
    ],
)
def test_recording_is_refused_with_its_line_when_a_call_is_not_understood(line: str, message: str) -> None:
    """A call that succeeded and can't be repeated makes the recording unusable."""
    with pytest.raises(RecordingError) as caught:
        plan(f"{START}\n1 {line}")
    assert str(caught.value).startswith(f"strace.log:2: {line.partition('(')[0]}: ")
    assert message in str(caught.value)


def test_recording_is_refused_when_it_holds_no_call() -> None:
    """Signals and ends alone are no program."""
    with pytest.raises(RecordingError, match="no system call was recorded"):
        plan("1 +++ exited with 0 +++")


# When calls take effect.


def test_mapping_takes_effect_at_return_and_unmapping_at_entry_when_both_are_split() -> None:
    """The addresses that munmap gives back may be handed out before it returns."""
    assert order(
        f"""
        1 munmap(0x7000, 4096 <unfinished ...>
        2 mmap(NULL, 4096, {ANON} <unfinished ...>
        3 mprotect(0x9000, 4096, PROT_READ) = 0
        2 <... mmap resumed>) = 0x7000
        1 <... munmap resumed>) = 0
        """
    ) == [1, 3, 2]


def test_mremap_takes_effect_before_its_taker_when_that_returns_first() -> None:
    """A chain of three threads: each gets what the next gives back, and all return in the wrong order."""
    log = f"""
        1 clone(child_stack=0x1, flags=CLONE_VM|CLONE_THREAD) = 2
        1 clone(child_stack=0x1, flags=CLONE_VM|CLONE_THREAD) = 3
        1 mremap(0x7000, 4096, 8192, MREMAP_MAYMOVE <unfinished ...>
        2 mremap(0x20000, 4096, 8192, MREMAP_MAYMOVE <unfinished ...>
        3 mmap(NULL, 4096, {ANON}) = 0x20000
        2 <... mremap resumed>) = 0x7000
        1 <... mremap resumed>) = 0x40000
        """
    assert order(log) == [1, 2, 3, 4, 5]


def test_mremap_takes_effect_at_return_when_only_another_process_has_its_addresses() -> None:
    """Equal addresses in two processes have nothing to do with each other."""
    log = f"""
        1 fork() = 2
        1 mremap(0x7000, 4096, 8192, MREMAP_MAYMOVE <unfinished ...>
        2 mmap(NULL, 4096, {ANON}) = 0x7000
        1 <... mremap resumed>) = 0x40000
        """
    assert order(log) == [1, 3, 2]


@pytest.mark.parametrize(
    ("arguments", "result", "moved"),
    [
        ("0x7000, 8192, 4096, 0", "0x7000", True),
        ("0x7000, 8192, 12288, 0", "0x7000", False),
        ("0x7000, 8192, 8192, MREMAP_MAYMOVE|MREMAP_DONTUNMAP", "0x40000", False),
    ],
)
def test_mremap_gives_back_what_it_leaves_when_it_is_split(arguments: str, result: str, moved: bool) -> None:
    """Shrinking gives back the tail, growing in place and DONTUNMAP nothing."""
    log = f"""
        1 clone(child_stack=0x1, flags=CLONE_VM|CLONE_THREAD) = 2
        1 mremap({arguments} <unfinished ...>
        2 mmap(NULL, 4096, {ANON}) = 0x8000
        1 <... mremap resumed>) = {result}
        """
    assert order(log) == ([1, 2, 3] if moved else [1, 3, 2])


def test_order_ends_when_a_log_contradicts_itself() -> None:
    """Two moves into each other's place can't have happened; each call still takes effect once."""
    log = """
        1 clone(child_stack=0x1, flags=CLONE_VM|CLONE_THREAD) = 2
        1 mremap(0x7000, 4096, 4096, MREMAP_MAYMOVE <unfinished ...>
        2 mremap(0x20000, 4096, 4096, MREMAP_MAYMOVE) = 0x7000
        1 <... mremap resumed>) = 0x20000
        """
    assert sorted(order(log)) == [1, 2, 3]


# Who is who.


def test_threads_act_as_their_process_when_they_share_it() -> None:
    """CLONE_THREAD makes no process; the process ends with its last thread, or with exit_group."""
    result = plan(
        f"""
        {START}
        1 clone3({{flags=CLONE_VM|CLONE_THREAD, stack=0x1}} <unfinished ...>
        2 munlockall() = 0
        1 <... clone3 resumed> => {{parent_tid=[2]}}, 88) = 2
        2 exit(0) = ?
        2 +++ exited with 0 +++
        1 exit(3) = ?
        1 +++ exited with 3 +++
        """
    )
    assert kinds(result) == ["Ignored(0)", "Thread(0)", "UnlockAll(0)", "ThreadExit(0)", "Exit(0)"]
    assert result.steps[1:2] + result.steps[3:] == (
        Thread(result.steps[1].origin, 2),
        ThreadExit(result.steps[3].origin, 2),
        Exit(result.steps[4].origin, 3),
    )
    assert result.processes == (ProcessInfo(0, 1, None),)


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        ("fork()", Fork),
        ("clone(child_stack=NULL, flags=CLONE_CHILD_SETTID|SIGCHLD, child_tidptr=0x7f)", Fork),
        ("clone(child_stack=NULL, flags=CLONE_VFORK|SIGCHLD)", Fork),
        ("vfork()", Vfork),
        ("clone3({flags=CLONE_VM|CLONE_VFORK, exit_signal=SIGCHLD}, 88)", Vfork),
        ("clone(child_stack=0x7f, flags=CLONE_VM|SIGCHLD)", Vfork),
    ],
)
def test_child_is_a_process_when_it_is_no_thread(call: str, kind: type[Step]) -> None:
    """fork copies the space; vfork, and a bare CLONE_VM, share it until exec."""
    result = plan(f"{START}\n1 {call} = 2\n2 munlockall() = 0\n2 exit_group(1) = ?")
    assert kinds(result) == ["Ignored(0)", f"{kind.__name__}(0)", "UnlockAll(1)", "Exit(1)"]
    assert result.processes[1] == ProcessInfo(1, 2, 0)
    assert not any(step.partial for step in result.steps)


def test_child_is_partial_when_it_starts_another_program() -> None:
    """What exec maps was not recorded; the vforking parent's own space is untouched by it."""
    result = plan(
        f"""
        {START}
        1 vfork( <unfinished ...>
        2 execve("/bin/b", ["b"], 0x7ffd <unfinished ...>
        1 <... vfork resumed>) = 2
        1 munlockall() = 0
        2 <... execve resumed>) = 0
        2 brk(NULL) = 0x5000
        2 fork() = 3
        3 exit_group(0) = ?
        """
    )
    assert kinds(result) == ["Ignored(0)", "Vfork(0)", "Exec(1)", "UnlockAll(0)", "Brk(1)", "Fork(1)", "Exit(2)"]
    assert result.steps[2] == Exec(result.steps[2].origin, "/bin/b", 0x5000)
    assert [step.partial for step in result.steps] == [False, False, True, False, True, True, True]
    assert result.incomparable is None


def test_final_layout_is_incomparable_when_the_first_process_starts_another_program() -> None:
    """Its other threads end there, and the layout that follows was not recorded."""
    result = plan(
        f"""
        {START}
        1 clone(child_stack=0x1, flags=CLONE_VM|CLONE_THREAD) = 2
        1 wait4(-1,  <unfinished ...>
        2 execveat(5</bin/c>, "", ["c"], 0x7ffd, AT_EMPTY_PATH <pid changed to 1 ...>
        1 +++ superseded by execve in pid 2 +++
        1 <... execveat resumed>) = 0
        1 exit_group(0) = ?
        """
    )
    assert kinds(result) == ["Ignored(0)", "Thread(0)", "Exec(0)", "Ignored(0)", "Exit(0)"]
    assert result.steps[2] == Exec(result.steps[2].origin, "/bin/c", None)
    assert result.incomparable == "line 4: the first process starts another program, whose layout is unknown"


def test_child_is_partial_when_other_threads_change_what_fork_copies() -> None:
    """Whether their calls came before or after the copy the log does not show."""
    during = plan(
        f"""
        1 clone(child_stack=0x1, flags=CLONE_VM|CLONE_THREAD) = 2
        1 fork( <unfinished ...>
        2 mmap(NULL, 4096, {ANON}) = 0x7000
        1 <... fork resumed>) = 3
        3 munlockall() = 0
        """
    )
    before = plan(
        f"""
        1 clone(child_stack=0x1, flags=CLONE_VM|CLONE_THREAD) = 2
        2 mmap(NULL, 4096, {ANON}) = 0x7000
        1 fork() = 3
        3 munlockall() = 0
        """
    )
    assert during.steps[-1].process == before.steps[-1].process == 1
    assert [step.partial for step in during.steps if step.process == 1] == [True]
    assert [step.partial for step in before.steps if step.process == 1] == [False]


def test_processes_are_told_apart_when_the_kernel_uses_an_id_again() -> None:
    """A process id means another process after its end."""
    result = plan(
        f"""
        {START}
        1 fork() = 2
        2 exit_group(0) = ?
        2 +++ exited with 0 +++
        1 fork() = 2
        2 munlockall() = 0
        2 +++ killed by SIGKILL +++
        """
    )
    assert kinds(result)[1:] == ["Fork(0)", "Exit(1)", "Fork(0)", "UnlockAll(2)", "Exit(2)"]
    assert [step.status for step in result.steps if isinstance(step, Exit)] == [0, None]


@pytest.mark.parametrize("returned", ["1 fork() = 3", "1 fork( <unfinished ...>"])
def test_child_finds_its_parent_when_the_parent_was_told_another_id(returned: str) -> None:
    """In a process id namespace of its own a program sees other ids than strace; a killed parent sees none."""
    result = plan(f"{START}\n{returned}\n70 munlockall() = 0")
    assert kinds(result) == ["Ignored(0)", "Fork(0)", "UnlockAll(1)"]
    assert result.processes[1] == ProcessInfo(1, 70, 0)


def test_process_appears_when_nobody_in_the_log_made_it() -> None:
    """It is partial from its first call on."""
    result = plan(f"{START}\n9 munlockall() = 0")
    assert kinds(result) == ["Ignored(0)", "Appear(1)", "UnlockAll(1)"]
    assert isinstance(result.steps[1], Appear)
    assert all(step.partial for step in result.steps[1:])


def test_calls_of_threads_count_when_they_were_entered_before_exit_group() -> None:
    """exit_group takes effect at its return; until then other threads go on, and strace may hold it for long."""
    result = plan(
        f"""
        1 clone(child_stack=0x1, flags=CLONE_VM|CLONE_THREAD) = 2
        2 mmap(NULL, 4096, {ANON} <unfinished ...>
        1 exit_group(0 <unfinished ...>
        2 <... mmap resumed>) = 0x7000
        2 munmap(0x7000, 4096) = 0
        1 <... exit_group resumed>) = ?
        2 +++ exited with 0 +++
        1 +++ exited with 0 +++
        """
    )
    assert kinds(result) == ["Thread(0)", "Map(0)", "Unmap(0)", "Exit(0)"]
    assert result.ending == 3


def test_calls_of_threads_count_when_exit_group_returned_between_their_lines() -> None:
    """A thread that was inside a call when its process ended was answered, if the log has the answer."""
    result = plan(
        f"""
        1 clone(child_stack=0x1, flags=CLONE_VM|CLONE_THREAD) = 2
        2 mmap(NULL, 4096, {ANON} <unfinished ...>
        1 exit_group(0) = ?
        2 <... mmap resumed>) = 0x7000
        2 munmap(0x7000, 4096) = 0
        """
    )
    assert kinds(result) == ["Thread(0)", "Map(0)", "Exit(0)", "Ignored(0)"]
    assert result.ending == 3


def test_ending_is_that_of_the_first_process_when_children_end_too() -> None:
    """Only its last layout is compared; and the stack has grown by then."""
    initial = [Area(0x9000, 0xA000, "rw-p", name="[stack]")]
    final = [Area(0x6000, 0xA000, "rw-p", name="[stack]")]
    text = """
        1 fork() = 2
        2 exit_group(0) = ?
        1 clone(child_stack=0x1, flags=CLONE_VM|CLONE_THREAD) = 3
        1 exit_group(0 <unfinished ...>
        3 exit_group(0 <unfinished ...>
        3 munlockall() = 0
        3 <... exit_group resumed>) = ?
        1 <... exit_group resumed>) = ?
        """
    result = plan(text, initial, final)
    assert kinds(result)[2:] == ["Thread(0)", "GrowStack(0)", "UnlockAll(0)", "Exit(0)", "Ignored(0)"]
    assert result.ending == 4


def test_thread_ends_alone_when_a_signal_ends_the_process_thread_by_thread() -> None:
    """Each thread's end is a line; the last one is the process's."""
    result = plan(
        """
        1 clone(child_stack=0x1, flags=CLONE_VM|CLONE_THREAD) = 2
        2 +++ killed by SIGKILL +++
        1 +++ killed by SIGKILL +++
        """
    )
    assert kinds(result) == ["Thread(0)", "ThreadExit(0)", "Exit(0)"]
    assert result.ending is None


def test_ending_is_where_the_signal_came_that_ended_the_process() -> None:
    """Not one that was handled, and not that of a child; other threads go on meanwhile."""
    result = plan(
        """
        1 --- SIGSEGV {si_signo=SIGSEGV} ---
        1 fork() = 2
        2 --- SIGSEGV {si_signo=SIGSEGV} ---
        2 +++ killed by SIGSEGV +++
        1 --- SIGCHLD {si_signo=SIGCHLD} ---
        1 clone(child_stack=0x1, flags=CLONE_VM|CLONE_THREAD) = 3
        3 --- SIGSEGV {si_signo=SIGSEGV} ---
        1 munlockall() = 0
        3 +++ killed by SIGSEGV +++
        1 +++ killed by SIGSEGV +++
        """
    )
    assert kinds(result) == ["Fork(0)", "Exit(1)", "Thread(0)", "UnlockAll(0)", "ThreadExit(0)", "Exit(0)"]
    assert result.ending == 7


# What calls do not say.


@pytest.mark.parametrize("lines", ["1 exit_group(0) = ?", "1 munlockall() = 0"])
def test_stack_grows_before_the_end_when_its_lines_say_so(lines: str) -> None:
    """Faults extend the stack without a call; a part that mprotect split off carries no name."""
    initial = [Area(0x9000, 0xA000, "rw-p", name="[stack]")]
    final = [Area(0x1000, 0x2000, "rw-p"), Area(0x6000, 0x8000, "rwxp"), Area(0x8000, 0xA000, "rw-p", name="[stack]")]
    steps = plan(lines, initial, final).steps
    assert GrowStack(steps[0].origin, 0x6000, 0x9000) in steps
    assert not plan(lines, initial, initial).counts()["GrowStack"]
    assert not plan(lines, initial, []).counts()["GrowStack"]


def test_stack_grows_before_a_call_that_names_what_it_gained() -> None:
    """The call succeeded, so the stack had grown by then; and it grows once."""
    initial = [Area(0x9000, 0xA000, "rw-p", name="[stack]")]
    final = [Area(0x6000, 0xA000, "rw-p", name="[stack]")]
    steps = plan("1 mlock(0x9000, 4096) = 0\n1 mlock(0x7000, 4096) = 0\n1 exit_group(0) = ?", initial, final)
    assert kinds(steps) == ["Lock(0)", "GrowStack(0)", "Lock(0)", "Exit(0)"]
    assert steps.steps[1] == GrowStack(steps.steps[2].origin, 0x6000, 0x9000)


def test_area_grows_before_its_protection_changes_when_it_was_mapped_to_grow() -> None:
    """mprotect with PROT_GROWSDOWN begins where the area begins by then."""
    text = """
        1 mmap(0x7000, 8192, PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS|MAP_GROWSDOWN, -1, 0) = 0x7000
        1 mprotect(0x8000, 4096, PROT_NONE|PROT_GROWSDOWN) = 0
        """
    steps = plan(text, [], [Area(0x5000, 0x9000, "---p")])
    assert kinds(steps) == ["Map(0)", "GrowStack(0)", "Protect(0)"]
    assert steps.steps[1] == GrowStack(steps.steps[2].origin, 0x5000, 0x7000)
    assert kinds(plan(text, [], [Area(0x7000, 0x9000, "---p")])) == ["Map(0)", "Protect(0)"]


def test_ring_has_the_length_that_the_layout_gives_when_io_setup_maps_it() -> None:
    """fs/aio.c, aio_setup_ring(): it depends on the processors of the machine; io_destroy takes it away."""
    steps = plan(
        "1 io_setup(128, [0x7000]) = 0\n1 io_destroy(0x7000) = 0\n1 io_setup(-1, 0x7ffd) = -1 EINVAL (x)"
    ).steps
    assert steps[0] == Map(steps[0].origin, 0, 0, 3, 0x01, "/[aio]", 0, 0x7000)
    assert steps[1] == Detach(steps[1].origin, 0x7000)
    assert steps[2] == Failed(steps[2].origin, "EINVAL", None)


def test_calls_are_left_out_when_the_first_layout_was_read_after_them() -> None:
    """It is read while the first brk is held, which need not be the first call; later ones are held no more."""
    early = f"1 mmap(NULL, 4096, {ANON}) = 0x7000\n1 munmap(0x9000, 4096) = 0"
    held = plan(f"{early}\n1 brk(NULL) = 0x5000 (DELAYED)\n{early}")
    assert kinds(held) == ["Ignored(0)", "Ignored(0)", "Brk(0)", "Map(0)", "Unmap(0)"]
    assert kinds(plan(f"{early}\n1 brk(NULL) = 0x5000")) == ["Map(0)", "Unmap(0)", "Brk(0)"]


def test_plan_names_the_line_when_a_call_that_ran_beside_another_is_not_understood() -> None:
    """Which of two calls came first is asked before what they mean."""
    with pytest.raises(RecordingError, match=r"strace\.log:3: mremap: 'foo' is not a number"):
        plan(
            f"""
            {START}
            1 clone(child_stack=0x1, flags=CLONE_VM|CLONE_SIGHAND|CLONE_THREAD) = 2
            1 mremap(foo, 4096, 8192, MREMAP_MAYMOVE <unfinished ...>
            2 mmap(NULL, 4096, {ANON}) = 0x9000
            1 <... mremap resumed>) = 0x7000
            """
        )


def test_segment_has_its_length_when_shmget_was_recorded() -> None:
    """shmat says no length; pages of hugetlb are larger."""
    steps = plan(
        """
        1 shmget(0x1234, 12293, IPC_CREAT|0600) = 5
        1 shmget(0x1234, 0, 0) = 5
        1 shmget(IPC_PRIVATE, 5, IPC_CREAT|SHM_HUGETLB|0600) = 6
        1 shmat(5, NULL, 0) = 0x7000
        1 shmat(5, 0x20123, SHM_RDONLY|SHM_RND|SHM_REMAP|SHM_EXEC) = 0x20000
        1 shmat(6, NULL, 0) = 0x400000
        1 fork() = 2
        2 shmdt(0x7000) = 0
        """
    ).steps
    assert steps[3] == Map(steps[3].origin, 0, 0x4000, 3, 0x01, "/SYSV00001234", 0, 0x7000)
    assert steps[4] == Map(steps[4].origin, 0x20000, 0x4000, 5, 0x11, "/SYSV00001234", 0, 0x20000)
    assert steps[5] == Map(steps[5].origin, 0, 2 << 20, 3, 0x01, "/SYSV00000000", 0, 0x400000)
    assert steps[7] == Detach(steps[7].origin, 0x7000)


def test_segment_keeps_its_length_when_a_smaller_one_is_asked_for() -> None:
    """ipc/shm.c, shm_more_checks(): shmget finds a segment that is at least as long; a layout may show more of it."""
    initial = [Area(0x7000, 0xC000, "rw-s", 0, "/SYSV00000008", inode=6)]
    steps = plan(
        """
        1 shmget(0x7, 12288, IPC_CREAT|0600) = 5
        1 shmget(0x7, 100, 0) = 5
        1 shmget(0x8, 100, 0) = 6
        1 shmat(5, NULL, 0) = 0x20000
        1 shmat(6, NULL, 0) = 0x30000
        """,
        initial,
    ).steps
    assert [step.length for step in steps if isinstance(step, Map)] == [0x3000, 0x5000]


def test_segment_has_whole_huge_pages_when_shmget_says_their_size() -> None:
    """ipc/shm.c, newseg(): SHM_HUGE_SHIFT as MAP_HUGE_SHIFT."""
    steps = plan(
        """
        1 shmget(IPC_PRIVATE, 5, IPC_CREAT|SHM_HUGETLB|30<<SHM_HUGE_SHIFT|0600) = 6
        1 shmat(6, NULL, 0) = 0x40000000
        """
    ).steps
    assert [step.length for step in steps if isinstance(step, Map)] == [1 << 30]


def test_segment_has_the_length_of_its_area_when_shmget_was_not_recorded() -> None:
    """ipc/shm.c, newseg(): the inode in a layout is the segment's id; where no layout shows it, its length is open."""
    final = [
        Area(0x7000, 0x8000, "rw-s", 0, "/SYSV00000007 (deleted)", inode=5),
        Area(0x9000, 0xA000, "r--s", 0x2000, "/SYSV00000007 (deleted)", inode=5),
    ]
    steps = plan("1 shmat(5, NULL, 0) = 0x7000\n1 shmat(6, NULL, 0) = 0x30000", [], final).steps
    assert [(step.source, step.length) for step in steps if isinstance(step, Map)] == [
        ("/SYSV00000007", 0x3000),
        ("/SYSV00000000", 0),
    ]


def test_segment_has_its_length_when_a_layout_shows_more_than_there_is() -> None:
    """Of one that shmget made; mm/mremap.c, vma_to_resize(): mremap maps beyond the end of shared memory."""
    final = [Area(0x7000, 0xF000, "rw-s", 0, "/SYSV00000000 (deleted)", inode=6)]
    steps = plan("1 shmget(IPC_PRIVATE, 12288, IPC_CREAT|0600) = 6\n1 shmat(6, NULL, 0) = 0x20000", [], final).steps
    assert [step.length for step in steps if isinstance(step, Map)] == [0x3000]


# What calls mean because of others.


def test_readable_memory_is_executable_when_the_personality_says_so() -> None:
    """mm/mmap.c, do_mmap(); mm/mprotect.c, do_mprotect_pkey(): of the thread, of those it makes, until an exec."""
    steps = plan(
        f"""
        {START}
        1 mmap(NULL, 4096, PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x1000
        1 personality(PER_LINUX|READ_IMPLIES_EXEC) = 0 (PER_LINUX)
        1 personality(0xffffffff) = 0x400000 (PER_LINUX|READ_IMPLIES_EXEC)
        1 mmap(NULL, 4096, PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x2000
        1 mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x3000
        1 mprotect(0x1000, 4096, PROT_READ|PROT_WRITE) = 0
        1 mprotect(0x1000, 8192, PROT_READ) = -1 ENOMEM (Cannot allocate memory)
        1 clone(child_stack=0x1, flags=CLONE_VM|CLONE_SIGHAND|CLONE_THREAD) = 2
        2 mmap(NULL, 4096, PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x4000
        2 personality(PER_LINUX) = 0x400000 (PER_LINUX|READ_IMPLIES_EXEC)
        2 mmap(NULL, 4096, PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x5000
        1 fork() = 3
        3 mmap(NULL, 4096, PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x6000
        3 execve("/bin/b", ["b"], 0x7ffd /* 3 vars */) = 0
        3 mmap(NULL, 4096, PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x7000
        1 personality(0x20000) = -1 EPERM (Operation not permitted)
        1 mmap(NULL, 4096, PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x8000
        """
    ).steps
    prots = {step.recorded: step.prot for step in steps if isinstance(step, Map)}
    assert prots == {0x1000: 1, 0x2000: 5, 0x3000: 0, 0x4000: 5, 0x5000: 1, 0x6000: 5, 0x7000: 1, 0x8000: 5}
    assert [step.prot for step in steps if isinstance(step, Protect)] == [7]
    assert [step.attempt.prot for step in steps if isinstance(step, Interrupted)] == [5]


def test_break_maps_and_unmaps_when_what_it_brings_may_be_executed() -> None:
    """arch/x86/include/asm/page_types.h, VM_DATA_DEFAULT_FLAGS: and from then on, since brk alone would map less."""
    steps = plan(
        f"""
        {START}
        1 brk(NULL) = 0x10010
        1 brk(0x12000) = 0x12000
        1 personality(READ_IMPLIES_EXEC) = 0 (PER_LINUX)
        1 brk(0x14800) = 0x14800
        1 personality(PER_LINUX) = 0x400000 (READ_IMPLIES_EXEC)
        1 fork() = 2
        2 brk(0x11000) = 0x11000
        1 brk(0x14900) = 0x14900
        1 brk(NULL) = 0x14900
        1 brk(0x16000) = 0x16000
        """
    ).steps
    found = [step for step in steps if isinstance(step, Brk | Map | Unmap)]
    assert [(step.process, step.address) for step in found] == [
        *((0, 0), (0, 0x12000), (0, 0x12000), (1, 0x11000), (0, 0x15000)),
    ]
    assert [step.length for step in found if isinstance(step, Map | Unmap)] == [0x3000, 0x4000, 0x1000]
    assert [step.prot for step in found if isinstance(step, Map)] == [7, 3]


def test_break_maps_and_unmaps_when_another_call_has_moved_it() -> None:
    """kernel/sys.c, prctl_set_mm_map(): brk tells where it is now; a child of vfork has that of its parent."""
    steps = plan(
        f"""
        {START}
        1 brk(NULL) = 0x10000
        1 vfork() = 2
        2 brk(0x12000) = 0x12000
        2 exit_group(0) = ?
        2 +++ exited with 0 +++
        1 brk(NULL) = 0x12000
        1 brk(0x99999999000) = 0x12000
        1 brk(NULL) = 0x50010
        1 brk(0x53000) = 0x53000
        1 brk(0x52000) = 0x52000
        """
    ).steps
    assert kinds(Plan(steps, (), None))[1:] == [
        *("Brk(0)", "Vfork(0)", "Brk(1)", "Exit(1)", "Brk(0)", "Brk(0)", "Ignored(0)", "Map(0)", "Unmap(0)"),
    ]
    grown, shrunk = steps[-2:]
    assert isinstance(grown, Map)
    assert isinstance(shrunk, Unmap)
    assert (grown.address, grown.length, grown.recorded) == (0x51000, 0x2000, 0x51000)
    assert (shrunk.address, shrunk.length) == (0x52000, 0x1000)


@pytest.mark.parametrize(
    ("flags", "length"),
    [("MFD_CLOEXEC", 5000), ("MFD_HUGETLB", 2 << 20), ("MFD_HUGETLB|30<<MFD_HUGE_SHIFT", 1 << 30)],
)
def test_mmap_takes_whole_huge_pages_when_its_file_has_such(flags: str, length: int) -> None:
    """mm/mmap.c, ksys_mmap_pgoff(): is_file_hugepages()."""
    (step,) = (
        step
        for step in plan(
            f"""
            1 memfd_create("x", {flags}) = 3</memfd:x>(deleted)
            1 mmap(NULL, 5000, PROT_READ, MAP_SHARED, 3</memfd:x>(deleted), 0) = 0x40000000
            """
        ).steps
        if isinstance(step, Map)
    )
    assert (step.source, step.length) == ("/memfd:x", length)


def test_mmap_is_shared_when_it_validated_its_flags() -> None:
    """mm/mmap.c, do_mmap(): once accepted, MAP_SHARED_VALIDATE is MAP_SHARED; a replay adds a flag that it refuses."""
    step = only_step("mmap(NULL, 4096, PROT_READ, MAP_SHARED_VALIDATE, 3</a>, 0) = 0x7000")
    assert isinstance(step, Map)
    assert step.flags == 0x01


def test_area_grows_before_a_call_cuts_what_it_gained() -> None:
    """What munmap left of it is in the last layout; what another mmap put there is not its own."""
    text = """
        1 mmap(0x9000, 8192, PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS|MAP_GROWSDOWN, -1, 0) = 0x9000
        1 mmap(0x2000, 4096, PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x2000
        1 munmap(0x7000, 4096) = 0
        1 munmap(0x3000, 8192) = 0
        """
    rest = [Area(0x2000, 0x3000, "r--p"), Area(0x5000, 0x7000, "r--p"), Area(0x8000, 0xB000, "r--p")]
    steps = plan(text, [], rest)
    assert kinds(steps) == ["Map(0)", "Map(0)", "GrowStack(0)", "Unmap(0)", "Unmap(0)"]
    assert steps.steps[2] == GrowStack(steps.steps[3].origin, 0x5000, 0x9000)


@pytest.mark.parametrize("first", [True, False], ids=["before", "later"])
def test_area_has_not_grown_when_another_call_maps_what_lies_below_it(first: bool) -> None:
    """Two mappings that touch are no growth."""
    below = "1 mmap(0x5000, 16384, PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x5000"
    grows = "1 mmap(0x9000, 8192, PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS|MAP_GROWSDOWN, -1, 0) = 0x9000"
    text = "\n".join([below, grows] if first else [grows, below])
    final = [Area(0x5000, 0x9000, "r--p"), Area(0x9000, 0xB000, "r--p")]
    assert kinds(plan(f"{text}\n1 exit_group(0) = ?", [], final)) == ["Map(0)", "Map(0)", "Exit(0)"]


def test_area_has_grown_when_a_call_succeeds_that_begins_below_it() -> None:
    """mm/mremap.c, vma_to_resize(): all of what moves has to be mapped, and only growth can have mapped it."""
    text = """
        1 mmap(0x9000, 8192, PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS|MAP_GROWSDOWN, -1, 0) = 0x9000
        1 mremap(0x6000, 20480, 20480, MREMAP_MAYMOVE) = 0x20000
        1 mprotect(0x1F000, 8192, PROT_NONE) = 0
        1 mprotect(0x9000, 4096, PROT_NONE) = -1 ENOMEM (Cannot allocate memory)
        """
    steps = plan(text).steps
    assert [step for step in steps if isinstance(step, GrowStack)] == [
        GrowStack(steps[2].origin, 0x6000, 0x9000), GrowStack(steps[4].origin, 0x1F000, 0x20000),
    ]  # fmt: skip
    other = "1 mmap(0x6000, 12288, PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x6000"
    assert not plan(f"{other}\n{text}").counts()["GrowStack"] > 1
