"""Answers are packed, and none is said twice or swallowed by another."""

from __future__ import annotations

import errno as errnos

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hmm_client.acknowledgements import AcknowledgementLedger
from hmm_proto.v1 import event_pb2


def answer(mirror_id: int, sequence: int, errno: int = errnos.EIO) -> event_pb2.Answer:
    """An answer with an errno."""
    return event_pb2.Answer(mirror_id=mirror_id, event_sequence=sequence, errno=errno)


def test_take_gives_one_mark_when_events_end_in_order() -> None:
    """Everything up to a number is said with one number."""
    ledger = AcknowledgementLedger()
    for sequence in (1, 2, 3):
        ledger.done(9, sequence)
    message = ledger.take()
    assert list(message.mirror_ids) == [9]
    assert list(message.acknowledged_up_to) == [3]
    assert not message.single_sequences
    assert not ledger


def test_take_gives_single_numbers_when_an_earlier_event_is_unfinished() -> None:
    """A driver may answer event 3 while it still handles event 1."""
    ledger = AcknowledgementLedger()
    ledger.done(9, 3)
    message = ledger.take()
    assert not message.mirror_ids
    assert (list(message.single_mirror_ids), list(message.single_sequences)) == ([9], [3])
    ledger.done(9, 1)
    ledger.done(9, 2)
    assert list(ledger.take().acknowledged_up_to) == [3]


def test_take_keeps_the_mark_below_an_answer_when_both_travel_together() -> None:
    """The daemon takes the first answer to an event: a mark may not run over one that says more."""
    ledger = AcknowledgementLedger()
    ledger.done(9, 1)
    ledger.done(9, 2, answer(9, 2))
    ledger.done(9, 3)
    message = ledger.take()
    assert list(message.acknowledged_up_to) == [1]
    assert list(message.single_sequences) == [3]
    assert [(a.mirror_id, a.event_sequence, a.errno) for a in message.answers] == [(9, 2, errnos.EIO)]


def test_take_packs_all_mirrors_when_one_event_reached_many() -> None:
    """256 mirrors of one process are answered by one message of two arrays."""
    ledger = AcknowledgementLedger()
    for mirror_id in range(1, 257):
        ledger.done(mirror_id, 1)
    message = ledger.take()
    assert list(message.mirror_ids) == list(range(1, 257))
    assert set(message.acknowledged_up_to) == {1}


@given(st.data())
def test_take_answers_every_event_once_when_they_end_in_any_order(data: st.DataObject) -> None:
    """As the daemon reads them, answers before marks, every event has one first answer, and it is the right one."""
    count = data.draw(st.integers(1, 20))
    order = data.draw(st.permutations(range(1, count + 1)))
    refused = data.draw(st.sets(st.integers(1, count)))
    ledger = AcknowledgementLedger()
    seen: dict[int, int] = {}
    for sequence in order:
        ledger.done(5, sequence, answer(5, sequence) if sequence in refused else None)
        if data.draw(st.booleans()) or sequence == order[-1]:
            message = ledger.take()
            for up_to in message.acknowledged_up_to:
                for covered in range(1, up_to + 1):
                    seen.setdefault(covered, 0)
            for single in message.single_sequences:
                seen.setdefault(single, 0)
            for one in message.answers:
                assert seen.setdefault(one.event_sequence, one.errno) == one.errno
    assert seen == {sequence: errnos.EIO * (sequence in refused) for sequence in range(1, count + 1)}


@given(st.data())
def test_done_together_says_what_single_answers_would_say(data: st.DataObject) -> None:
    """Whatever was finished by one mirror in between, in any order: the daemon is told of the same events."""
    ledger, other = AcknowledgementLedger(), AcknowledgementLedger()
    ids = [5, 6, 7]
    slots = np.array([ledger.slot(mirror_id) for mirror_id in ids])
    sent = dict.fromkeys(ids, 0)
    unfinished: list[tuple[int, int]] = []
    told: dict[AcknowledgementLedger, set[tuple[int, int]]] = {ledger: set(), other: set()}
    for _ in range(data.draw(st.integers(1, 12))):
        if data.draw(st.booleans()):
            sent = {mirror_id: sequence + 1 for mirror_id, sequence in sent.items()}
            numbers = np.array(list(sent.values()))
            if ledger.is_next(slots, numbers, frozenset(ids)):
                ledger.done_together(slots, numbers, ids, list(sent.values()))
            else:
                for mirror_id, sequence in sent.items():
                    ledger.done(mirror_id, sequence)
            for mirror_id, sequence in sent.items():
                other.done(mirror_id, sequence)
        else:
            mirror_id = data.draw(st.sampled_from(ids))
            sent[mirror_id] += 1
            unfinished.append((mirror_id, sent[mirror_id]))
        if unfinished and data.draw(st.booleans()):
            one = unfinished.pop(data.draw(st.integers(0, len(unfinished) - 1)))
            says = answer(*one) if data.draw(st.booleans()) else None
            for each in (ledger, other):
                each.done(*one, says)
        if data.draw(st.booleans()):
            for each, known in told.items():
                _hear(known, each.take(), unfinished)
    for each, known in told.items():
        _hear(known, each.take(), unfinished)
    finished = {(mirror_id, number) for mirror_id, last in sent.items() for number in range(1, last + 1)}
    assert told[ledger] == told[other] == finished.difference(unfinished)


def _hear(known: set[tuple[int, int]], message: event_pb2.Acknowledgements, unfinished: list[tuple[int, int]]) -> None:
    """As the daemon hears a message: nothing may be covered that is not finished."""
    said = [(one.mirror_id, one.event_sequence) for one in message.answers]
    said += zip(message.single_mirror_ids, message.single_sequences, strict=True)
    for mirror_id, up_to in zip(message.mirror_ids, message.acknowledged_up_to, strict=True):
        said += [(mirror_id, number) for number in range(1, up_to + 1)]
    assert known.isdisjoint(unfinished)
    assert not set(said).intersection(unfinished)
    known.update(said)


def test_forgotten_mirror_is_still_told_of() -> None:
    """It answers its release and is gone before the message leaves; its place is for another one then."""
    ledger = AcknowledgementLedger()
    slot = ledger.slot(9)
    ledger.done(9, 1)
    ledger.forget(9)
    assert list(ledger.take().acknowledged_up_to) == [1]
    assert ledger.slot(10) == slot
    ledger.done(10, 1)
    message = ledger.take()
    assert (list(message.mirror_ids), list(message.acknowledged_up_to)) == ([10], [1])
