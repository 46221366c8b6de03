"""`hmmctl kill`: ends processes that nobody ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hmm_client.commands.connection import Where, ask, where_options
from hmm_client.commands.ids import PROCESS
from hmm_client.commands.output import JSON, format_option, print_json

if TYPE_CHECKING:
    from hmm_client.client import Client


@click.command("kill")
@click.argument("pids", metavar="PID...", type=PROCESS, nargs=-1, required=True)
@format_option
@where_options
def command(pids: tuple[int, ...], form: str, where: Where) -> None:
    """End processes, as if they had exited.

    A process lives on when the client that made it has gone.  Its mirrors are told of the end and must answer; then its
    memory is freed.  The first process that cannot be ended, because there is none or it belongs to another token, ends
    the command; those before it have ended.
    """
    for pid in pids:
        fenced = ask(where, lambda client, pid=pid: _end(client, pid))  # type: ignore[misc]
        if form == JSON:
            print_json({"process_id": pid, "fenced_mirrors": fenced})
        elif fenced:
            click.echo(f"process {pid} has ended; fenced: {', '.join(f'mirror {mirror}' for mirror in fenced)}")
        else:
            click.echo(f"process {pid} has ended")


async def _end(client: Client, pid: int) -> list[int]:
    return list((await client.process(pid).exit()).fenced_mirrors)
