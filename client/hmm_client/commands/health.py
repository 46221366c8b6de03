"""`hmmctl health`: does the daemon serve?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hmm_client.commands.connection import OK, UNEXPECTED, Where, ask, where_options
from hmm_client.commands.output import JSON, format_option, print_json

if TYPE_CHECKING:
    from hmm_client.client import Client


@click.command("health")
@format_option
@where_options
def command(form: str, where: Where) -> None:
    """Ask the daemon whether it serves.

    Exit codes: 0 it does; 1 it does not: it is ending, or cannot be reached.
    """
    try:
        status = ask(where, _ask)
    except SystemExit as end:  # for a container there is only healthy and not
        raise SystemExit(UNEXPECTED if end.code else OK) from None
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(status).lower()
    print_json({"status": name}) if form == JSON else click.echo(name)
    raise SystemExit(OK if status == health_pb2.HealthCheckResponse.SERVING else UNEXPECTED)


async def _ask(client: Client) -> int:
    stub: Any = health_pb2_grpc.HealthStub(client.channel.grpc)
    return int((await client.channel.request(stub.Check, health_pb2.HealthCheckRequest())).status)
