"""A test harness: drivers that misbehave on purpose, and calls that are held so that a race happens every time.

`Misbehaviour` stands between a mirror and its driver.  `Harness` asks a daemon that was started with `harness` to hold
calls, to make allocations, mappings and migrations fail, or to merge equal pages.  `Rig` and `SyncRig` make processes,
devices and mirrors that end with a test, `DriverProcess` runs a driver as a process of its own.
`hmm_client.pytest_plugin` has them as fixtures of pytest.

**Absent**: what a driver must do; proto/README.md has the protocol as a sequence.
"""

from hmm_client.harness.driver_process import DriverProcess
from hmm_client.harness.holds import Harness, Hold, HoldEndedError, HoldPoint
from hmm_client.harness.misbehaviour import (
    FAULTS,
    TAKING_BACK,
    Act,
    Kind,
    Misbehaviour,
    answer,
    delay,
    drop_stream,
    hang,
    hold,
    kill_process,
    late,
    nth,
    out_of_order,
    refuse,
    stop_process,
    stop_reading,
    twice,
)
from hmm_client.harness.rig import Rig
from hmm_client.harness.sync_rig import SyncRig

__all__ = [
    "FAULTS",
    "TAKING_BACK",
    "Act",
    "DriverProcess",
    "Harness",
    "Hold",
    "HoldEndedError",
    "HoldPoint",
    "Kind",
    "Misbehaviour",
    "Rig",
    "SyncRig",
    "answer",
    "delay",
    "drop_stream",
    "hang",
    "hold",
    "kill_process",
    "late",
    "nth",
    "out_of_order",
    "refuse",
    "stop_process",
    "stop_reading",
    "twice",
]
