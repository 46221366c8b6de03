"""Log lines: for people, or for collectors."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path

import pytest

from hmm.errors import NoSuchObjectError
from hmm_client import Driver, Event, connect
from hmm_client.embedded import EmbeddedDaemon
from hmm_server.logs import JsonFormatter


class Hanging(Driver):
    """Never answers."""

    async def update(self, event: Event) -> None:
        """Wait for ever."""
        await asyncio.Event().wait()


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


@pytest.mark.slow
async def test_every_line_of_a_call_names_it_in_fields(tmp_path: Path) -> None:
    """Operation, caller, mirror and device are fields; a token is in no line."""
    settings: dict[str, object] = {"acknowledgement_s": 0.2, "log_level": "debug", "log_format": "json"}
    daemon = EmbeddedDaemon(tmp_path, log=tmp_path / "log", **settings)
    async with (
        connect(daemon.target, "s3cret", name="program") as program,
        connect(daemon.target, "s3cret", name="gpu driver") as driver,
    ):
        process = await program.create_process("victim")
        mapped = await process.mmap(2 * 4096)
        mirror = await (await driver.register_device("gpu0")).mirror(process, Hanging(), fault_events=False)
        await mirror.fault(mapped.span)
        unmapped = await process.munmap(mapped.address, 4096)
        await process.exit()
        with pytest.raises(NoSuchObjectError):
            await process.mmap(4096)
    assert daemon.stop() == 0
    assert unmapped.fenced_mirrors == (mirror.id,)
    text = daemon.read_log()
    lines = [json.loads(line) for line in text.splitlines()]
    about = [line for line in lines if line.get("operation_id") == unmapped.operation_id]
    late, lost, ended = about
    assert (late["operation"], late["caller"], late["mirror"], late["device"]) == ("munmap", "program", 1, "gpu0")
    assert (ended["operation"], ended["caller"], ended["errno"]) == ("munmap", "program", 0)
    assert ended["duration_ms"] >= 199  # the loop's clock counts milliseconds
    assert "is lost" in lost["message"]
    assert (lost["mirror"], lost["device"]) == (1, "gpu0")
    assert all("operation_id" in line for line in lines if line["message"].startswith("operation "))
    refused = next(line for line in lines if "there is no process" in line["message"] and "Mmap" in line["message"])
    assert refused["operation_id"] > unmapped.operation_id
    assert any(line.get("driver") == "gpu driver" and line["pid"] > 0 for line in lines)
    assert "s3cret" not in text
