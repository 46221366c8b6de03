"""Replaying kernel traces, and comparing after every operation what the model did with what Linux did.

    with InProcess() as subject:
        report = verify(read_trace("base/s51-vma-merge.jsonl.gz"), subject)
    assert not report.differences

`subject` says what can be verified: the model in this process, or a daemon.  `operations` and `device_operations`
perform what a trace says, `comparison` compares and counts.

**Absent**: reading traces (`hmm_client.recordings.ktrace`); reports for people (`hmm_client.commands.verify`).
"""

from hmm_client.verification.comparison import Aspect, Counts, Difference, Level, TraceReport, verify
from hmm_client.verification.subject import InProcess, Subject

__all__ = ["Aspect", "Counts", "Difference", "InProcess", "Level", "Subject", "TraceReport", "verify"]
