"""What all seeded runs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from coverage import Coverage


@pytest.fixture(scope="module")
def untraced() -> Iterator[None]:
    """Coverage is that of the other tests: tracing makes these runs three times as long, and tells nothing more."""
    measured = Coverage.current()
    if measured is None:
        yield
        return
    measured.stop()
    yield
    measured.start()
