"""Messages of hmm.v1 as plain values, for `--format json`, and their enumerations in words.

Field names are those of the .proto files; numbers stay numbers, bytes are hexadecimal, what is absent is left out.

**Absent**: protobuf's own JSON, which writes 64-bit numbers as text.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message


def as_value(message: Message) -> dict[str, Any]:
    """A message as a JSON object; fields without presence are there with their defaults."""
    value: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.has_presence and not message.HasField(field.name):
            continue
        value[field.name] = _field(field, getattr(message, field.name))
    return value


def _field(field: Any, content: Any) -> Any:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        return {str(key): content[key] for key in sorted(content)}
    if field.is_repeated:
        return [_single(field, item) for item in content]
    return _single(field, content)


def _single(field: Any, item: Any) -> Any:
    if field.message_type is not None:
        return as_value(item)
    if field.enum_type is not None:
        return word(field.enum_type, item)
    return item.hex() if isinstance(item, bytes) else item


def word(enum: EnumDescriptor, number: int) -> str:
    """A value of an enumeration without its prefix: `EVENT_TYPE_MUNMAP` is MUNMAP; empty for unspecified."""
    known = enum.values_by_number.get(number)
    if known is None:
        return str(number)
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return "" if number == 0 and known.name.endswith("UNSPECIFIED") else known.name.removeprefix(prefix)
