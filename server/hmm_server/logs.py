"""Log lines: plain text for people, or one JSON object a line for collectors.

Times are UTC.  What concerns one call names its operation, in the text and as a field of its own, so that a line leads
to `GetOperation`; what concerns one mirror names that, its device and its driver.

    {"time": "...", "level": "warning", "logger": "hmm_server.executor", "message": "...",
     "operation_id": 7, "operation": "munmap", "caller": "program", "mirror": 1, "device": "gpu0"}

**Invariants**: no line has a token.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what is imported here delays `hmmd --help`
    from hmm.operation_record import OperationRecord
    from hmm.receiver import Receiver

TEXT_FORMAT = "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s"
TIME_FORMAT = "%Y-%m-%dT%H:%M:%S"


FIELDS = ("operation_id", "operation", "caller", "mirror", "device", "driver", "pid", "errno", "reason", "duration_ms")
"""Fields that a line has when they are known, besides time, level, logger, message and traceback."""


def about(call: OperationRecord[Any] | None = None, mirror: Receiver | None = None) -> dict[str, object]:
    """What a line is about, as `extra` of a log call."""
    fields: dict[str, object] = {}
    if call is not None:
        fields |= {"operation_id": call.id, "operation": call.name, "caller": call.caller.name}
    if mirror is not None:
        fields |= {"mirror": mirror.id, "device": mirror.device.name}
    return fields


class JsonFormatter(logging.Formatter):
    """One object for each record."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON, with its traceback if it has one."""
        fields: dict[str, object] = {
            "time": f"{self.formatTime(record, TIME_FORMAT)}.{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def set_up(level: str, form: str) -> None:
    """Send the log to stderr.

    Args:
        level, form: as `log_level` and `log_format` of the configuration.
    """
    formatter = JsonFormatter() if form == "json" else logging.Formatter(TEXT_FORMAT, TIME_FORMAT)
    formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
