"""The client without await, in a program of its own, as scripts use it: no loop is in sight."""

from __future__ import annotations

import subprocess
import sys
from inspect import signature
from typing import TYPE_CHECKING

import pytest

import hmm_client
from hmm_client import sync

if TYPE_CHECKING:
    from tests.conftest import Daemon

pytestmark = pytest.mark.slow

PRELUDE = """
import errno, sys, threading
import hmm_client.sync
from hmm.errors import HmmError, WouldDeadlockError
from hmm_client import Advice, AddressRange
from hmm_client.sync import Driver

PAGE = 4096
with hmm_client.sync.connect(sys.argv[1], name="script") as client:
    process = client.create_process("script")
    mapped = process.mmap(16 * PAGE)
"""


def run(daemon: Daemon, body: str) -> None:
    """Run a script after PRELUDE; its assertions are the test's."""
    script = PRELUDE + "".join(f"    {line}\n" for line in body.strip().splitlines())
    done = subprocess.run(
        [sys.executable, "-c", script, daemon.target], capture_output=True, text=True, timeout=200, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_processes_and_files_are_used_without_await(shared_daemon: Daemon) -> None:
    """Every call blocks and returns its value, or raises the core's error."""
    run(
        shared_daemon,
        """
process.write(mapped.address, b"hello")
assert process.read(mapped.address, 5) == b"hello"
child = process.fork()
child.write(mapped.address, b"child")
assert process.read(mapped.address, 5) == b"hello"
assert [line.span for line in process.maps().lines] == [mapped.span]
file = client.open_file("of a script", create=True)
file.write(0, b"file")
shared = process.mmap(PAGE, flags=hmm_client.MapFlag.SHARED, file=file)
assert process.read(shared.address, 4) == b"file"
client.unlink_file("of a script")
try:
    process.mmap(0)
except HmmError as error:
    assert error.errno == errno.EINVAL
else:
    raise AssertionError("mmap(0) succeeded")
assert client.process(process.id).id == process.id
outcomes = client.execute([hmm_client.calls.munmap(process.id, mapped.address, PAGE)])
assert outcomes[0].error is None
assert client.make(hmm_client.calls.brk(process.id, 0)).address == 0
assert process.thread().id != process.vfork().id
""",
    )


def test_session_is_served_while_the_caller_blocks(shared_daemon: Daemon) -> None:
    """A fault that ends in an event to the very driver that waits for it; callbacks run on other threads."""
    run(
        shared_daemon,
        """
threads, events = set(), []
class Recorder(Driver):
    def update(self, event):
        threads.add(threading.current_thread())
        events.append((event.type.name, event.mirror.id))
device = client.register_device("of a script")
mirror = device.mirror(process, Recorder())
faulted = mirror.fault(mapped.span, write=True)
assert faulted.writable.all() and not mirror.is_stale(faulted)
mirror.write([(mapped.address, 3)], b"abc")
assert mirror.read([(mapped.address, 3)]) == b"abc"
process.munmap(mapped.address, 8 * PAGE)
assert mirror.is_stale(faulted)
assert events == [("DEVICE_WFAULT", mirror.id), ("MUNMAP", mirror.id)]
assert threading.main_thread() not in threads
mirror.unregister()
device.unregister()
""",
    )


def test_missing_pages_are_brought_in_without_await(shared_daemon: Daemon) -> None:
    """The handler of a userfaultfd runs on a worker thread, and may make calls."""
    run(
        shared_daemon,
        """
threads = set()
def bring(fault):
    threads.add(threading.current_thread())
    uffd.zeropage(mapped.page(1))
    return b"u" * PAGE
with process.userfaultfd() as uffd:
    uffd.register(mapped.span)
    uffd.serve(bring)
    assert process.read(mapped.address, 2 * PAGE)[::PAGE] == bytes([ord("u"), 0])
assert threading.main_thread() not in threads and len(threads) == 1
assert process.read(mapped.page(2).start, 1) == bytes(1)
""",
    )


def test_calls_inside_a_callback_are_known_to_be(shared_daemon: Daemon) -> None:
    """A blocking call in a callback is marked with it: elsewhere it succeeds, on the event's range it is EDEADLK."""
    run(
        shared_daemon,
        """
results = []
class Refaulting(Driver):
    def update(self, event):
        if event.is_fault:
            return
        results.append(event.mirror.fault(AddressRange(mapped.page(15).start, mapped.span.end)).entries.size)
        try:
            event.mirror.fault(event.spans[0])
        except WouldDeadlockError:
            results.append("EDEADLK")
mirror = client.register_device("of a script").mirror(process, Refaulting())
mirror.fault(mapped.page(0))
process.madvise(mapped.address, PAGE, Advice.DONTNEED)
assert results == [1, "EDEADLK"], results
""",
    )


def test_callback_that_is_a_coroutine_has_run_when_its_event_is_answered(shared_daemon: Daemon) -> None:
    """What a driver has to do may be `async def` here too, in both interfaces."""
    run(
        shared_daemon,
        """
class Released(Driver):
    done = False
    async def release(self, mirror):
        self.done = True
driver, ending = Released(), client.create_process("ending")
client.register_device("gpu").mirror(ending, driver)
ending.exit()
assert driver.done
class Gpu(hmm_client.sync.IntervalDriver):
    stopped = 0
    async def invalidate(self, event):
        self.stopped += 1
for two_pass in (False, True):
    gpu = Gpu()
    mirror = client.register_device("gpu").attach(process, gpu)
    mirror.insert(0, 1 << 47, two_pass=two_pass)
    process.munmap(mapped.address, PAGE)
    assert gpu.stopped == 1
    mirror.detach()
    process.mmap(PAGE, address=mapped.address)
""",
    )


def test_driver_is_told_when_its_mirror_is_lost(shared_daemon: Daemon) -> None:
    """Closing with a mirror registered fences it, and `lost` says so."""
    run(
        shared_daemon,
        """
told = []
class Losing(Driver):
    def lost(self, mirror, why):
        told.append(why)
mirror = client.register_device("of a script").mirror(process, Losing())
client.close()
assert told == ["closed"] and mirror.lost == "closed"
try:
    client.aio.channel.grpc
    mirror.fault(mapped.span)
except HmmError as error:
    assert error.errno == errno.ENODEV
else:
    raise AssertionError("a lost mirror faulted")
""",
    )


def test_close_says_that_a_callback_has_not_returned(shared_daemon: Daemon) -> None:
    """It does not wait for ever for what may wait for ever."""
    run(
        shared_daemon,
        """
import logging
from contextlib import suppress
called, gate, lines = threading.Event(), threading.Event(), []

class Hanging(Driver):
    def update(self, event):
        called.set()
        gate.wait()

class Handler(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())

def unmap():
    with suppress(Exception):
        process.munmap(mapped.address, PAGE)

logging.getLogger("hmm_client").addHandler(Handler())
hmm_client.sync.CALLBACK_END_S = 0.01
mirror = client.register_device("hanging").mirror(process, Hanging(), fault_events=False)
mirror.fault(mapped.span)
threading.Thread(target=unmap).start()
called.wait()
client.close()
assert lines[-1] == "a driver's callback has not returned 0.01 s after the end of its client", lines
gate.set()
""",
    )


def test_end_is_quiet_when_a_client_is_still_open_and_its_daemon_has_gone() -> None:
    """A notebook or a script need not close its client: whoever ends is not told what it has lost."""
    script = """
from hmm_client import sync
from hmm_client.embedded import embedded_daemon

with embedded_daemon() as target:
    client = sync.connect(target)
    mirror = client.register_device("gpu").mirror(client.create_process("program"), sync.Driver())
    client.aio.executor.shutdown()  # as the interpreter does at its end
while not mirror.lost:
    pass
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr


def test_blocking_call_is_refused_when_it_would_block_the_loop_itself(shared_daemon: Daemon) -> None:
    """On the loop's own thread it could only wait for itself: RuntimeError at once."""
    run(
        shared_daemon,
        """
async def wrong():
    return process.brk()
try:
    client.loop.run(wrong())
except RuntimeError as error:
    assert "own thread" in str(error)
else:
    raise AssertionError("it did not wait for ever after all")
""",
    )


def test_interrupt_ends_the_waiting_and_not_the_program(shared_daemon: Daemon) -> None:
    """Ctrl-C during a call raises KeyboardInterrupt; the client goes on."""
    run(
        shared_daemon,
        """
import os, signal
started, gate = threading.Event(), threading.Event()
class Slow(Driver):
    def update(self, event):
        started.set()
        gate.wait()
mirror = client.register_device("of a script").mirror(process, Slow())
def interrupt():
    started.wait()
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    process.munmap(mapped.address, PAGE)
except KeyboardInterrupt:
    pass
else:
    raise AssertionError("not interrupted")
gate.set()
assert process.mmap(PAGE).address
""",
    )


def test_names_are_listed_and_documented_when_somebody_looks() -> None:
    """Tab completion and help() show what is loaded only when it is used, and the arguments of what is only wrapped."""
    assert set(hmm_client.__all__) <= set(dir(hmm_client))
    for ours, theirs in (
        (sync.Client.create_process, hmm_client.Client.create_process),
        (sync.Client.register_device, hmm_client.Client.register_device),
        (sync.Device.mirror, hmm_client.Device.mirror),
        (sync.Device.attach, hmm_client.Device.attach),
        (sync.Mirror.fault, hmm_client.Mirror.fault),
    ):
        assert ours.__doc__ == theirs.__doc__
        assert list(signature(ours).parameters) == list(signature(theirs).parameters)


class Gpu(hmm_client.TableDriver):
    """A driver as the README shows it."""

    def update(self, event: hmm_client.Event) -> None:
        """As of its base."""
        super().update(event)


def test_driver_may_have_either_base_when_there_is_no_await(shared_daemon: Daemon) -> None:
    """One driver serves both clients."""
    with sync.connect(shared_daemon.target) as client:
        process = client.create_process("either")
        span = process.mmap(4096).span
        driver = Gpu()
        mirror = client.register_device("of either base").mirror(process, driver)
        mirror.fault(span)
        assert driver.tables[mirror.id].pages.count == 1


def test_call_is_refused_when_the_process_was_forked(shared_daemon: Daemon) -> None:
    """Neither the loop's thread nor gRPC lives on in a child: it is told so instead of waiting for ever."""
    run(
        shared_daemon,
        """
import os
child = os.fork()
if not child:
    try:
        for call in (lambda: process.maps(), lambda: hmm_client.sync.connect(sys.argv[1])):
            try:
                call()
            except RuntimeError as error:
                assert "does not survive fork" in str(error)
            else:
                raise AssertionError("it was not refused")
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert process.maps().lines
""",
    )
