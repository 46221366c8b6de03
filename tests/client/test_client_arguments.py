"""Arguments that do not fit into their field: every call of every handle says which of its own it was."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest

import hmm_client
from hmm.units import PAGE_SIZE
from hmm_client import File, IntervalDriver, IntervalMirror, IntervalNotifier, Mirror, Process, TableDriver
from hmm_client.arguments import ArgumentError
from hmm_client.client import Client
from hmm_client.device import Device
from hmm_client.harness import Harness
from hmm_client.userfaultfd import Userfaultfd

HANDLES = (Client, Device, File, Harness, IntervalMirror, IntervalNotifier, Mirror, Process, Userfaultfd)
UNFIT = 1 << 65
"""In no integer of a message."""
NUMBERS = ("int", "int | None", "Address")
JUDGED_HERE = {"read_frames-offset", "read_dma-offset", "write_frames-offset", "write_dma-offset"}
"""Against the pages that are named beside it."""
COUNTED_HERE = {"File.read-offset", "File.read-length", "read_frames-length", "read_dma-length", "read_copy-npages"}
"""How much is wanted in all, which is asked for in parts; behind a file's end there is nothing to ask for."""

Handles = dict[Any, Any]


def cases() -> list[tuple[type, str, str]]:
    """Every number that a public coroutine of a handle takes."""
    return [
        (handle, name, parameter.name)
        for handle in HANDLES
        for name, method in vars(handle).items()
        if inspect.iscoroutinefunction(method) and not name.startswith("_")
        for parameter in inspect.signature(method).parameters.values()
        if parameter.annotation in NUMBERS
        and not f"{handle.__name__}.{name}-{parameter.name}".endswith(tuple(JUDGED_HERE | COUNTED_HERE))
    ]


@pytest.fixture(scope="module")
async def handles(harness_daemon: Any) -> AsyncIterator[Handles]:
    """One of each."""
    async with hmm_client.connect(harness_daemon.target, name="under test") as client:
        process = await client.create_process("under test")
        heap = (await process.mmap(PAGE_SIZE)).span
        device = await client.register_device("gpu", memory_pages=16)
        attached = await device.attach(process, IntervalDriver())
        async with process.userfaultfd() as userfaultfd:
            yield {
                Client: client,
                Device: device,
                File: await client.open_file("under test", create=True),
                Harness: Harness(client),
                IntervalMirror: attached,
                IntervalNotifier: await attached.insert(heap.start, heap.size_bytes),
                Mirror: await (await client.register_device("nic")).mirror(process, TableDriver()),
                Process: process,
                Userfaultfd: userfaultfd,
                "span": heap,
            }


def fitting(handles: Handles, method: Callable[..., Any]) -> dict[str, Any]:
    """Arguments for what a method needs."""
    pages = np.array([handles["span"].start], np.uint64)
    by_annotation = {
        "AddressRange": handles["span"], "Address": 0, "int": 1, "str": "", "bool": False, "bytes": b"x",
        "Entries": pages, "Pfns": pages, "Sequence[Segment]": [(int(pages[0]), 1)], "Device": handles[Device],
        "IntervalMirror": handles[IntervalMirror], "Mirror | IntervalMirror": handles[Mirror],
    }  # fmt: skip
    needed = list(inspect.signature(method).parameters.values())[1:]
    return {one.name: by_annotation[one.annotation] for one in needed if one.default is one.empty}


@pytest.mark.parametrize(
    ("handle", "name", "argument"),
    [pytest.param(*case, id=f"{case[0].__name__}.{case[1]}-{case[2]}") for case in cases()],
)
async def test_call_names_the_argument_when_it_does_not_fit(
    handles: Handles, handle: type, name: str, argument: str
) -> None:
    """A ValueError that says which call and which argument, whatever made the message."""
    arguments = fitting(handles, getattr(handle, name)) | {argument: UNFIT}
    with pytest.raises(ArgumentError, match=rf"^{name}\(.*{argument}={UNFIT}\b.*\): Value out of range: {UNFIT}$"):
        await getattr(handles[handle], name)(**arguments)


async def test_call_names_the_argument_when_it_is_no_integer(handles: Handles) -> None:
    """As half a length is, where somebody has divided."""
    process: Process = handles[Process]
    with pytest.raises(ArgumentError, match=r"^munmap\(address=0, length=2048\.0\): 'float' object cannot be"):
        await process.munmap(0, PAGE_SIZE / 2)  # type: ignore[arg-type]


async def test_error_is_pythons_own_when_an_argument_is_missing(handles: Handles) -> None:
    """What is no call at all is told as ever."""
    process: Process = handles[Process]
    with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'length'") as raised:
        await process.munmap(0)  # type: ignore[call-arg]
    assert not isinstance(raised.value, ArgumentError)
