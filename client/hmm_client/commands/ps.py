"""`hmmctl ps`: what exists."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hmm_client.commands.connection import Where, ask, where_options
from hmm_client.commands.messages import as_value
from hmm_client.commands.output import JSON, counted, driver_of, format_option, print_json, print_table, printable, size
from hmm_proto.v1 import inspection_pb2

if TYPE_CHECKING:
    from hmm_client.client import Client


@click.command("ps")
@format_option
@where_options
def command(form: str, where: Where) -> None:
    """List processes and devices, with the mirrors between them.

    RESIDENT counts pages that have a frame, CALLS what is under way.  MEMORY is how many pages of its own a device has
    in use, of how many.  A mirror's ANSWERED is the last event up to which it has answered everything, of as many as
    there were.  Why a mirror was lost stands below.
    """
    processes, devices = ask(where, _ask)
    if form == JSON:
        print_json({"processes": [*map(as_value, processes)], "devices": [*map(as_value, devices)]})
        return
    heads = (">pid", "name", ">parent", ">users", ">vmas", ">mapped", ">resident", ">calls", "mirrors")
    rows = [_process(process) for process in processes]
    print_table(heads, rows, spare=("users", "parent", "calls"), empty="no processes")
    click.echo()
    users: dict[int, list[int]] = {}
    for process in processes:
        users.setdefault(process.space_id, []).append(process.process_id)
    heads = (">device", "name", ">memory", ">mirror", "of pid", "state", ">entries", ">answered", "driver")
    rows = [row for device in devices for row in _device(device, users)]
    print_table(heads, rows, spare=("memory", "entries"), empty="no devices")
    for mirror in (mirror for device in devices for mirror in device.mirrors if mirror.lost_because):
        click.echo(f"\nmirror {mirror.mirror_id} is {mirror.state}: {printable(mirror.lost_because)}")
    for process in processes:
        if process.broken:
            click.echo(f"\nprocess {process.process_id} is broken: {process.broken}")


async def _ask(
    client: Client,
) -> tuple[list[inspection_pb2.ProcessStatus], list[inspection_pb2.DeviceStatus]]:
    processes: list[inspection_pb2.ProcessStatus] = []
    request = inspection_pb2.ListProcessesRequest()
    while True:
        part = await client.channel.request(client.inspection.ListProcesses, request)
        processes += part.processes
        if not part.next_page_token:
            break
        request.page_token = part.next_page_token
    devices = await client.channel.request(client.inspection.ListDevices, inspection_pb2.ListDevicesRequest())
    return processes, list(devices.devices)


def _process(process: inspection_pb2.ProcessStatus) -> tuple[object, ...]:
    return (
        str(process.process_id),
        process.name or "-",
        str(process.parent_process_id or "-"),
        process.space_users,
        process.vma_count,
        size(process.mapped_bytes),
        process.resident_pages,
        process.operation_count,
        " ".join(map(str, process.mirror_ids)) or "-",
    )


def _device(device: inspection_pb2.DeviceStatus, users: dict[int, list[int]]) -> list[tuple[object, ...]]:
    name = f"{device.name} (dma)" if device.dma else device.name
    memory = f"{device.memory_used_pages:,} of {device.memory_pages:,}" if device.memory_pages else "-"
    if not device.mirrors:
        return [(str(device.device_id), name, memory, *"------")]
    return [
        (
            str(device.device_id),
            name,
            memory,
            str(mirror.mirror_id),
            " ".join(map(str, users.get(mirror.space_id, []))) or "-",
            mirror.state,
            _entries(mirror),
            f"{mirror.answered_up_to:,} of {mirror.last_event_sequence:,}",
            driver_of(mirror.driver_name, mirror.driver_pid),
        )
        for mirror in device.mirrors
    ]


def _entries(mirror: inspection_pb2.MirrorStatus) -> object:
    # A mirror of today's interface has subscriptions; its driver keeps the table.
    if not mirror.notifier_count:
        return mirror.entry_count
    return counted(mirror.notifier_count, "notifier")
