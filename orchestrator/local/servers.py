"""One Triton server of a stack: started, watched, started again by itself, and ended."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path

from orchestrator import models
from orchestrator.errors import TruthGPTError
from orchestrator.local import alias, modelset, tritonserver
from orchestrator.local.modelwatch import ModelWatch
from orchestrator.local.places import Place
from orchestrator.local.preflight import StartError
from orchestrator.local.process import Child, kill_group, runs
from orchestrator.local.tritonserver import Installation
from orchestrator.local.waiting import Patience, status_of
from orchestrator.settings import Settings
from orchestrator.triton import Deadlines, Triton

ENGINE_VERSIONS = 2  # that the config.pbtxt of a graph alone has loaded: the entry in front is switched after it
END_S = 7.0
EMPTY_S = 0.1  # for a server that nothing is left in; by itself it would look only once a second

Report = Callable[[str], None]


class Server:
    """The `number`th server of a home, from 1, which serves what the home's model set says.

    `check` raises StartError where a version may not be loaded, `changed` is told of a new process and of what was
    mended. Needs a running loop.
    """

    def __init__(
        self, settings: Settings, installation: Installation, place: Place, number: int, report: Report,
        check: Callable[[str, int], Awaitable[None]], changed: Callable[[], object],
    ) -> None:  # fmt: skip
        self.place = place
        self.child: Child | None = None
        self._settings, self._installation, self._number = settings, installation, number
        self._report, self._check = report, check
        self._home: Path = settings.home.resolve()
        self.triton = Triton(place.http, Deadlines(heartbeat_s=settings.heartbeat_timeout_s))
        self._models = ModelWatch(
            settings, place, self.triton, lambda: self.process, self._lives, self._restart, changed, report, check
        )

    @property
    def process(self) -> Child:
        """The process of the moment; it has been started."""
        if self.child is None:
            raise RuntimeError(f"{self.place.name} has not been started")
        return self.child

    async def start(self, without: Collection[str] = ()) -> None:
        """Start it with the models that it would load by itself in the version that is to be served.

        The others are loaded by the model watch, which can name a version.
        """
        wanted = {name: number for name, number in modelset.read(self._home).items() if name not in without}
        by_itself = {
            entry.name: entry.versions[: ENGINE_VERSIONS if entry.newest.graph_only else 1]
            for entry in models.read(self._settings.model_repository)
        }
        names = [name for name, number in wanted.items() if number in {v.number for v in by_itself.get(name, ())}]
        argv = tritonserver.command(self._installation, self._settings, names, self._number)
        env = tritonserver.environment(self._installation)
        self.child = await Child.start(self.place.name, argv, env, self._home / "logs" / self.place.log)

    async def loads(self, names: Collection[str], patience: Patience) -> bool:
        """Wait until these models answer, one after the other. False when stopping. Raises StartError."""
        for name in names:
            if not await self._loads(name, patience):
                return False
        return True

    async def _loads(self, name: str, patience: Patience) -> bool:
        """A server that crashes meanwhile gets a second attempt, no third.

        Seen on the real server: where the machine stands still for a second while a stub starts, a lock that they
        share times out, and the server aborts.
        """
        failure = f"the model {name} did not load"

        async def answers() -> bool:
            return await self._models.answers(name)

        async def refused() -> str | None:
            return await self._failure(name)

        try:
            return await patience.until(answers, lambda: self.process, failure, refused)
        except StartError:
            ended = self.process.returncode
            if ended is None or ended >= 0:
                raise
            self._report(f"Triton was ended by signal {-ended} while it loaded {name}: starting it once more")
            await self._restart()
            return await patience.until(answers, lambda: self.process, failure, refused)

    async def _failure(self, name: str) -> str | None:
        """Why Triton could not load a model, once it has tried."""
        with contextlib.suppress(TruthGPTError):
            if (await self.triton.index()).get(name, ("", ""))[1] == "UNAVAILABLE":
                return self.process.last_lines(2) or "Triton gives no reason"
        return None

    async def _lives(self) -> bool:
        return await status_of(f"{self.place.http}/v2/health/live", 1.0) == 200

    async def watch(self) -> None:
        """Mend its models, and itself, until cancelled."""
        await self._models.run()

    async def _restart(self) -> None:
        await self.process.kill()
        tritonserver.sweep(self.place.shm_prefix, kill=True)
        damaged = []
        for name, number in modelset.read(self._home).items():
            try:
                await self._check(name, number)
            except StartError:  # the model watch says why, when it tries to load it
                damaged.append(name)
        try:
            await self.start(without=damaged)
        except (OSError, alias.AliasError, models.ModelsError) as error:  # the next look of the model watch tries again
            self._report(f"Triton cannot be started again: {error}")

    def kill(self) -> None:
        """End it at once, whatever runs in it; may be called from a signal handler."""
        if self.child is not None and self.child.returncode is None:
            kill_group(self.child.pid)

    async def stop(self) -> None:
        """Let it end, by force if it does not; what it leaves in shared memory is the caller's to remove."""
        await self.triton.close()  # a server does not exit while a connection to it is open
        if self.child is not None:
            await self._end_stubs(self.child)
            await self.child.stop(EMPTY_S)

    async def _end_stubs(self, server: Child) -> None:
        """Ask the server to end and wait until its models have; with a dead or stopped stub they never would."""
        server.terminate()
        deadline = time.monotonic() + END_S
        while time.monotonic() < deadline and server.returncode is None:
            stubs = tritonserver.stubs(server.pid)
            if not stubs or not all(runs(stub.pid) for stub in stubs):
                return
            await asyncio.sleep(0.05)
