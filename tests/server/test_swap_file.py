"""Swap of a daemon: its own memory, or a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from hmm.frame_contents import anonymous_memory
from hmm_server.config import Config, ConfigError
from hmm_server.daemon import Daemon
from hmm_server.swap_file import swap_memory


def test_swap_is_memory_of_the_daemon_when_no_file_is_named() -> None:
    """Without a file swap still lets processes have more than there are frames."""
    assert swap_memory(Config(swap_pages=8)) is anonymous_memory


def test_file_is_made_with_all_its_blocks_and_for_nobody_else(tmp_path: Path) -> None:
    """A disk that is full is an error at the start; and what processes had in memory is not for others to read."""
    path = tmp_path / "swap"
    memory = swap_memory(Config(swap_pages=8, swap_file=str(path)))(9 << 12)
    memory[:4] = b"page"
    status = path.stat()
    assert (status.st_size, status.st_mode & 0o777) == (9 << 12, 0o600)
    assert status.st_blocks << 9 >= 9 << 12
    assert path.read_bytes()[:4] == b"page"


def test_daemon_does_not_start_when_the_file_cannot_be_made(tmp_path: Path) -> None:
    """It says which file, and why."""
    provider = swap_memory(Config(swap_pages=8, swap_file=str(tmp_path / "no" / "swap")))
    with pytest.raises(ConfigError, match="No such file"):
        provider(9 << 12)


async def test_daemon_swaps_to_its_file(tmp_path: Path) -> None:
    """The machine of a daemon has the area that the settings ask for."""
    path = tmp_path / "swap"
    daemon = Daemon(Config(frames=64, swap_pages=8, swap_file=str(path)))
    assert daemon.machine.frames.swap is not None
    assert daemon.machine.frames.swap.total == 8
    assert path.stat().st_size == 9 << 12
