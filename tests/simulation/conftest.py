"""What all seeded runs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from coverage import Coverage


@pytest.fixture(autouse=True, scope="package")
def untraced() -> Iterator[None]:
    """Coverage is that of tests/hmm: tracing makes seeded runs three times as long, and tells nothing more."""
    measured = Coverage.current()
    if measured is None:
        yield
        return
    measured.stop()
    yield
    measured.start()
