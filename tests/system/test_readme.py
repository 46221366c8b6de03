"""What the README shows is what happens."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import Daemon

README = Path(__file__).parents[2] / "README.md"
TIMEOUT_S = 60.0


def examples(text: str) -> list[tuple[str, list[str], list[str]]]:
    """Every block of Python: its text, what it prints, what it raises: the two indented blocks behind it."""
    found = []
    for part in text.split("```python\n")[1:]:
        code, after = part.split("```", maxsplit=1)
        blocks = re.findall(r"(?:^ {4}.*\n)+", after, re.MULTILINE)
        printed, raised = ([line.strip() for line in block.splitlines()] for block in blocks[:2])
        found.append((code, printed, raised))
    return found


EXAMPLES = examples(README.read_text())


@pytest.mark.parametrize(("code", "printed", "raised"), EXAMPLES, ids=["2015", "today", "device-memory"])
async def test_driver_prints_what_the_readme_says(
    start_daemon: Callable[..., Awaitable[Daemon]], code: str, printed: list[str], raised: list[str]
) -> None:
    """The examples run as they stand, each against a daemon with default settings."""
    daemon = await start_daemon()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code),
        env=os.environ | {"HMMD_SOCKET": str(daemon.socket)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    assert output.decode().splitlines() == printed
    assert errors.decode().splitlines()[-1:] == raised
