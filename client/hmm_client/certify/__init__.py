"""Certifying a driver: somebody's driver, in any language, against a daemon that makes everything happen to it.

What is asked of the driver is small.  It is a command, started with

    HMMD_SOCKET   where the daemon listens: a path

It registers a device of its own, prints `{"ready": {}}` on standard output, and then does what the lines of its
standard input say, one JSON object a line, until that ends; then it leaves.  Answers have the `id` of their request,
in any order; bytes travel as base64.  Requests come while others are under way.

    > {"id": 1, "op": "mirror", "process": 1}
    < {"id": 1, "result": {}}
    > {"id": 2, "op": "read", "process": 1, "address": 140737488281600, "length": 4}
    < {"id": 2, "result": {"data": "AAAAAA=="}}
    > {"id": 3, "op": "write", "process": 1, "address": 140737488281600, "data": "AAAAAA=="}
    < {"id": 3, "error": {"errno": "EACCES", "message": "the mapping is not writable"}}
    > {"id": 4, "op": "unmirror", "process": 1}
    < {"id": 4, "result": {}}

    mirror    mirror the process from now on
    read      let the device read memory of the process: fault in what is missing, then access it
    write     the same, for writing
    unmirror  the process is gone, or the device has no more business with it: unregister the mirror

A driver may offer one more order.  It says which it takes when it is ready; whoever says nothing takes the four above.

    < {"ready": {"orders": ["mirror", "read", "write", "unmirror", "migrate"]}}
    > {"id": 5, "op": "migrate", "process": 1, "start": 140737488281600, "end": 140737488314368}
    < {"id": 5, "result": {}}

    migrate   move the pages of the range to the device's memory, step by step: MigrateVmaSetup, MigrateVmaAllocate,
              MigrateVmaCopy, MigrateVmaPages, MigrateVmaFinalize.  Pages that cannot be moved stay where they are; the
              answer comes when the migration is finalized

An access that the process's mappings do not permit is an error, any errno.  A driver that keeps translations keeps
them from one access to the next; that is what is put to the test.  Either interface will do, the mirror of 2015 or
interval notifiers, and memory of the device's own: pages may be moved there before they are used, or not.
What else it prints on standard output is ignored, and so are lines of over 16 MiB.

`adversities` is what happens to it, `neighbours` what others than its process do, `migrations` what happens between the
steps of its migrations, if it takes that order, `storm` the first two at random and from a seed, `findings` what counts
as wrong.  In Python `hmm_client.drivers.control` serves these lines.

A trial that has not ended after a limit (`--limit`, 120 s) is broken off, whoever is to blame: its finding says which
calls are pending and who blocks whom, and the next trial has a new daemon and a new driver.

**Absent**: measuring how fast a driver is.
"""

from hmm_client.certify.certificate import Certificate, Trial, certify
from hmm_client.certify.findings import RULES, Finding

__all__ = ["RULES", "Certificate", "Finding", "Trial", "certify"]
