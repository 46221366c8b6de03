"""`hmmctl pagetable`: the directories of a page table as a tree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hmm.units import AddressRange
from hmm_client.commands.addresses import parse_range
from hmm_client.commands.connection import Where, ask, where_options
from hmm_client.commands.ids import MIRROR
from hmm_client.commands.messages import as_value
from hmm_client.commands.output import JSON, counted, format_option, on_devices, print_json
from hmm_proto.convert import range_to_proto
from hmm_proto.v1 import inspection_pb2

if TYPE_CHECKING:
    from hmm_client.client import Client


@click.command("pagetable")
@click.argument("mirror", type=MIRROR)
@click.argument("span", metavar="[RANGE]", callback=parse_range, required=False)
@click.option("--cpu", is_flag=True, help="MIRROR is a process, and its CPU's table is shown.")
@format_option
@where_options
def command(mirror: int, span: AddressRange | None, cpu: bool, form: str, where: Where) -> None:
    """Show the directories of a mirror's page table as a tree.

    RANGE is START-END in hexadecimal, as in maps; without it the whole table is shown.  Of each directory one sees
    its level, the addresses it covers and its entries in use; `+N` are walks that hold it just now.  Behind it stands
    what is in the memory of which device.
    """
    levels, directories = ask(where, lambda client: _ask(client, mirror, span, cpu=cpu))
    if form == JSON:
        for directory in directories:
            print_json(as_value(directory))
        return
    leaves = [directory for directory in directories if directory.level == levels - 1]
    entries = sum(directory.valid_count for directory in leaves)
    what = f"process {mirror}" if cpu else f"mirror {mirror}"
    have = counted(len(directories), "directory", "directories"), counted(entries, "entry", "entries")
    click.echo(f"{what}: {counted(levels, 'level')}, {', '.join(have)}")
    for stem, directory in zip(_stems([directory.level for directory in directories]), directories, strict=True):
        held = directory.reference_count - directory.valid_count
        away = on_devices((one.device_name, one.page_count) for one in directory.on_devices)
        click.echo(
            f"{stem}{directory.level}  {directory.start:012x}-{directory.end:012x}"
            f"  {directory.valid_count}{f' +{held}' if held > 0 else ''}  {away}".rstrip()
        )


async def _ask(
    client: Client, number: int, span: AddressRange | None, *, cpu: bool
) -> tuple[int, list[inspection_pb2.Directory]]:
    request = inspection_pb2.GetPageTableRequest(range=range_to_proto(span) if span else None)
    if cpu:
        request.process_id = number
    else:
        request.mirror_id = number
    levels = 0
    directories: list[inspection_pb2.Directory] = []
    async for part in client.channel.stream(client.inspection.GetPageTable, request):
        levels = part.level_count or levels
        directories += part.directories
    return levels, directories


def _stems(levels: list[int]) -> list[str]:
    """The lines of a tree that is given depth first by its levels, from its last node back to its first."""
    stems: list[str] = []
    open_levels: set[int] = set()  # where a line goes on downwards
    for level in reversed(levels):
        above = "".join("│  " if upper in open_levels else "   " for upper in range(1, level))
        stems.append("" if level == 0 else above + ("├─ " if level in open_levels else "└─ "))
        open_levels = {upper for upper in open_levels if upper < level} | {level}
    return stems[::-1]
