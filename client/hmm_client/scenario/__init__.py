"""Scenarios: processes, drivers that behave or misbehave, what they do in order, and what must come of it.

A scenario is a TOML file:

    title = "A driver that hangs is fenced, and munmap ends"
    rule = "When the deadline passes, the policy of the mirror decides."    # optional

    [daemon]                          # settings of the daemon that is started for it; optional
    acknowledgement_s = 0.5

    [processes.app]                   # each starts with an empty address space

    [files.lib]                       # optional
    size = "64 KiB"

    [drivers.gpu]                     # each a device, with a driver and a stream of its own
    mirrors = ["app"]
    policy = "fence"                  # when an answer is late: fence, block or fail
    on_update = "answer"              # its acts with events that take something back: one, or a list
    on_fault = "answer"               # and with the events that its own faults end in
    interface = "2015"                # or "today": interval notifiers, range faults, migration
    memory = "0 pages"                # of the device's own
    credit = 0                        # events that it may owe an answer to; 0: what the daemon gives
    inside = "nothing"                # in its callbacks, before it answers: fault, fault elsewhere, munmap

    [programs.dummy]                  # drivers that are processes of their own, and take orders; optional
    command = ["python", "-m", "hmm_client.drivers.dummy", "--certified"]

    [[steps]]                         # one after the other
    process = "app"
    call = "mmap"
    length = "16 KiB"
    as = "buffer"                     # `at = "buffer"`, `at = "buffer+2 pages"` mean it from now on

    [[steps]]
    driver = "gpu"
    call = "fault"
    at = "buffer"
    write = true

    [[steps]]
    hold = "edit"                     # the next munmap is held at the point, until it is released
    point = "before the edit"
    operation = "munmap"

    [[steps]]
    process = "app"
    call = "munmap"
    at = "buffer"
    background = "unmap"              # goes on while the next steps are taken
    note = "the device still uses it" # a word for the reader

    [[steps]]
    reached = "edit"                  # until a call is held there

    [[steps]]
    pending = []                      # exactly these drivers owe an answer
    operations = ["munmap"]           # and exactly these calls have not ended

    [[steps]]
    release = "edit"

    [[steps]]
    wait = "unmap"                    # until that step has ended
    expect = { fenced = [], events = { gpu = ["MUNMAP"] }, within_s = 2 }

Numbers of bytes are numbers or texts ("4 pages", "16 KiB", "2 MiB"), addresses are labels or hexadecimal texts.  A
step without `expect` must succeed.

Acts (`hmm_client.harness.misbehaviour` explains them): answer, hold, hang, late, twice, out_of_order, drop_stream,
stop_reading, `refuse ERRNO`, `delay SECONDS`.  A list is used up one event at a time, its last act for good.

Points: before the event, event sent, acknowledged, before the edit, after waiting, before the end.

`give_up = "unmap"` ends the waiting for a step in the background as its caller would, by Ctrl-C; what it has begun may
go on.  A program is asked to `mirror`, `read`, `write` and `unmirror` (`pydoc hmm_client.certify`), and can be made to
`kill`, `stop`, `go_on` and `end`; a call of one that has ended is the error "gone".

`fail = "allocation"` with `nth = 3` makes the third page from now on impossible to allocate, `fail = "dma mapping"` a
mapping of `driver`, `fail = "migrate to ram"` a page on its way back to a CPU that touches it, `fail = "copy"` the copy
of a page to the device of `driver` or back, for the process that `mirrors` names.

`hmm_client.scenario.grammar` lists every call with its arguments, and every expectation: error, signal, data, entries,
retry, fenced, events, counters, within_s.

`format` reads a file and says with its line what is wrong with it; `run` takes the steps, `actions` and, for today's
interface, `today` do what they say; `driver` is how drivers behave, `program` one in a process of its own; `library`
has those that come with hmmd.

**Absent**: loops and variables; whoever needs them writes Python.
"""

from hmm_client.scenario.format import read_scenario
from hmm_client.scenario.model import Scenario, ScenarioError
from hmm_client.scenario.run import StepReport, run_scenario

__all__ = ["Scenario", "ScenarioError", "StepReport", "read_scenario", "run_scenario"]
