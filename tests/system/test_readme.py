"""What the README shows is what happens."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.conftest import Daemon

README = Path(__file__).parents[2] / "README.md"
TIMEOUT_S = 60.0


def code_block(text: str) -> str:
    """The first block of Python."""
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


def indented_blocks(text: str) -> list[list[str]]:
    """The indented blocks after the Python, each as its lines."""
    after = re.split(r"```python\n.*?```", text, maxsplit=1, flags=re.DOTALL)[1]
    blocks = re.findall(r"(?:^ {4}.*\n)+", after, re.MULTILINE)
    return [[line.strip() for line in block.splitlines()] for block in blocks]


async def test_first_driver_prints_what_the_readme_says(start_daemon: Callable[..., Awaitable[Daemon]]) -> None:
    """The example runs as it stands, against a daemon with default settings."""
    daemon = await start_daemon()
    text = README.read_text()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code_block(text)),
        env=os.environ | {"HMMD_SOCKET": str(daemon.socket)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    printed, raised = indented_blocks(text)[:2]
    assert output.decode().splitlines() == printed
    assert errors.decode().splitlines()[-1:] == raised
