"""The command line: what it loads, what it says when something is wrong, and its exit codes."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from hmm_client.cli import COMMANDS, Commands, main
from hmm_client.commands import output, pagetable, pending, watch
from hmm_client.commands.messages import as_value, word
from hmm_proto.v1 import event_pb2, inspection_pb2, types_pb2

SLOW_TO_LOAD = ("grpc", "numpy", "google.protobuf", "rich", "hmm.units")
HELP = """
import sys
from hmm_client.cli import main
try:
    main(["--help"], prog_name="hmmctl")
except SystemExit:
    print([name for name in sys.argv[1:] if name in sys.modules], file=sys.stderr)
"""


def test_help_loads_click_alone_when_nothing_else_is_asked() -> None:
    """`hmmctl --help` lists all commands without loading one, or anything that takes long to load."""
    done = subprocess.run([sys.executable, "-c", HELP, *SLOW_TO_LOAD], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    for name, text in COMMANDS.items():
        assert name in done.stdout
        assert text in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_command_explains_itself_when_asked_for_help(name: str) -> None:
    """Every command can be loaded, is called what the list calls it, and has a text and options."""
    command = main.get_command(click.Context(main), name)
    assert command is not None
    assert command.name == name
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) > 6
    assert "\\b" not in result.stdout  # click's mark for lines that stay as they are


def test_completion_offers_commands_when_a_name_is_begun() -> None:
    """The shell gets the names that begin like that."""
    result = CliRunner(env={"_HMMCTL_COMPLETE": "bash_complete", "COMP_WORDS": "hmmctl pa", "COMP_CWORD": "1"}).invoke(
        main, prog_name="hmmctl"
    )
    assert result.stdout.split() == ["plain,pagetable", "plain,pagemap"]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("run acknow", ["plain,acknowledge-before-edit"]),
        ("run ./acknow", ["file,./acknow"]),
        ("replay rec", ["file,rec"]),
        ("verify tra", ["file,tra"]),
        ("ps --target ./so", ["file,./so"]),
        ("certify --only plai", ["plain,plain"]),
    ],
)
def test_completion_offers_what_an_argument_may_be(words: str, offered: list[str]) -> None:
    """Scenarios by name, files and folders where they are taken, and names from lists."""
    completing = {
        "_HMMCTL_COMPLETE": "bash_complete",
        "COMP_WORDS": f"hmmctl {words}",
        "COMP_CWORD": str(len(words.split())),
    }
    assert CliRunner(env=completing).invoke(main, prog_name="hmmctl").stdout.split() == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_when_the_shell_is_known(shell: str) -> None:
    """The script calls hmmctl back through its variable."""
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0
    assert "_HMMCTL_COMPLETE" in result.stdout


def test_completion_asks_which_shell_when_it_cannot_tell() -> None:
    """An unknown $SHELL is no reason to guess."""
    result = CliRunner(env={"SHELL": "/bin/tcsh"}).invoke(main, ["completion"])
    assert result.exit_code == 2
    assert "bash, zsh, fish" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [["ps"], ["maps", "1"], ["pagetable", "1"], ["walk", "1", "1000"], ["watch"], ["pending"], ["stats"]],
    ids=lambda arguments: arguments[0],
)
def test_command_says_how_to_start_a_daemon_when_nobody_listens(tmp_path: Path, arguments: list[str]) -> None:
    """Exit code 3, with the socket and the command to type."""
    socket = tmp_path / "no.sock"
    done = subprocess.run(
        [sys.executable, "-m", "hmm_client.cli", *arguments, "--target", str(socket)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"hmmctl: nobody listens at unix:{socket}",
        f"Start a daemon with `hmmd --socket {socket}`, or say where it is with --target or $HMMD_SOCKET.",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["walk", "1", "here"], "here is no address"),
        (["walk", "1", "7ffffffff000"], "outside of the address space"),
        (["pagetable", "1", "1000"], "is no range"),
        (["pagetable", "1", "2000-1000"], "is no range of the address space"),
        (["maps", "0"], "0 is no number of a process; `hmmctl ps` shows them"),
        (["smaps", str(1 << 64)], "is no number of a process"),
        (["watch", "--mirror", "gpu0"], "gpu0 is no number of a mirror"),
        (["ps", "--tls-key", "key.pem"], "--tls-certificate and --tls-key belong together"),
        (["replay", "/nonexistent/folder"], "/nonexistent/folder: no such folder"),
        (["verify", "/nonexistent/folder"], "/nonexistent/folder: no such file or folder"),
        (["run", "--junit", "/nonexistent/x.xml", "zero-page"], "/nonexistent is no folder that can be written to"),
        (["certify", "--seeds", "3:1", "--", "driver"], "3:1 ends before it begins"),
        (["certify", "--junit", "/tmp", "--", "driver"], "File '/tmp' is a directory"),
        (["certify", "--deadline", "0", "--", "driver"], "Invalid value for '--deadline': 0.0 is not in the range"),
        (["certify", "--limit", "0.5", "--", "driver"], "Invalid value for '--limit': 0.5 is not in the range x>=1"),
        (["certify", "--jobs", "0", "--", "driver"], "Invalid value for '--jobs': 0 is not in the range x>=1"),
        (["certify", "--only", "nothing", "--", "driver"], "Invalid value for '--only': 'nothing' is not one of"),
        (["run", "--all", "/nonexistent/file"], "there is no file and no scenario '/nonexistent/file'"),
        (["record", "--output", "/dev/null", "--", "true"], "/dev/null: "),
        (["replay", "--devices", "9"], "Invalid value for '--devices': 9 is not in the range 0<=x<=8"),
        (["replay", "--memory", "100"], "--memory and --swap belong together"),
        (["sanitize", "--device", "gpu0"], "gpu0 is no number of a device"),
        (["top", "--interval", "0"], "Invalid value for '--interval' / '-i'"),
        (["pending", "--timeout", "0"], "Invalid value for '--timeout': 0.0 is not in the range x>0"),
        (["run", "/nonexistent/file"], "there is no file and no scenario '/nonexistent/file'"),
        (["record", "--", "/nonexistent/command"], "no such command"),
        (["record", "--outptu", "folder", "--", "true"], "No such option '--outptu'"),
        (["nonsense"], "No such command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_command_ends_with_two_when_its_input_is_unusable(arguments: list[str], message: str) -> None:
    """What cannot be understood is told from what is not as it should be."""
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def failing(error: BaseException) -> click.Group:
    """`hmmctl` with one command, which ends with an error."""

    class Failing(Commands):
        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
            @click.command(cmd_name)
            def command() -> None:
                raise error

            return command

    return Failing()


def test_command_ends_with_130_when_it_is_interrupted_while_it_loads() -> None:
    """Ctrl-C says nothing at any time, and the shell sees SIGINT's exit code."""
    result = CliRunner().invoke(failing(KeyboardInterrupt()), ["ps"])
    assert (result.exit_code, result.output) == (130, "")


LOADING = """
import signal, sys

class Finder:
    def find_spec(self, name, path, target=None):
        if name == module:
            signal.raise_signal(signal.SIGINT)

module = sys.argv.pop()
sys.meta_path.insert(0, Finder())
from hmm_client.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("module", "argument"),
    [
        ("hmm_client.cli", "ps"),  # before the command line is there
        ("click", "ps"),
        ("importlib.metadata", "--version"),  # while it is read
        ("hmm_client.commands.ps", "ps"),  # when it is known
    ],
)
def test_command_ends_with_130_when_it_is_interrupted_while_modules_are_loaded(module: str, argument: str) -> None:
    """Ctrl-C in the first moments says nothing either."""
    command = [sys.executable, "-c", LOADING, argument, module]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_command_names_the_file_when_it_cannot_write_it() -> None:
    """A report in a folder that is not there is a line on stderr, not a traceback."""
    result = CliRunner().invoke(failing(FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b")), ["run"])
    assert (result.exit_code, result.stderr) == (2, "hmmctl: a/b: No such file or directory\n")


def test_command_says_so_when_its_output_has_no_room() -> None:
    """A full disk behind standard output is reported once, and not again at the end of the process."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "hmm_client.cli", "run", "--list"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "hmmctl: standard output: No space left on device\n")


def test_message_keeps_numbers_when_it_becomes_json() -> None:
    """64-bit numbers stay numbers, enumerations are words, what is absent is left out."""
    message = inspection_pb2.PendingOperation(operation_id=1 << 60, name="munmap")
    message.events.add(mirror_id=3, type=types_pb2.EVENT_TYPE_MUNMAP)
    value = json.loads(json.dumps(as_value(message)))
    assert value["operation_id"] == 1 << 60
    assert value["events"][0]["type"] == "MUNMAP"
    assert value["events"][0]["state"] == ""
    assert "deadline_ms" not in value["events"][0]
    assert "ranges" not in value


def test_message_keeps_maps_and_bytes_when_it_becomes_json() -> None:
    """Counters by name are an object, ordered by name; bytes are hexadecimal."""
    statistics = inspection_pb2.DaemonStatistics(operations={"mmap": 2, "brk": 1})
    assert list(as_value(statistics)["operations"].items()) == [("brk", 1), ("mmap", 2)]
    assert as_value(event_pb2.Event(entries=b"\x01\xff"))["entries"] == "01ff"


def test_word_is_the_number_when_an_enumeration_does_not_know_it() -> None:
    """A newer daemon may send values that this client has no name for."""
    assert word(types_pb2.EventType.DESCRIPTOR, 99) == "99"


def test_tree_connects_directories_when_they_have_siblings() -> None:
    """Lines go down past children that have younger siblings, and end at the last."""
    assert pagetable._stems([0, 1, 2, 2, 1, 2]) == ["", "├─ ", "│  ├─ ", "│  └─ ", "└─ ", "   └─ "]


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (500 << 20, "500 MiB"), (3 << 40, "3.0 TiB")]
)
def test_size_is_short_when_it_is_large(number: int, text: str) -> None:
    """Three digits are enough for people."""
    assert output.size(number) == text


@pytest.mark.parametrize(
    ("microseconds", "text"),
    [(0, "-"), (64, "0.06 ms"), (1_520, "1.52 ms"), (67_340, "67.3 ms"), (999_400, "999 ms"), (4_002_160, "4.00 s")],
)
def test_latency_has_three_digits_when_it_is_long(microseconds: int, text: str) -> None:
    """Latencies of events are told in what a reader compares at a glance."""
    assert output.latency(microseconds) == text


HEADS = ("name", ">a", ">b", ">c")
ROWS = [("a-rather-long-name", 1, 0, 1_000), ("short", 2, 0, 0)]


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (
            None,
            ["name                a  b      c", "a-rather-long-name  1  0  1,000", "short               2  0      0"],
        ),
        (28, ["name                a      c", "a-rather-long-name  1  1,000", "short               2      0"]),
        (21, ["name                a", "a-rather-long-name  1", "short               2"]),
        (15, ["name          a", "a-rather-lo…  1", "short         2"]),
        (1, ["name      a", "a-rathe…  1", "short     2"]),
    ],
)
def test_table_loses_what_says_least_when_the_terminal_is_narrow(width: int | None, lines: list[str]) -> None:
    """First spare columns that hold nothing, then other spare ones, then the ends of long texts."""
    assert output.table_lines(HEADS, ROWS, width, spare=("c", "b")) == lines


def test_pending_says_so_when_an_address_space_is_broken() -> None:
    """A bug that left a process half changed is no call that waits, and is told below those."""
    answer = inspection_pb2.GetPendingResponse()
    answer.broken_spaces.add(space_id=7, process_ids=[2, 3], because="munmap failed half-way")
    assert pending.calls_that_wait(answer) == [
        "nothing is pending",
        "",
        "The memory of process 2, process 3 is broken, and no call changes it any more: munmap failed half-way",
    ]


def test_watch_names_the_reason_when_2015_has_no_word_for_it() -> None:
    """What only drivers of today's interface hear is told in today's words, and a device's own fault has no cause."""
    event = event_pb2.Event(mirror_ids=[3], event_sequences=[7], reason=types_pb2.REASON_PROTECTION_VMA)
    event.operation, event.operation_id, event.cause = "mprotect", 9, "mprotect write"
    assert " ".join(watch.event_line(event).split()) == "PROTECTION_VMA -> mirror 3 #7 (mprotect write; mprotect 9)"
    event.type, event.cause = types_pb2.EVENT_TYPE_DEVICE_RFAULT, ""
    assert " ".join(watch.event_line(event).split()) == "DEVICE_RFAULT -> mirror 3 #7 (mprotect 9)"


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0 processes"), (1, "1 process"), (2, "2 processes"), (1234, "1,234 processes")]
)
def test_number_of_things_is_said_as_people_do(number: int, said: str) -> None:
    """One is no plural."""
    assert output.counted(number, "process", "processes") == said
    assert output.counted(number, "call") == said.replace("processes", "calls").replace("process", "call")


INTERRUPTED = """
import asyncio, importlib.abc, signal, sys
from hmm_client.commands.connection import run

moment = sys.argv[1]

def now(at):
    if at == moment:
        signal.raise_signal(signal.SIGINT)

def handle(number, handler, install=signal.signal):
    install(number, handler)
    if handler is not signal.default_int_handler:
        now("before")

signal.signal = handle

class Loading(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "uvloop":
            now("loading")

sys.meta_path.insert(0, Loading())

async def generator():
    try:
        yield 1
        yield 2
    finally:
        now("after")

async def work():
    global left
    left = generator()
    async for _ in left:
        break
    now("meanwhile")
    if moment == "meanwhile":
        await asyncio.Event().wait()
    return "done"

try:
    print(run(work()))
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["loading", "before", "meanwhile", "after", "never"])
def test_work_is_put_away_in_order_when_it_is_interrupted(moment: str) -> None:
    """Ctrl-C before there is a loop, while it is made, while it runs or is closed: nothing but that is told."""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", INTERRUPTED, moment], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.stdout == ("done\n" if moment == "never" else "interrupted\n")


def test_table_has_a_line_for_each_row_when_names_hold_anything() -> None:
    """Line ends would break the table, and escapes would reach the terminal."""
    lines = output.table_lines(
        ("name", ">pages"), [("a\nb", 1), ("\x1b[2Jc", 2), ("\N{LATIN SMALL LETTER U WITH DIAERESIS}", 3)], None
    )
    assert lines == [
        "name      pages",
        "a\\nb          1",
        "\\x1b[2Jc      2",
        "\N{LATIN SMALL LETTER U WITH DIAERESIS}             3",
    ]


@pytest.mark.parametrize("token", ["mine\n", "m\N{LATIN SMALL LETTER O WITH DIAERESIS}", "\t"])
def test_token_is_refused_when_it_cannot_travel(token: str) -> None:
    """What is read from a file ends with its line; gRPC would say nothing that a user understands."""
    result = CliRunner(env={"HMMD_TOKEN": token}).invoke(main, ["ps"])
    assert result.exit_code == 2
    assert "a token has printable characters of ASCII, and no line end" in result.stderr


TLS = Path(__file__).parents[1] / "server" / "tls"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("--tls-ca", __file__), f"{__file__}: it holds no certificates in PEM"),
        (("--tls-ca", "/nonexistent"), "/nonexistent: No such file or directory"),
        (
            ("--tls-certificate", str(TLS / "client.pem"), "--tls-key", str(TLS / "server.key")),
            f"{TLS}/client.pem: it is no certificate in PEM, or {TLS}/server.key is not its key",
        ),
    ],
    ids=["something else", "nothing", "another's key"],
)
def test_certificates_are_refused_when_they_are_of_no_use(files: tuple[str, ...], message: str) -> None:
    """With the name of the file; gRPC would find nobody with them."""
    result = CliRunner().invoke(main, ["ps", "-t", "127.0.0.1:1", *files])
    assert (result.exit_code, result.stderr) == (2, f"hmmctl: {message}\n")
