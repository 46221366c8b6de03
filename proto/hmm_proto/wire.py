"""Putting a message together from parts that are serialised already.

A message inside another one is a tag, a length and its bytes.  So what was serialised once, or is an array in memory,
gets into the message that leaves by one copy; protobuf itself would copy it at every level.

**Source**: the encoding of protobuf: length-delimited fields; fields stand in any order, and messages that follow one
another are one message, with what is repeated in both.

**Invariants**: protobuf reads what is written here as if it had written it.

**Absent**: what the messages mean; reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from google.protobuf.message import Message

from hmm.units import Entries
from hmm_proto import convert

_LENGTH_DELIMITED = 2
_LAST = tuple(bytes((bits,)) for bits in range(128))
_MORE = tuple(bytes((bits | 128,)) for bits in range(128))


def varint(number: int) -> bytes:
    """A number that is not negative, seven bits to a byte."""
    if number < 1 << 7:
        return _LAST[number]
    if number < 1 << 14:
        return _MORE[number & 127] + _LAST[number >> 7]
    return _MORE[number & 127] + varint(number >> 7)


@cache
def tag(message: type[Message], field: str) -> bytes:
    """What a field begins with that holds bytes or a message."""
    return varint(message.DESCRIPTOR.fields_by_name[field].number << 3 | _LENGTH_DELIMITED)


@cache
def number_tag(message: type[Message], field: str) -> bytes:
    """What a field begins with that holds a number or a truth value."""
    return varint(message.DESCRIPTOR.fields_by_name[field].number << 3)


def message(begin: bytes, *parts: bytes) -> bytes:
    """A field that holds a message.

    Args:
        begin: the tag of the field.
        parts: serialised; each is some fields of the message, and all together are all of it.

    Cost: one copy.
    """
    return b"".join((begin, varint(sum(map(len, parts))), *parts))


def nested(outer: bytes, head: bytes, field: bytes, message: Message, arrays: Mapping[str, Entries]) -> bytes:
    """A field that holds a message whose last field holds another message.

    Args:
        outer: the tag of the field.
        head: the other fields of its message, serialised.
        field: the tag of the last one.
        message: what that one holds, without what is in `arrays`.
        arrays: fields of `message` and the words that belong there, at least one each.

    Cost: one copy of the arrays.
    """
    body = message.SerializeToString()
    if arrays:
        return _nested_with_arrays(outer, head, field, message, body, arrays)
    size = len(body)
    head += field + (_LAST[size] if size < 128 else varint(size))  # most are short: a call takes as long as the rest
    size += len(head)
    return b"".join((outer, _LAST[size] if size < 128 else varint(size), head, body))


def _nested_with_arrays(
    outer: bytes, head: bytes, field: bytes, message: Message, body: bytes, arrays: Mapping[str, Entries]
) -> bytes:
    size = len(body)
    parts: list[bytes | memoryview] = [body]
    for name, array in arrays.items():
        words = convert.entries_as_bytes(array)
        begin = tag(type(message), name) + varint(len(words))  # type: ignore[arg-type]
        size += len(begin) + len(words)
        parts += (begin, words)
    head += field + varint(size)
    return b"".join((outer, varint(len(head) + size), head, *parts))


__all__ = ["message", "nested", "number_tag", "tag", "varint"]
