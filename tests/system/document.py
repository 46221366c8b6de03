"""Runs what a document shows: every command is executed and every output compared, so that neither can go stale.

In a Markdown file, these fenced blocks are run, from the top, in one shell and one empty folder:

    ```console              `$ ` begins a command, `> ` goes on with it, what follows is its output
    ```python NAME          (or any language) is written to the file NAME
    ```python               is run as a script; a ```text block right behind it is its output

In an expected output `...` stands for anything within a line, a line that is only `...` for any number of lines, and a
last line `[exit code 2]` for how the command ended if that is not 0.  ```mermaid and other ```text are shown only;
whatever else is fenced is an error, so that nothing is left out unseen.

The shell finds the programs of this environment first, knows no HMMD_* variable, and has XDG_RUNTIME_DIR in its folder:
`hmmd &` and `hmmctl ps` in a document find one another.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

TIMEOUT_S = 280.0
PROGRAMS = Path(sys.executable).parent
SHOWN_ONLY = frozenset({"mermaid", "text"})
FENCE = re.compile(r"^```(?P<language>[a-z+]*)(?: +(?P<name>\S+))?$")


@dataclass(frozen=True)
class Block:
    """A fenced block: `line` is that of its fence."""

    line: int
    language: str
    name: str
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        """What stands in it."""
        return "".join(f"{line}\n" for line in self.lines)


def blocks_of(path: Path) -> list[Block]:
    """The fenced blocks of a document, in order."""
    blocks: list[Block] = []
    lines = iter(enumerate(path.read_text().splitlines(), 1))
    for number, line in lines:
        found = FENCE.match(line)
        if found is None:
            assert not line.startswith("```"), f"{path.name}:{number}: {line!r} is no fence that is understood"
            continue
        inside = []
        for _, inner in lines:
            if inner == "```":
                break
            inside.append(inner)
        blocks.append(Block(number, found["language"], found["name"] or "", tuple(inside)))
    return blocks


@dataclass(frozen=True)
class Command:
    """A command of a console block, and what it is said to print."""

    line: int
    text: str
    output: tuple[str, ...]
    exit_code: int = 0


def commands_of(block: Block) -> list[Command]:
    """The commands of a console block."""
    found: list[tuple[int, list[str], list[str]]] = []
    for number, line in enumerate(block.lines, block.line + 1):
        if line.startswith("$ "):
            found.append((number, [line[2:]], []))
        elif found and line.startswith("> ") and not found[-1][2]:
            found[-1][1].append(line[2:])
        else:
            assert found, f"line {number}: output before any command"
            found[-1][2].append(line)
    return [_command(number, "\n".join(text), output) for number, text, output in found]


def _command(line: int, text: str, output: list[str]) -> Command:
    code = re.fullmatch(r"\[exit code (\d+)\]", output[-1]) if output else None
    return Command(line, text, tuple(output[:-1] if code else output), int(code[1]) if code else 0)


def matches(expected: tuple[str, ...], printed: str) -> bool:
    """Whether an output is as expected; `...` stands for anything."""
    lines = [r"(?:.*\n)*?" if line == "..." else _pattern(line) + r"\n" for line in expected]
    return re.fullmatch("".join(lines), printed and printed.rstrip("\n") + "\n") is not None


def _pattern(line: str) -> str:
    return ".*".join(re.escape(part) for part in line.rstrip().split("...")) + " *"


class Shell:
    """A shell that keeps its state from one command to the next."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._mark = f"-- {uuid.uuid4().hex} "

    def run(self, command: str) -> tuple[str, int]:
        """Run a command.  Returns: what it printed on both streams, and its exit code."""
        writer, reader = self._process.stdin, self._process.stdout
        assert writer is not None
        assert reader is not None
        writer.write(f"{command}\nprintf '\\n{self._mark}%d\\n' $?\n")
        writer.flush()
        return self._read(reader)

    def _read(self, reader: IO[str]) -> tuple[str, int]:
        lines: list[str] = []
        for line in reader:
            if line.startswith(self._mark):
                printed = "".join(lines)
                return printed.removesuffix("\n"), int(line.removeprefix(self._mark))
            lines.append(line)
        raise AssertionError(f"the shell has ended: {''.join(lines)}")


@contextmanager
def shell(folder: Path, timeout_s: float = TIMEOUT_S, programs: Path = PROGRAMS) -> Iterator[Shell]:
    """A shell in a folder; what it has started ends with it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HMMD_", "PYTEST"))}
    environment |= {
        "PATH": f"{programs}:{environment['PATH']}",
        "HOME": str(folder),
        "XDG_RUNTIME_DIR": str(folder),
        "COLUMNS": "120",
    }
    process = subprocess.Popen(
        ["timeout", "--kill-after=1", f"{timeout_s:g}", "bash", "--noprofile", "--norc"],
        cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        yield Shell(process)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        with process:
            assert process.stdin is not None
            process.stdin.close()


def run_document(path: Path, folder: Path, timeout_s: float = TIMEOUT_S, programs: Path = PROGRAMS) -> int:
    """Run everything that a document shows.

    Args:
        folder: where it runs; empty, if it is not about a folder that there is.
        timeout_s: for all of it.
        programs: folder with the programs that it finds first, `python` among them.

    Returns: how many commands and scripts were run.

    Raises:
        AssertionError: an output is another; says where.
    """
    blocks = blocks_of(path)
    count = 0
    with shell(folder, timeout_s, programs) as bash:
        for number, block in enumerate(blocks):
            where = f"{path.name}:{block.line}"
            if block.name:
                (folder / block.name).parent.mkdir(parents=True, exist_ok=True)
                (folder / block.name).write_text(block.text)
            elif block.language == "console":
                for command in commands_of(block):
                    _compare(f"{path.name}:{command.line}", command, *bash.run(command.text))
                    count += 1
            elif block.language == "python":
                script = folder / f"block{block.line}.py"
                script.write_text(block.text)
                following = blocks[number + 1] if number + 1 < len(blocks) else None
                output = following.lines if following is not None and following.language == "text" else ("...",)
                _compare(where, Command(block.line, script.name, output), *bash.run(f"python {script.name}"))
                count += 1
            else:
                assert block.language in SHOWN_ONLY, f"{where}: nobody runs ```{block.language}"
    return count


def _compare(where: str, command: Command, printed: str, exit_code: int) -> None:
    expected = "\n".join(command.output)
    assert exit_code == command.exit_code, f"{where}: {command.text}: exit code {exit_code}\n{printed}"
    assert matches(command.output, printed), f"{where}: {command.text} printed\n{printed}\ninstead of\n{expected}"
