"""Who calls: the owner's token, a name and the callback that a call was made from, read from a call's metadata.

    hmm-token: TOKEN  or  authorization: Bearer TOKEN
    hmm-caller: NAME
    hmm-in-callback: MIRROR:SEQUENCE

**Absent**: what belongs to whom (`hmm.registry` decides at every look-up).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from hmm.errors import InvalidRequestError
from hmm.operation_record import Caller
from hmm_proto.convert import malformed, number_from_text
from hmm_server.config import ConfigError

NAME_LENGTH_MAX = 64
"""Characters of a name that a client gives to itself or to an object."""
_BEARER = "bearer "


class UnknownTokenError(Exception):
    """The daemon accepts certain tokens only, and this is none of them."""


def caller_from(metadata: Iterable[tuple[str, str | bytes]] | None) -> Caller:
    """The caller that a call's metadata names.

    Raises:
        InvalidRequestError: `hmm-in-callback` is not MIRROR:SEQUENCE (EINVAL).
    """
    token, name, callback = "", "", None
    for key, value in metadata or ():
        text = value.decode(errors="replace") if isinstance(value, bytes) else value
        if key == "hmm-token":
            token = text
        elif key == "authorization" and text[: len(_BEARER)].lower() == _BEARER:
            token = token or text[len(_BEARER) :]
        elif key == "hmm-caller":
            name = text[:NAME_LENGTH_MAX]
        elif key == "hmm-in-callback":
            callback = _callback(text)
    return Caller(token, name, callback)


def _callback(text: str) -> tuple[int, int]:
    mirror_id, _, sequence = text.partition(":")
    try:
        return number_from_text(mirror_id), number_from_text(sequence)
    except InvalidRequestError:
        raise malformed(f"hmm-in-callback is {text[:NAME_LENGTH_MAX]!r}; it must be MIRROR:SEQUENCE") from None


class Tokens:
    """The tokens that are accepted; without a file: all, and none."""

    def __init__(self, path: str = "") -> None:
        """Read the tokens.

        Raises:
            ConfigError: the file cannot be read, or is no text.
        """
        try:
            accepted = Path(path).read_text().split() if path else None
        except OSError as error:
            raise ConfigError(f"token_file: {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"token_file: {path}: {error}") from error
        self._accepted = None if accepted is None else frozenset(map(_digest, accepted))

    def require(self, caller: Caller) -> None:
        """Raises: UnknownTokenError when tokens are demanded and this is none of them."""
        if self._accepted is not None and _digest(caller.token) not in self._accepted:
            raise UnknownTokenError


def _digest(token: str) -> bytes:
    # Digests are compared, so that the time that it takes says nothing of the tokens.
    return hashlib.sha256(token.encode()).digest()
