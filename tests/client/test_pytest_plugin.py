"""The plugin of pytest, as a project sees it that has hmmd installed: tests of its own, in a process of their own."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow

OPTIONS = ("-p", "no:cacheprovider", "-p", "no:randomly", "--strict-markers", "-W", "error")
SCOPE = "asyncio_default_fixture_loop_scope = function"


def run(pytester: pytest.Pytester, tests: str, *options: str, ini: str = "") -> pytest.RunResult:
    """Run tests of a project of their own."""
    pytester.makeini(f"[pytest]\nasyncio_mode = auto\n{ini or SCOPE}")
    pytester.makepyfile(tests)
    return pytester.runpytest_subprocess(*OPTIONS, *options)


def test_fixtures_make_a_daemon_a_process_a_device_and_mirrors(pytester: pytest.Pytester) -> None:
    """Plain functions: own daemon and shared one, a driver of one's own, misbehaviour, a hold."""
    result = run(
        pytester,
        """
        import pytest

        from hmm.errors import BadAddressError, OutOfFramesError
        from hmm_client import sync
        from hmm_client.harness import HoldPoint, Misbehaviour, hold

        class Gpu(sync.Driver):
            def __init__(self):
                self.heard = []

            def update(self, event):
                self.heard.append(event.type.name)

        def test_driver_hears(hmm_process, hmm_mirror):
            heap = hmm_process.mmap(4 * 4096).span
            gpu = Gpu()
            mirror = hmm_mirror(gpu)
            mirror.fault(heap, write=True)
            hmm_process.munmap(heap.start, heap.size_bytes)
            assert gpu.heard == ["DEVICE_WFAULT", "MUNMAP"]
            with pytest.raises(BadAddressError):
                mirror.read([(heap.start, 1)])

        def test_script_and_hold(hmm):
            process, script = hmm.process(), Misbehaviour()
            heap = process.mmap(4 * 4096).span
            mirror = hmm.mirror(process, Gpu(), misbehaviour=script)
            mirror.fault(heap)
            script.behave(hold())
            with hmm.hold(HoldPoint.EVENT_SENT, "munmap", process=process, mirror=mirror) as held:
                unmapping = hmm.background(process.munmap, heap.start, heap.size_bytes)
                assert held.reached()
                hmm.wait_held(script)
                (operation,) = hmm.pending().operations
                assert operation.held.point == "event sent"
                script.release()
            assert unmapping.result().fenced_mirrors == ()

        @pytest.mark.hmm_daemon(frames=64)
        def test_settings(hmm, hmm_daemon, hmm_device):
            assert hmm_daemon.started_s > 0
            assert hmm_daemon.is_alive
            process = hmm.process()
            heap = process.mmap(1 << 20).span
            with pytest.raises(OutOfFramesError):
                process.touch(heap.start, heap.size_bytes, write=True)

        SEEN = []

        @pytest.mark.parametrize("number", range(2))
        def test_shared(hmm_shared, hmm_shared_daemon, number):
            SEEN.append(hmm_shared_daemon.process.pid)
            hmm_shared.process("shared").mmap(4096)
            assert len(set(SEEN)) == 1
        """,
    )
    result.assert_outcomes(passed=5)


@pytest.mark.parametrize("scope", ["function", "session"])
def test_fixtures_are_asynchronous_when_asked_for(pytester: pytest.Pytester, scope: str) -> None:
    """Coroutines, whether each has a loop of its own or all have one."""
    result = run(
        pytester,
        """
        import asyncio

        from hmm_client.harness import HoldPoint

        async def use(rig):
            process = await rig.process()
            heap = (await process.mmap(4 * 4096)).span
            mirror = await rig.mirror(process)
            await mirror.fault(heap)
            harness = await rig.harness()
            async with harness.hold(HoldPoint.BEFORE_EDIT, "munmap", process=process) as held:
                unmapping = asyncio.ensure_future(process.munmap(heap.start, heap.size_bytes))
                await held.reached()
            assert (await unmapping).fenced_mirrors == ()
            assert not (await rig.pending()).operations

        async def test_own(hmm_aio):
            await use(hmm_aio)

        async def test_shared(hmm_aio_shared):
            await use(hmm_aio_shared)

        async def test_shared_again(hmm_aio_shared):
            await use(hmm_aio_shared)
        """,
        ini=f"asyncio_default_fixture_loop_scope = {scope}\nasyncio_default_test_loop_scope = {scope}",
    )
    result.assert_outcomes(passed=3)


def test_report_names_seed_pending_and_log_when_a_test_fails(pytester: pytest.Pytester) -> None:
    """Whoever reads the report knows who was waiting for whom, and how to run it again."""
    result = run(
        pytester,
        """
        import pytest

        from hmm_client.harness import Misbehaviour, hold

        @pytest.mark.hmm_daemon(acknowledgement_s=600.0)
        def test_it(hmm):
            script = Misbehaviour(hold())
            process = hmm.process()
            heap = process.mmap(4096).span
            mirror = hmm.mirror(process, misbehaviour=script, device=hmm.device("laggard"))
            mirror.fault(heap)
            hmm.background(process.munmap, heap.start, 4096)
            hmm.wait_held(script)
            assert False, hmm.random.random()
        """,
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "*hmm seed*",
            "run it again with --hmm-seed=*",
            "*hmmd pending*",
            "munmap * of process 1 by program under way for *",
            "  laggard (pid *) has not answered MUNMAP #2 of mirror 1: sent *",
            "*hmmd log (it served after *.* s)*",
            "*INFO hmm_server.daemon: serving unix:*",
            "hmmd: 1 daemon, served after *.* s, the slowest after *.* s",
        ]
    )


def test_report_says_so_when_the_daemon_has_died(pytester: pytest.Pytester) -> None:
    """A daemon that is gone is what the test failed of."""
    result = run(
        pytester,
        """
        def test_it(hmm_daemon):
            hmm_daemon.process.kill()
            hmm_daemon.process.wait()
            assert False
        """,
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["the daemon has ended: exit code -9"])


def test_seed_is_the_tests_own_unless_it_is_given(pytester: pytest.Pytester) -> None:
    """The same in every run, another for another test; one option repeats any."""
    tests = """
        import pytest

        @pytest.mark.parametrize("number", range(2))
        def test_it(hmm_seed, number):
            print("seed", number, hmm_seed)
        """

    def seeds(*options: str) -> list[str]:
        result = run(pytester, tests, "-s", *options)
        result.assert_outcomes(passed=2)
        return [line.split()[-1] for line in result.stdout.lines if "seed " in line and line.split()[-1].isdigit()]

    first = seeds()
    assert len(set(first)) == 2
    assert seeds() == first
    assert seeds("--hmm-seed=5") == ["5", "5"]


def test_plugin_imports_nothing_when_no_fixture_is_used(pytester: pytest.Pytester) -> None:
    """A project that has hmmd installed does not wait for gRPC in every test run."""
    result = run(
        pytester,
        """
        import sys

        def test_it():
            assert not {"grpc", "numpy", "hmm_client.harness"} & set(sys.modules)
        """,
    )
    result.assert_outcomes(passed=1)
