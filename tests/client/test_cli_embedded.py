"""A daemon of one's own: there while the block lasts, and gone afterwards."""

from __future__ import annotations

import pytest

import hmm_client
from hmm.errors import OutOfFramesError
from hmm_client.embedded import EmbeddedDaemonError, embedded_daemon


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
