"""What was checked, and in which state: whoever checks after every step need not check again what has not changed.

A check is a function of what it looks at.  Where that is byte for byte what it was when the same check passed, it would
pass again.

**Source**: our own.

**Invariants**: a part is left out only when it, and everything that its check compares it with, is as it was.

**Absent**: what a check asserts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class HasImage(Protocol):
    """Something large whose state can be copied."""

    def image(self) -> object:
        """All of its state, as a value that is equal to another exactly when the states are."""


@dataclass(slots=True)
class _Seen:
    image: object
    number: int
    round: int


class Checked:
    """The states that parts of one machine were in when they were checked."""

    def __init__(self) -> None:
        self._round = 0
        self._images: dict[HasImage, _Seen] = {}
        self._states: dict[object, object] = {}
        self._looks: dict[HasImage, tuple[int, Any]] = {}

    def begin(self) -> None:
        """Begin a round of checks, during which nothing changes."""
        self._round += 1

    def number(self, part: HasImage) -> int:
        """A number for the state that a part is in, another one after every change.  Cost: a copy per round."""
        seen = self._images.get(part)
        if seen is None:
            seen = self._images[part] = _Seen(part.image(), 1, self._round)
        elif seen.round != self._round:
            seen.round = self._round
            image = part.image()
            if image != seen.image:
                seen.image = image
                seen.number += 1
        return seen.number

    def look(self, part: HasImage, looking: Callable[[], T]) -> T:
        """What `looking()` finds in `part`, always the same function of it; looked for once in every state."""
        number = self.number(part)
        seen = self._looks.get(part)
        if seen is None or seen[0] != number:
            seen = self._looks[part] = (number, looking())
        found: T = seen[1]
        return found

    def is_new(self, part: object, *state: object) -> bool:
        """Whether `part` has to be checked: `state`, all that its check looks at, is not as it was the last time."""
        if self._states.get(part) == state:
            return False
        self._states[part] = state
        return True
