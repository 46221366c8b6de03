"""Scenarios: processes, drivers that behave or misbehave, what they do in order, and what must come of it.

A scenario is a TOML file:

    title = "A driver that hangs is fenced, and munmap ends"

    [daemon]                          # settings of the daemon that is started for it; optional
    acknowledgement_s = 0.5

    [processes.app]                   # each starts with an empty address space

    [files.lib]                       # optional
    size = "64 KiB"

    [drivers.gpu]                     # each a device, with a driver and a session of its own
    mirrors = ["app"]
    policy = "fence"                  # when an answer is late: fence, block or fail
    on_update = "answer"              # or hang, refuse; a list is used up one event at a time, its last for good
    delay_s = 0.1                     # before each answer

    [[steps]]                         # one after the other
    process = "app"
    call = "mmap"
    length = "16 KiB"
    as = "buffer"                     # `at = "buffer"`, `at = "buffer+0x1000"` mean it from now on

    [[steps]]
    driver = "gpu"
    call = "fault"
    at = "buffer"
    write = true

    [[steps]]
    process = "app"
    call = "munmap"
    at = "buffer"
    background = "unmap"              # goes on while the next steps are taken

    [[steps]]
    pending = ["gpu"]                 # exactly these drivers owe an answer

    [[steps]]
    wait = "unmap"                    # until that step has ended
    expect = { fenced = ["gpu"], events = { gpu = ["MUNMAP"] }, within_s = 2 }

Numbers of bytes are numbers or texts ("4 pages", "16 KiB", "2 MiB"), addresses are labels or hexadecimal texts.  A
step without `expect` must succeed.  `format` lists every call with its arguments and every expectation.

`format` reads a file and says with its line what is wrong with it; `run` takes the steps; `driver` is how drivers
behave.

**Absent**: loops and variables; whoever needs them writes Python.
"""

from hmm_client.scenario.format import Scenario, ScenarioError, read_scenario
from hmm_client.scenario.run import StepReport, run_scenario

__all__ = ["Scenario", "ScenarioError", "StepReport", "read_scenario", "run_scenario"]
