"""The fixtures of the kernel's own selftest: everything goes through a daemon over its socket.

**Source**: Linux tools/testing/selftests/mm/hmm-tests.c, FIXTURE(hmm), FIXTURE(hmm2), 6.12.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from selftest_rig import Rig

from hmm_client import sync
from hmm_client.drivers.dmirror import LINUX_6_12_CORRECTED, Profile
from hmm_client.drivers.over_wire import OverWireHmm
from hmm_client.embedded import PATIENCE, embedded_daemon


@pytest.fixture(scope="session")
def selftest_client() -> Iterator[sync.Client]:
    """A client of a daemon that the cases of 6.12 share, one after the other; with huge pages set aside."""
    with (
        embedded_daemon(hugetlb_pages=4, swap_pages=4096, harness=True, acknowledgement_s=600.0, **PATIENCE) as target,
        sync.connect(target, name="selftest") as client,
    ):
        yield client


@pytest.fixture(scope="session")
def selftest_profile() -> Profile:
    """How the test driver behaves: as that of 6.12."""
    return LINUX_6_12_CORRECTED


def _rig(client: sync.Client, variant: str, count: int, profile: Any) -> Iterator[Rig]:
    hmm = OverWireHmm(client)
    rig = Rig(client, hmm, variant, count, profile)
    yield rig
    for mirror in rig.mirrors:
        mirror.close()
    hmm.close()
    rig.process.exit()


@pytest.fixture(params=["private", "coherent"])
def hmm(request: pytest.FixtureRequest, selftest_client: sync.Client, selftest_profile: Profile) -> Iterator[Rig]:
    """One mirror: of device 0, or 2."""
    yield from _rig(selftest_client, request.param, 1, selftest_profile)


@pytest.fixture(params=["private", "coherent"])
def hmm2(request: pytest.FixtureRequest, selftest_client: sync.Client, selftest_profile: Profile) -> Iterator[Rig]:
    """Two mirrors of one process: of devices 0 and 1, or 2 and 3."""
    yield from _rig(selftest_client, request.param, 2, selftest_profile)
