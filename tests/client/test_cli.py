"""The command line: what it loads, what it says when something is wrong, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from hmm_client.cli import COMMANDS, main
from hmm_client.commands import output, pagetable
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
        (["maps", "0"], "0 is not in the range"),
        (["replay", "/nonexistent/folder"], "/nonexistent/folder: no such folder"),
        (["verify", "/nonexistent/folder"], "/nonexistent/folder: no such file or folder"),
        (["run", "/nonexistent/file"], "there is no file and no scenario '/nonexistent/file'"),
        (["record", "--", "/nonexistent/command"], "no such command"),
        (["nonsense"], "No such command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_command_ends_with_two_when_its_input_is_unusable(arguments: list[str], message: str) -> None:
    """What cannot be understood is told from what is not as it should be."""
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert message in result.stderr


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
