"""Recordings of real programs, and traces of the kernel: reading them, making them, planning their replay.

    recording = Recording.load("recordings/sqlite")
    recording.mmap_base, recording.brk_start  # where the new process places memory, and its break
    recording.file_sizes()                    # the files that are mapped, and how large they must be
    for area in recording.initial:            # map these into the process, at these addresses
        ...
    for step in recording.plan.steps:         # then do these, in this order
        match step:
            case Map(): ...                   # at step.recorded; step.process says in which process
            case Fork(): ...                  # step.child is the number of the new one
            case Failed(attempt=None): ...    # nothing to do
    differences = compare(recording.final, areas_of_process_0)

`Recording.load` reads a folder with `strace.log`, `maps.initial` and `maps.final`; `record` makes one with strace;
`demo_folder` is one that ships with the package.  `recording.plan` is a list of steps (`steps`) of numbered
processes, in the order in which the calls took effect, with process 0 the one whose layouts were recorded.  Whoever
replays must know these rules:

- `Map.recorded`, `Remap.recorded` and `Brk.recorded` are what the kernel answered.  Placement is not part of the
  layout: map at the recorded address.
- `GrowStack` is the only step without a call; a write at its `start` does it.
- The steps of a process stand between the step that makes it and its Exit.  Those of a vforked child act on its
  parent's space until its own Exec or Exit.
- A step with `partial` belongs to a process whose layout is not known in full (its exec mapped things that were not
  recorded): its calls may fail, and nothing of it is compared.  When that befalls process 0, `plan.incomparable` says
  why.
- `Failed.attempt` is to be replayed and must fail in the same way; without one there is nothing to replay.
- `Interrupted` has effects that depend on the layout it meets; see there.
- `Unknown` must be reported.

The modules below know no transport: `strace` and `arguments` read the log, `order` and `plan` (with `decode` and
`segments`) turn it into `steps`, `maps` reads and compares layouts, `ktrace` reads kernel traces.
"""

from hmm_client.recordings.demonstration import demo_folder
from hmm_client.recordings.errors import InputError, RecordingError, TraceError
from hmm_client.recordings.maps import Area, Difference, canonical, compare, parse_maps, read_maps, render
from hmm_client.recordings.plan import FIRST, Plan, ProcessInfo, make_plan
from hmm_client.recordings.record import Recorded, record
from hmm_client.recordings.recording import Recording
from hmm_client.recordings.steps import (
    Advise,
    Appear,
    Brk,
    Detach,
    Exec,
    Exit,
    Failed,
    Fork,
    GrowStack,
    Ignored,
    Interrupted,
    Lock,
    LockAll,
    Map,
    Origin,
    ProcessIndex,
    Protect,
    Remap,
    RemapFile,
    Step,
    Sync,
    Thread,
    ThreadExit,
    Unknown,
    Unlock,
    UnlockAll,
    Unmap,
    Vfork,
)
from hmm_client.recordings.strace import Call, Log, parse_log, read_log

__all__ = [
    "FIRST",
    "Advise",
    "Appear",
    "Area",
    "Brk",
    "Call",
    "Detach",
    "Difference",
    "Exec",
    "Exit",
    "Failed",
    "Fork",
    "GrowStack",
    "Ignored",
    "InputError",
    "Interrupted",
    "Lock",
    "LockAll",
    "Log",
    "Map",
    "Origin",
    "Plan",
    "ProcessIndex",
    "ProcessInfo",
    "Protect",
    "Recorded",
    "Recording",
    "RecordingError",
    "Remap",
    "RemapFile",
    "Step",
    "Sync",
    "Thread",
    "ThreadExit",
    "TraceError",
    "Unknown",
    "Unlock",
    "UnlockAll",
    "Unmap",
    "Vfork",
    "canonical",
    "compare",
    "demo_folder",
    "make_plan",
    "parse_log",
    "parse_maps",
    "read_log",
    "read_maps",
    "record",
    "render",
]
