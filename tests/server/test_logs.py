"""Log lines: for people, or for collectors."""

from __future__ import annotations

import json
import logging
import sys

from hmm_server.logs import JsonFormatter


def _record(**fields: object) -> logging.LogRecord:
    record = logging.LogRecord("hmm_server.executor", logging.WARNING, __file__, 1, "operation %d waits", (7,), None)
    record.__dict__.update(fields)
    return record


def test_json_line_has_message_level_and_operation() -> None:
    """One object a line, with the operation as a number of its own when the line concerns one."""
    line = json.loads(JsonFormatter().format(_record(operation_id=7)))
    assert (line["message"], line["level"], line["logger"]) == ("operation 7 waits", "warning", "hmm_server.executor")
    assert line["operation_id"] == 7
    assert line["time"].endswith("Z")
    assert "operation_id" not in json.loads(JsonFormatter().format(_record()))


def test_json_line_holds_the_traceback_of_a_bug() -> None:
    """A traceback is a field and does not break the line."""
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        text = JsonFormatter().format(_record(exc_info=sys.exc_info()))
    assert "\n" not in text
    assert "ZeroDivisionError" in json.loads(text)["traceback"]
