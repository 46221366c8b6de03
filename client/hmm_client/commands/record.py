"""`hmmctl record`: make a recording of any program, for replay."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click

from hmm_client.commands.connection import UNUSABLE, fail
from hmm_client.commands.output import counted
from hmm_client.recordings import RecordingError, canonical
from hmm_client.recordings import record as make_recording


@click.command("record", context_settings={"ignore_unknown_options": True})
@click.option(
    "--output",
    "-o",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Where to; must be new or empty.  [default: the command's name]",
)
@click.argument("arguments", metavar="-- COMMAND [ARGUMENT]...", nargs=-1, required=True, type=click.UNPROCESSED)
def command(output: Path | None, arguments: tuple[str, ...]) -> None:
    """Run a command under strace and record its memory calls, for `hmmctl replay`.

    \b
    hmmctl record -o recordings/sqlite -- sqlite3 :memory: 'select 1'
    hmmctl replay recordings/sqlite

    The command keeps its standard input and outputs.  Exit code: the command's own, or 2 if it cannot be recorded.
    """
    if arguments[0].startswith("-"):  # a misspelt option: no command is called so
        raise click.NoSuchOption(arguments[0], ctx=click.get_current_context())
    signal.signal(signal.SIGTERM, _terminate)
    folder = output or Path(Path(arguments[0]).name)
    try:
        recorded = make_recording(arguments, folder)
    except RecordingError as error:
        fail(UNUSABLE, str(error))
    recording = recorded.recording
    calls = counted(len(recording.log.calls), "call")
    processes = counted(len(recording.plan.processes), "process", "processes")
    mappings = counted(len(canonical(recording.final)), "mapping")
    click.echo(f"{folder}: {calls} of {processes}, {mappings} at the end", err=True)
    if recording.plan.incomparable:
        click.echo(f"hmmctl: it cannot be replayed: {recording.plan.incomparable}", err=True)
    raise SystemExit(recorded.status)


def _terminate(number: int, _frame: FrameType | None) -> NoReturn:
    """The command ends with the recording, and nothing of that is left behind."""
    raise SystemExit(128 + number)
