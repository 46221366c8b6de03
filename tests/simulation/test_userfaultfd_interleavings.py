"""Seeded interleavings of processes whose missing pages somebody else brings in."""

from __future__ import annotations

from collections import Counter

import pytest

from hmm import fork, uffdio
from hmm.address_space import AddressSpace
from hmm.anon_vma import Forest
from hmm.testing import SimulationError
from hmm.testing_userfaultfd import simulate_userfaultfds
from hmm.userfaultfd import Userfaultfd
from hmm.vma import UFFD_FLAGS, Mapping, Vma


@pytest.mark.slow
def test_simulate_comes_to_waits_and_to_every_way_that_they_end() -> None:
    """Touches, populating, pins and devices' accesses meet handlers; fills succeed, in part, and fail."""
    calls: Counter[tuple[str, str]] = Counter()
    for seed in range(1, 20):
        calls += simulate_userfaultfds(seed).coverage.calls
    met = {(name, how) for name, how in calls if name.startswith(("uffd", "read_user"))}
    assert {("uffd_continue", how) for how in ("done", "EFAULT", "EINVAL", "ENOENT")} <= met
    assert {("uffd_register", "EBUSY"), ("uffd_register", "EINVAL"), ("uffd_wake", "done")} <= met
    assert {("uffd_copy", how) for how in ("done", "EEXIST", "ENOENT", "EAGAIN")} <= met
    assert {name for name, how in calls if how == "EINTR"} >= {"write_memory", "read_memory"}


def found(seeds: range) -> str:
    """What the first failing seed says; empty when none fails."""
    for seed in seeds:
        try:
            simulate_userfaultfds(seed)
        except SimulationError as error:
            return str(error)
    return ""


def test_simulate_finds_a_child_that_stays_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: fork leaves the child's VMAs with its parent's userfaultfd."""
    childs_mapping = fork._childs_mapping

    def kept(parent: AddressSpace, child: AddressSpace, vma: Vma, forest: Forest) -> Mapping:
        mapping = childs_mapping(parent, child, vma, forest)
        return mapping.with_userfaultfd(vma.mapping.userfaultfd, vma.flags & UFFD_FLAGS)

    monkeypatch.setattr(fork, "_childs_mapping", kept)
    assert "which is closed" in found(range(60))


def test_simulate_finds_a_page_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: UFFDIO_COPY does not look whether a page is there."""

    def room(_: AddressSpace, __: Vma, piece: object, *, framed: bool) -> tuple[int, None]:
        return piece.npages, None  # type: ignore[attr-defined]

    monkeypatch.setattr(uffdio, "_room", room)
    assert found(range(60))


def test_simulate_finds_a_userfaultfd_that_is_closed_by_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: its VMAs keep its number."""

    def close(space: AddressSpace, userfaultfd: Userfaultfd) -> object:
        yield from ()
        space.userfaultfds.pop(userfaultfd.id, None)
        userfaultfd.wake_all()

    monkeypatch.setattr(uffdio, "close", close)
    assert found(range(60))
