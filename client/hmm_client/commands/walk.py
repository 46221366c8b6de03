"""`hmmctl walk`: one address through every page table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hmm_client.commands.addresses import parse_address
from hmm_client.commands.connection import Where, ask, where_options
from hmm_client.commands.ids import PROCESS
from hmm_client.commands.messages import as_value
from hmm_client.commands.output import JSON, format_option, print_json, printable
from hmm_proto.v1 import inspection_pb2

if TYPE_CHECKING:
    from hmm_client.client import Client


@click.command("walk")
@click.argument("pid", type=PROCESS)
@click.argument("address", callback=parse_address)
@format_option
@where_options
def command(pid: int, address: int, form: str, where: Where) -> None:
    """Show what every page table holds for one address, level by level: the CPU's, and that of each mirror.

    ADDRESS is hexadecimal, as in maps.  A page in the memory of a device is named by the device and its place there.
    """
    answer = ask(where, lambda client: _ask(client, pid, address))
    if form == JSON:
        print_json(as_value(answer))
        return
    if answer.HasField("mapping"):
        mapping = answer.mapping
        name = printable(mapping.file_name) or "anonymous memory"
        click.echo(f"{address:#x} is in {mapping.start:x}-{mapping.end:x} {mapping.permissions} {name}")
    else:
        click.echo(f"{address:#x} is not mapped")
    for walk in answer.walks:
        click.echo()
        _print(walk)


async def _ask(client: Client, pid: int, address: int) -> inspection_pb2.WalkAddressResponse:
    request = inspection_pb2.WalkAddressRequest(process_id=pid, address=address)
    answer: inspection_pb2.WalkAddressResponse = await client.channel.request(client.inspection.WalkAddress, request)
    return answer


def _print(walk: inspection_pb2.TableWalk) -> None:
    click.echo(f"mirror {walk.mirror_id}" if walk.mirror_id else "CPU")
    for step in walk.steps:
        click.echo(f"  level {step.level}  index {step.index:3}  {_in_words(step, walk)}")


def _in_words(step: inspection_pb2.TableStep, walk: inspection_pb2.TableWalk) -> str:
    if not step.present:
        return "nothing"
    if not step.entry:
        return "directory"
    frame = f"frame {walk.pfn}  " if walk.HasField("pfn") else ""
    if walk.device_name:
        frame = f"{walk.device_name} at {walk.device_address:#x}, {frame}"
    return f"entry {step.entry:#018x}  {frame}{walk.flags}".rstrip()
