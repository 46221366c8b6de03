"""The client library of hmmd: processes and their memory calls, devices, mirrors and drivers, from Python.

    async with hmm_client.connect() as client:
        process = await client.create_process("demo")
        mapped = await process.mmap(1 << 20)
        device = await client.register_device("gpu0")
        mirror = await device.mirror(process, MyDriver())
        faulted = await mirror.fault(mapped.span, write=True)

`hmm_client.sync` has the same without await, for scripts and notebooks.  `hmm_client.drivers` holds worked examples.

Constants (`Prot`, `MapFlag`, ...) and errors are those of the core, `hmm`: what the daemon raised is raised here, with
its class, errno and address.  A number that no message can carry is an ArgumentError, which is a ValueError.

**Source**: design of the wire in proto/hmm_proto/v1; the names of calls are the kernel's.

**Absent**: every rule of memory; the daemon has them.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

# Without gRPC's event engine a round trip takes half the time; read once, when grpc is imported.
if "grpc" not in sys.modules:
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

TYPE_CHECKING = False  # as type checkers know it: to import typing takes longer than all the rest
if TYPE_CHECKING:
    from hmm.address_space import Thp
    from hmm.file import FileKind
    from hmm.frames import RegionKind
    from hmm.madvise import Advice
    from hmm.mirror import DeadlinePolicy
    from hmm.mlock import MclFlag, MlockFlag
    from hmm.mremap import MremapFlag
    from hmm.msync import MsyncFlag
    from hmm.units import AddressRange
    from hmm.unmapped_area import MapFlag
    from hmm.vma import Prot
    from hmm_client.arguments import ArgumentError
    from hmm_client.channel import DaemonError, UnavailableError, tls_credentials
    from hmm_client.client import Client, connect
    from hmm_client.device import Device
    from hmm_client.device_memory import MemoryDriver
    from hmm_client.driver import Driver, TableDriver
    from hmm_client.event import Event
    from hmm_client.file import File
    from hmm_client.interval_driver import IntervalDriver
    from hmm_client.interval_mirror import IntervalMirror, IntervalNotifier
    from hmm_client.mirror import Faulted, Migrated, Mirror
    from hmm_client.process import Process

_HOME = {
    "AddressRange": "hmm.units",
    "Advice": "hmm.madvise",
    "ArgumentError": "hmm_client.arguments",
    "Client": "hmm_client.client",
    "DaemonError": "hmm_client.channel",
    "DeadlinePolicy": "hmm.mirror",
    "Device": "hmm_client.device",
    "Driver": "hmm_client.driver",
    "Event": "hmm_client.event",
    "Faulted": "hmm_client.mirror",
    "MemoryDriver": "hmm_client.device_memory",
    "Migrated": "hmm_client.mirror",
    "File": "hmm_client.file",
    "FileKind": "hmm.file",
    "IntervalDriver": "hmm_client.interval_driver",
    "IntervalMirror": "hmm_client.interval_mirror",
    "IntervalNotifier": "hmm_client.interval_mirror",
    "MapFlag": "hmm.unmapped_area",
    "MclFlag": "hmm.mlock",
    "Mirror": "hmm_client.mirror",
    "MlockFlag": "hmm.mlock",
    "MremapFlag": "hmm.mremap",
    "MsyncFlag": "hmm.msync",
    "Process": "hmm_client.process",
    "Prot": "hmm.vma",
    "RegionKind": "hmm.frames",
    "TableDriver": "hmm_client.driver",
    "Thp": "hmm.address_space",
    "UnavailableError": "hmm_client.channel",
    "connect": "hmm_client.client",
    "tls_credentials": "hmm_client.channel",
}

__all__ = [
    "AddressRange",
    "Advice",
    "ArgumentError",
    "Client",
    "DaemonError",
    "DeadlinePolicy",
    "Device",
    "Driver",
    "Event",
    "Faulted",
    "File",
    "FileKind",
    "IntervalDriver",
    "IntervalMirror",
    "IntervalNotifier",
    "MapFlag",
    "MclFlag",
    "MemoryDriver",
    "Migrated",
    "Mirror",
    "MlockFlag",
    "MremapFlag",
    "MsyncFlag",
    "Process",
    "Prot",
    "RegionKind",
    "TableDriver",
    "Thp",
    "UnavailableError",
    "connect",
    "tls_credentials",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    # Names are fetched when they are used: `hmmctl --help` shall not wait for gRPC.
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
