"""What docker/README.md shows is what happens: its commands run in order, in the project's folder, as they stand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest
from containers import IMAGE, ROOT, docker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
COMMAND_S = 300
README = (ROOT / "docker" / "README.md").read_text()
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Step:
    """One command and what it prints."""

    command: str
    output: tuple[str, ...]


def steps() -> list[Step]:
    """All commands after a prompt, with the lines that follow; `> ` continues a command."""
    found: list[tuple[list[str], list[str]]] = []
    for block in re.findall(r"(?:^ {4}.*\n)+", README, re.MULTILINE):
        lines = [line[4:] for line in block.splitlines()]
        if not lines[0].startswith("$ "):
            continue
        for line in lines:
            if line.startswith("$ "):
                found.append(([line[2:]], []))
            elif line.startswith("> ") or line == ">":
                found[-1][0].append(line[2:])
            else:
                found[-1][1].append(line)
    return [Step("\n".join(command), tuple(output)) for command, output in found]


def plain(line: str) -> str:
    """Without colours, with one space where there are many, and as all versions of compose name a container."""
    line = re.sub(r"^(?:\w+-)?(\w+)[-_](\d+) ", r"\1_\2 ", COLOUR.sub("", line))
    return " ".join(line.split())


def assert_shown(expected: tuple[str, ...], printed: list[str]) -> None:
    """The lines are all there is, in this order; `...` stands for any lines."""
    if "..." not in expected:
        assert [plain(line) for line in printed] == [plain(line) for line in expected]
        return
    rest = iter([plain(line) for line in printed])
    for line in expected:
        assert line == "..." or any(plain(line) == other for other in rest), f"no {line!r} in {printed}"


def test_commands_do_what_the_readme_says() -> None:
    """Each ends with 0 and prints what is shown."""
    assert IMAGE == "hmmd", "the page names this image"
    assert len(steps()) > 10
    certificates = ROOT / "docker" / "certs"
    assert not certificates.exists(), "somebody's own certificates would be overwritten"
    environment = os.environ | {"HMMD_PROBE_INTERVAL": "1s", "MAKEFLAGS": "", "VENV": sys.prefix}
    try:
        for step in steps():
            done = subprocess.run(
                ["bash", "-c", step.command], capture_output=True, text=True, timeout=COMMAND_S, check=False, cwd=ROOT,
                env=environment,
            )  # fmt: skip
            assert done.returncode == 0, (
                f"{step.command}: {done.returncode}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
            )
            if step.output:
                assert_shown(step.output, done.stdout.splitlines())
    finally:
        docker("rm", "--force", "--volumes", "hmmd", check=False)
        docker("image", "rm", "my-driver", check=False)
        shutil.rmtree(certificates, ignore_errors=True)
