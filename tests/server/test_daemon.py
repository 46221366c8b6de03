"""The daemon as a process: it says when it serves, explains itself, and ends in good order."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from importlib import metadata
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from hmm_proto.v1 import device_pb2, event_pb2, inspection_pb2, process_pb2, process_pb2_grpc, types_pb2
from hmm_server import VERSION

PAGE = 4096
BASE = 0x10000000000
END = BASE + 4 * PAGE
HMMD = (sys.executable, "-m", "hmm_server")


@contextlib.asynccontextmanager
async def hmmd(*flags: str, **options: Any) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A daemon in a process of its own, and its first line."""
    daemon = await asyncio.create_subprocess_exec(
        *HMMD, "--frames", "16384", *flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )
    assert daemon.stdout is not None
    try:
        yield daemon, (await daemon.stdout.readline()).decode()
    finally:
        if daemon.returncode is None:
            daemon.kill()
        await daemon.communicate()


def _exists(path: Path) -> bool:
    return path.exists()


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short path for a socket."""
    return tmp_path_factory.mktemp("p") / "s"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_ends_the_daemon_with_exit_code_zero(place: Path, number: signal.Signals) -> None:
    """The daemon tells when it serves; SIGTERM and SIGINT end it in good order, and the socket is gone."""
    async with hmmd("--socket", str(place)) as (daemon, line):
        assert line == f"hmmd serving unix:{place}\n"
        daemon.send_signal(number)
        assert await daemon.wait() == 0
    assert not _exists(place)


@pytest.mark.slow
async def test_daemon_ends_in_good_order_when_it_began_without_standard_input(place: Path) -> None:
    """Where a descriptor below 3 is free no socket gets it: libuv aborts when it has to close one."""
    daemon = await asyncio.create_subprocess_exec(
        *("sh", "-c", 'exec "$0" "$@" <&-', *HMMD, "--frames", "16384", "--socket", str(place)), stdout=subprocess.PIPE
    )
    assert daemon.stdout is not None
    assert b"serving" in await daemon.stdout.readline()
    daemon.terminate()
    assert await daemon.wait() == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_a_daemon_that_does_not_serve_yet(tmp_path: Path, number: signal.Signals) -> None:
    """As first process of a container it would not hear them before it asks for them: it asks first."""
    settings = tmp_path / "settings"
    os.mkfifo(settings)
    with subprocess.Popen([*HMMD, f"--config={settings}"]) as daemon, settings.open("w"):  # opened when it reads
        daemon.send_signal(number)
        assert daemon.wait(timeout=60) == 0


@pytest.mark.slow
async def test_ready_fd_gets_the_line_too(place: Path) -> None:
    """Harnesses read the ready line on a descriptor of their own, and its end."""
    read_end, write_end = os.pipe()
    async with hmmd("--socket", str(place), "--ready-fd", str(write_end), pass_fds=(write_end,)) as (_, line):
        os.close(write_end)
        with os.fdopen(read_end) as ready:
            assert ready.read() == line


@pytest.mark.slow
async def test_second_daemon_exits_with_one(place: Path) -> None:
    """A socket that is served is refused with exit code 1 and a sentence."""
    async with hmmd("--socket", str(place)), hmmd("--socket", str(place)) as (second, line):
        _, errors = await second.communicate()
        assert (line, second.returncode) == ("", 1)
        assert b"another hmmd serves it" in errors


@pytest.mark.slow
async def test_killed_daemon_leaves_nothing_in_the_way(place: Path) -> None:
    """After SIGKILL the socket is stale; the next daemon replaces it."""
    async with hmmd("--socket", str(place)) as (killed, _):
        killed.kill()
        await killed.wait()
        assert _exists(place)
        async with hmmd("--socket", str(place)) as (_, line):
            assert "serving" in line


@pytest.mark.slow
async def test_log_is_json_when_told_to_be(place: Path) -> None:
    """With log_format json every line on stderr is one object."""
    async with hmmd("--socket", str(place), "--log-format", "json") as (daemon, _):
        daemon.terminate()
        _, errors = await daemon.communicate()
    lines = [json.loads(line) for line in errors.decode().splitlines()]
    assert {"time", "level", "logger", "message"} <= set(lines[0])
    assert lines[-1]["message"] == "stopped"


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--credit", "0"), 2, "credit is 0"),
        (("--tcp", "127.0.0.1:0"), 2, "tcp needs"),
        (("--config", "/none.toml"), 2, "No such file"),
        (("--cpu", "9999"), 2, "cpu is 9999; it must be one of "),
        (("--hugetlb-pages", "9999999"), 2, "9999999 huge pages are more than the machine has"),
        (("--until-fd", "99"), 2, "until-fd is 99; it must be the reading end"),
        (("--until-fd", "0"), 2, "until-fd is 0; it must be the reading end"),
        (("--ready-fd", "0"), 2, "ready-fd is 0; it must be one that can be written to"),
        (("--socket", "/proc/none/s"), 1, "/proc/none"),
        (("--frames", str(1 << 44)), 2, "there is no address space for 17592186044416 frames"),
    ],
    ids=["value", "combination", "file", "cpu", "hugetlb", "closed", "regular-file", "read-only", "place", "frames"],
)
@pytest.mark.slow
def test_hmmd_exits_with_a_sentence_when_it_cannot_start(flags: tuple[str, ...], code: int, message: str) -> None:
    """Errors of the configuration are exit code 2, of the place 1; no traceback."""
    with Path(__file__).open() as descriptor_0:
        run = subprocess.run([*HMMD, *flags], stdin=descriptor_0, capture_output=True, text=True, check=False)
    assert run.returncode == code
    assert message in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "hinted"), [((), True), (("--socket", "/proc/none/s"), False)])
def test_hmmd_says_where_else_when_its_usual_place_cannot_be_used(flags: tuple[str, ...], hinted: bool) -> None:
    """As for a user without a runtime directory, who has no right to /run; who named a place knows how."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HMMD_")}
    environment["XDG_RUNTIME_DIR"] = "/proc/none"
    done = subprocess.run([*HMMD, *flags], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    refusal, *hint = done.stderr.splitlines()
    assert refusal.endswith("No such file or directory: /proc/none")
    assert hint == ["Say where else with --socket, $HMMD_SOCKET or $XDG_RUNTIME_DIR."] * hinted


@pytest.mark.slow
def test_help_and_version_explain_themselves() -> None:
    """Every setting is in --help; the version is that of the distribution."""
    text = subprocess.run([*HMMD, "--help"], capture_output=True, text=True, check=True).stdout
    assert "--acknowledgement-s" in text
    assert "seconds" in text
    assert metadata.version("hmmd") == VERSION
    shown = subprocess.run([*HMMD, "--version"], capture_output=True, text=True, check=True).stdout
    assert VERSION in shown


def test_command_is_read_without_what_takes_long_to_load() -> None:
    """--help, and the error of a setting, need neither gRPC nor numpy nor a loop."""
    heavy = "import sys, hmm_server.command; assert not {'grpc', 'numpy', 'asyncio', 'uvloop'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", heavy], check=True)


LOADING = """
import signal, sys

class Finder:
    def find_spec(self, name, path, target=None):
        if name == module:
            signal.raise_signal(number)

module, number = sys.argv.pop(), int(sys.argv.pop())
sys.meta_path.insert(0, Finder())
from hmm_server.__main__ import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("module", ["hmm_server.command", "click", "uvloop"])
def test_daemon_ends_in_good_order_when_it_is_told_to_while_modules_are_loaded(module: str, number: int) -> None:
    """Before it serves there is nothing to drain."""
    command = [sys.executable, "-c", LOADING, str(int(number)), module]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
async def test_cpu_setting_pins_the_process(place: Path) -> None:
    """The daemon runs on the CPU it was told to."""
    cpu = min(os.sched_getaffinity(0))
    async with hmmd("--socket", str(place), "--cpu", str(cpu)) as (daemon, _):
        assert os.sched_getaffinity(daemon.pid) == {cpu}


# ---- draining, in this process


async def test_drain_waits_for_answers_and_refuses_new_calls(serve: Any) -> None:
    """While it drains, a call under way gets its answer and ends; new ones are UNAVAILABLE, health says so."""
    served = await serve(drain_s=60.0)
    pid = await served.new_process()
    await served.mmap(pid, BASE, END)
    driver = await served.driver()
    mirror = await driver.mirror(pid)
    watching = health_pb2_grpc.HealthStub(served.channel).Watch(health_pb2.HealthCheckRequest())
    assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
    unmapping = asyncio.ensure_future(served.munmap(pid, BASE, END))
    event = await driver.events.get()
    draining = asyncio.ensure_future(served.daemon.drain())
    assert (await watching.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert (await driver.fault(mirror, BASE, END)).reason == "DRAINING"
    async with grpc.aio.insecure_channel(served.target) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await process_pb2_grpc.ProcessServiceStub(channel).CreateProcess(process_pb2.CreateProcessRequest())
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await driver.acknowledge(event)
    assert list((await unmapping).result.fenced_mirrors) == []
    assert "ending" in await driver.ended
    await draining


async def test_drain_takes_answers_that_come_as_calls_of_their_own(serve: Any) -> None:
    """A driver with a plain stream answers by Acknowledge; until then `pending` says what the drain waits for."""
    served = await serve(drain_s=60.0)
    pid = await served.new_process()
    await served.mmap(pid, BASE, BASE + PAGE)
    stream = served.device.WatchEvents(device_pb2.WatchEventsRequest())
    epoch = (await stream.read()).welcome.epoch
    device = await served.device.RegisterDevice(device_pb2.RegisterDeviceRequest(name="gpu"))
    request = device_pb2.RegisterMirrorRequest(device_id=device.device_id, process_id=pid, epoch=epoch)
    await served.device.RegisterMirror(request)
    unmapping = asyncio.ensure_future(served.munmap(pid, BASE, BASE + PAGE))
    (event,) = (await stream.read()).events
    draining = asyncio.ensure_future(served.daemon.drain())
    await served.until(lambda: served.daemon.executor.draining)
    assert [waiting.name for waiting in (await served.pending()).operations] == ["munmap"]
    answers = event_pb2.Acknowledgements(
        epoch=epoch, mirror_ids=event.mirror_ids, acknowledged_up_to=event.event_sequences
    )
    await served.device.Acknowledge(device_pb2.AcknowledgeRequest(acknowledgements=answers))
    result = (await unmapping).result
    assert (result.errno, list(result.fenced_mirrors)) == (0, [])
    await draining


async def test_drain_fences_drivers_that_do_not_answer(serve: Any) -> None:
    """When the time is up, even a mirror with policy BLOCK is fenced, so that the call and the daemon end."""
    served = await serve(drain_s=0.05)
    pid = await served.new_process()
    await served.mmap(pid, BASE, END)
    driver = await served.driver()
    mirror = await driver.mirror(pid, policy=types_pb2.DEADLINE_POLICY_BLOCK)
    exiting = asyncio.ensure_future(served.process.Exit(process_pb2.ExitRequest(process_id=pid)))
    await driver.events.get()
    await served.daemon.drain()
    assert list((await exiting).result.fenced_mirrors) == [mirror]
    assert not served.daemon.machine.operations
    assert not served.daemon.machine.spaces


async def test_drain_ends_watchers_and_streams(serve: Any) -> None:
    """Streams that would last for ever are told goodbye."""
    served = await serve()
    watching = served.inspection.Watch(inspection_pb2.WatchRequest())
    await watching.read()
    events = served.device.WatchEvents(device_pb2.WatchEventsRequest())
    await events.read()
    driver = await served.driver()
    await served.daemon.drain()
    assert await watching.read() is grpc.aio.EOF
    while await events.read() is not grpc.aio.EOF:
        continue
    assert await driver.ended == "the daemon is ending"


async def test_calls_are_exhausted_when_too_many_are_under_way(serve: Any) -> None:
    """The number of calls under way is limited, streams included."""
    served = await serve(concurrent_calls=1)
    await served.driver()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.new_process()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


# ---- errors that are bugs


async def test_bug_is_internal_without_text(served: Any, caplog: pytest.LogCaptureFixture) -> None:
    """An exception that is no HmmError reaches the client as INTERNAL without text, and the log once, with traceback.

    Both name the call.
    """
    pid = await served.new_process()
    served.daemon.machine.processes[pid].space = None
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.munmap(pid, BASE, END)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "NoneType" not in (caught.value.details() or "")
    (logged,) = [record for record in caplog.records if record.exc_info and record.name.startswith("hmm_server")]
    assert "AttributeError" in caplog.text
    status, detail = rpc_status.from_call(caught.value), error_details_pb2.ErrorInfo()  # type: ignore[arg-type]
    assert status is not None
    status.details[0].Unpack(detail)
    assert detail.metadata["operationId"] == str(logged.__dict__["operation_id"])
    ours = [record for record in caplog.records if record.name.startswith("hmm_server")]
    assert {record.__dict__.get("operation_id") for record in ours} == {logged.__dict__["operation_id"]}
    caplog.clear()
    batch = process_pb2.ExecuteRequest(
        calls=[process_pb2.Call(munmap=process_pb2.MunmapRequest(process_id=pid, address=BASE, length=PAGE))]
    )
    (outcome,) = (await served.process.Execute(batch)).outcomes
    assert (outcome.not_made.reason, outcome.not_made.errno) == ("INTERNAL", 0)
    (logged,) = [record for record in caplog.records if record.exc_info and record.name.startswith("hmm_server")]
    assert outcome.not_made.operation_id == logged.__dict__["operation_id"]
    del served.daemon.machine.processes[pid]


async def test_reflection_lists_the_services(served: Any) -> None:
    """`buf curl` and its like need no files: the daemon describes itself."""
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc  # noqa: PLC0415

    stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    call = stub.ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    names = [service.name for service in (await call.read()).list_services_response.service]
    await call.done_writing()
    assert {"hmm.v1.ProcessService", "hmm.v1.SessionService", "grpc.health.v1.Health"} <= set(names)


async def test_reflection_is_not_there_when_it_is_switched_off(serve: Any) -> None:
    """UNIMPLEMENTED, as of every service that a server does not have."""
    from grpc_reflection.v1alpha import reflection_pb2_grpc  # noqa: PLC0415

    served = await serve(reflection=False)
    call = reflection_pb2_grpc.ServerReflectionStub(served.channel).ServerReflectionInfo()
    assert await call.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_message_is_refused_when_it_is_larger_than_the_setting_allows(serve: Any) -> None:
    """RESOURCE_EXHAUSTED before anything is done; the connection goes on."""
    served = await serve(message_bytes=1 << 16, part_bytes=4096, fault_pages=512)
    pid = await served.new_process()
    await served.mmap(pid, BASE, BASE + (1 << 20))
    large = process_pb2.WriteMemoryRequest(process_id=pid, address=BASE, data=bytes(1 << 17))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.process.WriteMemory(large)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    written = await served.process.WriteMemory(
        process_pb2.WriteMemoryRequest(process_id=pid, address=BASE, data=b"small")
    )
    assert written.result.errno == 0


async def test_tcp_is_not_served_unless_it_is_asked_for(served: Any) -> None:
    """One target, the socket's."""
    assert [target.partition(":")[0] for target in served.daemon.targets] == ["unix"]
