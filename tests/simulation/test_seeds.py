"""Seeds that found something once, each in its town; `python tests/simulation SEED TOWN` runs one by itself.

A seed is another run as soon as the workload changes; so what it found has a test of its own as well.
"""

from __future__ import annotations

import pytest

from hmm.testing_swap import TOWNS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("town", "seed"),
    [
        ("devices", 690),  # a VMA that was being unmapped was out of the reverse map's sight
        ("devices", 915),
        ("devices", 853),  # a mirror whose error was its end was lost while others finished, and told nevertheless
        ("huge", 1171),  # an exec that was refused kept what others had mapped in the new address space
        ("memory", 521),  # a page that another device had taken meanwhile was looked for on the first
        ("memory", 789),
        ("memory", 20028),
        ("memory", 20039),  # a touch inside the last update of a mirror waited for that update
        ("memory", 947),  # a fault told a driver of pages that it had just brought back
        ("huge", 1354),  # a driver that had only started, and did not finish in time, was taken for one that had
        ("swap-memory", 132089),  # what had left the swap cache was taken for unwritten when a relative freed it lazily
        ("swap-devices", 12),  # a page that the CPU was taking back was given to a device once more meanwhile
        ("huge", 110203),
        ("huge", 3056),  # a call from inside a callback turned round and round for a page that this callback kept
        ("huge", 553),  # a pin asked the mapping of its first page, mapped anew meanwhile, what its other pages need
        ("swap-devices", 3093),  # memory that was made for pages of a device was gone when it was their turn
        ("swap-devices", 180),  # a device whose driver had only started was refused access
        ("swap-devices", 1092),  # a fault tried again and again while another call held the page
        ("swap-devices", 2056),  # a detach that failed had removed the notifiers: a driver was not told of an mprotect
        ("swap-devices", 518),  # an eviction moved a page that was mapped again where it had told nobody
        ("memory", 2068),  # a page whose copy back was made to fail was expected to hold what it did
        ("compound", 1354),  # a huge page that was freed lazily went in part, as pages of it were pinned
        ("compound", 60424),  # a copy failed, and pages before it that were unmapped meanwhile were taken for there
        ("merging", 71286),  # writes had copied all merged pages while drivers were told that they were to be copied
        ("compound", 70544),  # a child touched a page, inside the callback that its migration in the parent waited for
        ("compound", 60654),  # a child that came while pages left a device kept the entries that stood in for them
        ("devices", 83861),  # a driver that could not give up a page at once was refused the page
        ("swap-memory", 81729),  # a touch took pages of a device that went while others before them came back
        ("devices", 2431),  # a device took a page whose contents were being lost, while a relative was told of that
        ("swap-memory", 2439),  # a device was emptied of pages that another call was bringing back
        ("swap", 4487),  # pages that relatives had read from swap were made to go without being written
        ("swap-devices", 87038),  # a detach turned round and round: its process had ended with a migration under way
        ("swap", 50147),  # a touch of two mappings brought each page back at the cost of the other, and never ended
        ("huge", 8543),  # an mprotect that failed cut the huge page behind those that got their protection back
        ("mirrors", 8940),  # a fork waited for its turn until everything else had ended
        ("devices", 4841),  # an exit was refused half-way: it came to wait for the late answer of its own callback
        ("huge", 793),  # an exit went on without a driver that had only started, and that was taken for an error
        ("huge-files", 3304),  # a mapping that was going and its successor were told of by ranges that overlapped
        ("huge-files", 3629),  # a huge page of a file was split for soft offlining, and unmapped meanwhile
    ],
)
def test_simulate_holds_every_invariant_when_the_seed_once_broke_one(town: str, seed: int) -> None:
    """What was mended stays so."""
    TOWNS[town](seed)
