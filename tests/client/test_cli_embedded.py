"""A daemon of one's own: there while the block lasts, and gone afterwards."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hmm_client
from hmm.errors import OutOfFramesError
from hmm_client.embedded import EmbeddedDaemonError, embedded_daemon

OWNER = """
import signal
from hmm_client.embedded import embedded_daemon
with embedded_daemon(log_level="info") as target:
    print(target, flush=True)
    signal.pause()
"""


async def test_daemon_serves_when_the_block_begins_and_is_gone_when_it_ends() -> None:
    """It has the settings that were asked for; its socket goes with it."""
    with embedded_daemon(processes=1) as target:
        async with hmm_client.connect(target) as client:
            await client.create_process()
            with pytest.raises(OutOfFramesError, match="processes"):
                await client.create_process()
    async with hmm_client.connect(target) as client:
        with pytest.raises(hmm_client.UnavailableError):
            await client.create_process()


def test_daemon_says_why_when_it_cannot_start(capfd: pytest.CaptureFixture[str]) -> None:
    """A setting that is not understood ends it; its own message stands on stderr."""
    with pytest.raises(EmbeddedDaemonError, match="did not start"), embedded_daemon(processes=0):
        pass
    assert "processes is 0; it must be at least 1" in capfd.readouterr().err


@pytest.mark.slow
def test_daemon_ends_when_its_owner_is_killed() -> None:
    """Nothing is left behind by tests that time out or terminals that are closed."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    socket = Path(owner.stdout.readline().strip().removeprefix("unix:"))
    assert socket.is_socket()
    owner.kill()
    _, said = owner.communicate(timeout=60)  # the daemon has the same stderr: this waits for its end
    assert "stopped" in said
    assert not socket.exists()
    shutil.rmtree(socket.parent)
