"""The certificate: every adversity and so many storms, one trial after the other, and what each rule was broken by.

One daemon and one driver serve many trials, each with processes of its own; a driver that died or hangs is started
anew, and both are after a trial that was broken off.  Several such pairs share the storms.

**Invariants**: a trial's findings are of that trial; every trial ends, within a limit and what ending two processes
takes; for every rule broken in a storm the shortest storm is looked for.

**Absent**: how it is printed (`hmm_client.commands.certify`).
"""

from __future__ import annotations

import asyncio
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from hmm.errors import HmmError
from hmm_client.certify.adversities import ADVERSITIES
from hmm_client.certify.adversity import Adversity
from hmm_client.certify.driver_process import ANSWER_S, DriverGoneError, DriverProcess, DriverSilentError
from hmm_client.certify.findings import Auditor, Finding, of_driver
from hmm_client.certify.stage import Stage
from hmm_client.certify.storm import Step, Storm, draw, shortest
from hmm_client.channel import DaemonError, UnavailableError
from hmm_client.client import Client, connect
from hmm_client.embedded import PATIENCE, EmbeddedDaemon

DEADLINE_S = 5.0
"""How long a driver has for the answer to an event: as long as hmmd gives it, unless told otherwise."""
LEASE_S = 30.0
"""How long a driver may take for the next step of a migration: as long as hmmd gives it, unless told otherwise."""
LIMIT_S = 120.0
"""How long a trial may take: ours take two seconds, and a driver has twenty for the answer to each order."""
CLEANING_S = 2.0
"""How long a trial that is broken off may take to clear up behind itself."""
SWAP_PAGES = 1 << 12
_ENDING = frozenset({"died", "silent", "unanswered", "lost-session", "lease-over"})


@dataclass(frozen=True, slots=True)
class Trial:
    """One adversity or one storm, and what came of it.

    Attributes:
        seed: of a storm; None for an adversity.
        shortest: of a storm that went wrong, the fewest steps found that show it.
        skipped: why it was left out; empty: it was not.
    """

    name: str
    title: str
    seconds: float
    findings: tuple[Finding, ...]
    seed: int | None = None
    shortest: tuple[Step, ...] = ()
    skipped: str = ""


@dataclass(slots=True)
class Certificate:
    """What a driver got right and wrong."""

    trials: list[Trial] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing was wrong."""
        return not any(trial.findings for trial in self.trials)

    @property
    def broken(self) -> dict[str, Trial]:
        """The rules that were broken, each with the trial that shows it best: an adversity, or the shortest storm."""
        best: dict[str, Trial] = {}
        for trial in self.trials:
            for finding in trial.findings:
                known = best.get(finding.rule)
                if known is None or (known.seed is not None and len(trial.shortest) < len(known.shortest)):
                    best[finding.rule] = trial
        return best


class Certifier:
    """Runs trials.  Made by `certifying`."""

    def __init__(
        self, command: Sequence[str], folder: Path, deadline_s: float, answer_s: float, limit_s: float, lease_s: float
    ) -> None:
        self._command = command
        self._folder = folder
        self._deadline_s = deadline_s
        self._answer_s = answer_s
        self._limit_s = limit_s
        self._lease_s = lease_s
        self._offers: frozenset[str] = frozenset()
        self._driver: DriverProcess | None = None
        self._daemon: EmbeddedDaemon
        self._client: Client
        self._auditor: Auditor

    async def start_daemon(self) -> Client:
        """A daemon of our own, and a client of it: the first one, or another after `kill_daemon`."""
        settings = PATIENCE | {
            "acknowledgement_s": self._deadline_s,
            "holding_lease_s": self._lease_s,
            "swap_pages": SWAP_PAGES,
            "log_level": "error",
        }
        starting = asyncio.ensure_future(
            asyncio.to_thread(EmbeddedDaemon, self._folder, log=None, harness=True, **settings)
        )
        try:
            self._daemon = await asyncio.shield(starting)
        except asyncio.CancelledError:
            (await starting).stop()  # it is a process: nobody else would end it
            raise
        self._client = connect(self._daemon.target, name="certify")
        self._auditor = Auditor(self._client)
        return self._client

    async def end(self) -> None:
        """End the daemon in good order, and a driver that was not let leave by force."""
        if self._driver is not None:
            await self._driver.kill()
        await self._end_daemon()

    async def _end_daemon(self) -> None:
        await asyncio.to_thread(self._daemon.stop)

    async def _replace_daemon(self) -> Client:
        self._daemon.process.kill()
        await self._end_daemon()
        return await self.start_daemon()

    async def start_driver(self) -> DriverProcess:
        """The driver, started if it is not there.

        Raises:
            DriverGoneError, DriverSilentError: it does not start.
        """
        if self._driver is None:
            self._driver = await DriverProcess.start(self._command, str(self._daemon.socket), self._answer_s)
            self._offers = self._driver.offers
        return self._driver

    async def leaving(self) -> Trial:
        """Let the driver leave: the last trial."""
        began = time.monotonic()
        left = self._driver is None or await self._driver.leave()
        self._driver = None
        await self._client.close()
        detail = "when its standard input ended, it did not leave with exit code 0 within 10 s"
        wrong = () if left else (Finding("did-not-leave", detail),)
        return Trial("leave", "the driver leaves when its standard input ends", time.monotonic() - began, wrong)

    async def adversity(self, adversity: Adversity) -> Trial:
        """Run one adversity, unless it takes an order that the driver does not offer."""
        began = time.monotonic()
        if adversity.order and adversity.order not in self._offers:
            skipped = f"the driver offers no order {adversity.order!r}"
            return Trial(adversity.name, adversity.title, 0.0, (), skipped=skipped)
        findings = await self._trial(adversity.run)
        return Trial(adversity.name, adversity.title, time.monotonic() - began, findings)

    async def storm(self, seed: int) -> Trial:
        """Run one storm, and if something is wrong look for the shortest that shows it."""
        began = time.monotonic()
        steps = draw(seed)
        findings = await self._storm(steps)
        fewest: list[Step] = []
        if findings and findings[0].rule != "unfinished":  # each of those would take as long again
            fewest = await shortest(steps, self._storm, findings[0].rule)
        title = "steps at random, and accesses all the while"
        return Trial(f"storm-{seed}", title, time.monotonic() - began, findings, seed, tuple(fewest))

    async def _storm(self, steps: Sequence[Step]) -> tuple[Finding, ...]:
        async def run(stage: Stage) -> None:
            async with Storm.gathered(stage) as storm:
                await storm.rage(steps)

        return await self._trial(run)

    async def _trial(self, run: Callable[[Stage], Awaitable[None]]) -> tuple[Finding, ...]:
        try:
            driver = await self.start_driver()
        except (DriverGoneError, DriverSilentError) as error:
            return (of_driver(error, "it does not start again: "),)
        stage = Stage(driver, self._client, self._auditor, self._replace_daemon)
        whole = await self._within_limit(stage, asyncio.create_task(stage.take(run)))
        self._client, self._auditor = stage.client, stage.auditor
        findings = stage.verdict
        if not whole or driver.ended or _ENDING.intersection(finding.rule for finding in findings):
            await driver.kill()
            self._driver = None
        if not whole:
            await self._client.close()
            await self._replace_daemon()
        return findings

    async def _exit_code(self) -> int | None:
        """That of a daemon that ends or has ended; None: it goes on."""
        with suppress(subprocess.TimeoutExpired):
            return await asyncio.to_thread(self._daemon.process.wait, CLEANING_S)
        return None

    async def _within_limit(self, stage: Stage, trial: asyncio.Task[None]) -> bool:
        """Wait for a trial.  Returns: False if it was broken off, and who knows how the daemon is."""
        try:
            await asyncio.wait({trial}, timeout=self._limit_s)
            if not trial.done():
                await stage.give_up(self._limit_s)
                return False
            trial.result()
        except (HmmError, DaemonError) as error:
            stage.find("unfinished", f"a call of the trial failed: {error}")
            if isinstance(error, UnavailableError) and (code := await self._exit_code()) is not None:
                gone = f"hmmd ended in the middle of it, with exit code {code}"
                stage.findings = [Finding("unfinished", gone)]  # whatever else was found comes of it
            return False
        else:
            return True
        finally:
            if not trial.done():
                trial.cancel()
                await asyncio.wait({trial}, timeout=CLEANING_S)
            if not trial.done():
                self._daemon.process.kill()  # nobody waits for it then
                await asyncio.wait({trial})


@asynccontextmanager
async def certifying(
    command: Sequence[str], deadline_s: float, answer_s: float, limit_s: float, lease_s: float = LEASE_S
) -> AsyncIterator[Certifier]:
    """A daemon, and the driver that it is made for, until the block ends.

    Raises:
        DriverGoneError, DriverSilentError: the driver does not start.
    """
    with tempfile.TemporaryDirectory(prefix="hmmd-certify-") as folder:
        certifier = Certifier(command, Path(folder), deadline_s, answer_s, limit_s, lease_s)
        await certifier.start_daemon()
        try:
            await certifier.start_driver()
            yield certifier
        finally:
            await certifier.end()


async def certify(
    command: Sequence[str],
    *,
    adversities: Iterable[str] = tuple(ADVERSITIES),
    seeds: Iterable[int] = (),
    deadline_s: float = DEADLINE_S,
    answer_s: float | None = None,
    limit_s: float = LIMIT_S,
    lease_s: float = LEASE_S,
    jobs: int = 1,
    told: Callable[[Trial], None] = lambda _: None,
) -> Certificate:
    """Put a driver to the test.

    Args:
        command: starts it; see `hmm_client.certify` for what is asked of it.
        adversities: names of those to run, in order.
        seeds: of storms.
        deadline_s: for the answer to an event.
        answer_s: for the answer to an order; None: longer than any deadline.
        limit_s: for a trial: one that takes longer is broken off, which is a finding that says who waits for whom.
        lease_s: for the next step of a migration.
        jobs: how many trials run at a time, each against a daemon and a driver of its own.
        told: called after each trial, in the order in which they end.

    Raises:
        DriverGoneError, DriverSilentError: the driver does not start.
    """
    certificate, left = Certificate(), iter(seeds)

    def note(trial: Trial) -> None:
        certificate.trials.append(trial)
        told(trial)

    async def work(names: Iterable[str]) -> None:
        patience_s = ANSWER_S if answer_s is None else answer_s
        async with certifying(command, deadline_s, patience_s, limit_s, lease_s) as certifier:
            for name in names:
                note(await certifier.adversity(ADVERSITIES[name]))
            for seed in left:
                note(await certifier.storm(seed))
            leaving = await certifier.leaving()
            if names or leaving.findings:
                note(leaving)

    try:
        async with asyncio.TaskGroup() as group:
            for number in range(jobs):
                group.create_task(work(tuple(adversities) if not number else ()))
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    certificate.trials.sort(key=lambda trial: -1 if trial.seed is None else trial.seed)
    return certificate
