"""`hmmctl maps`: the mappings of a process."""

from __future__ import annotations

import dataclasses

import click

from hmm_client.commands.connection import Where, ask, where_options
from hmm_client.commands.ids import PROCESS
from hmm_client.commands.output import JSON, format_option, on_devices, print_json
from hmm_client.recordings import Area, render
from hmm_client.results import Maps, MapsLine


@click.command("maps")
@click.argument("pid", type=PROCESS)
@format_option
@where_options
def command(pid: int, form: str, where: Where) -> None:
    """Show the mappings of a process, in the format of /proc/PID/maps.

    The number before the name is the daemon's id of the file.  Behind it stands which pages are in the memory of which
    device, such as `(gpu0: 16 pages)`.
    """
    maps = ask(where, lambda client: client.process(pid).maps())
    if form == JSON:
        for line in maps.lines:
            print_json(dataclasses.asdict(line))
        return
    areas = [
        Area(line.start, line.end, line.permissions, line.offset, _name(line, maps), inode=line.file_id)
        for line in maps.lines
    ]
    click.echo(render(areas), nl=False)


def _name(line: MapsLine, maps: Maps) -> str:
    """What the kernel's file shows in the last column."""
    heap = line.start <= maps.brk_end and line.end >= maps.brk_start > 0 and maps.brk_start < maps.brk_end
    name = line.file_name or ("[heap]" if heap else "")
    return " ".join(filter(None, (name, on_devices(line.on_devices))))
