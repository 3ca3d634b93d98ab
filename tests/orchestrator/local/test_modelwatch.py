"""The watch over a home's models, with a Triton that is made up and processes that only look like its models'."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from orchestrator.local import modelset, places, tritonserver
from orchestrator.local.modelwatch import ModelWatch
from orchestrator.local.process import Child
from orchestrator.settings import Settings
from orchestrator.triton import Deadlines, Triton
from tests.encoding import EMBEDS
from tests.orchestrator.conftest import until
from tests.orchestrator.fake_triton import FakeTriton

SOON_S = 5.0


class Server:
    """Stands for Triton's process: this one, whose children are the stubs."""

    pid, returncode = os.getpid(), None


class Watching:
    """What a watch that runs has said and done. `stubs`: model -> its process."""

    def __init__(self, stubs: dict[str, subprocess.Popen[bytes]]) -> None:
        self.stubs, self.said, self.restarts = stubs, list[str](), list[str]()

    async def says(self, text: str) -> None:
        await until(lambda: any(text in line for line in self.said), SOON_S)


@pytest.fixture
def stubs(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Starts a process whose arguments are those of a model's stub."""
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str) -> subprocess.Popen[bytes]:
        script = tmp_path / "stubs" / name / "1" / "model.py"
        script.parent.mkdir(parents=True)
        script.write_text("read line\n")
        argv = [tritonserver.STUB, str(script), "region"]
        started.append(subprocess.Popen(argv, executable="/bin/sh", stdin=subprocess.PIPE))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@asynccontextmanager
async def watching(home: Path, fake: FakeTriton, stubs: Any, *names: str) -> AsyncIterator[Watching]:
    """Watch these models; none can be reloaded, because the repository is empty."""
    found = Watching({name: stubs(name) for name in names})
    settings = Settings.load({"home": home, "model_repository": home / "repository", "heartbeat_timeout_s": 0.5})
    modelset.write(home, dict.fromkeys(names, 1))

    async def alive() -> bool:
        return True

    async def restart() -> None:
        task = asyncio.current_task()
        found.restarts.append(task.get_name() if task is not None else "")

    async def check(name: str, number: int) -> None:
        return None

    triton = Triton(fake.url, Deadlines(heartbeat_s=0.5))
    server = cast(Child, Server())
    (place,) = places.own(settings)
    watch = ModelWatch(settings, place, triton, lambda: server, alive, restart, lambda: None, found.said.append, check)
    running = asyncio.create_task(watch.run(), name="the watch")
    try:
        await asyncio.sleep(1.0)
        assert found.said == []
        yield found
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await triton.close()
        assert running.cancelled(), running


async def test_a_long_batch_is_neither_a_fault_nor_a_blindfold(tmp_path: Path, fake: FakeTriton, stubs: Any) -> None:
    """An encoder in a batch is left alone, another model is seen meanwhile, and so is that its process stops."""
    fake.encoders["e"], fake.models["e"] = EMBEDS, "READY"
    fake.beats_wait = True
    async with watching(tmp_path, fake, stubs, "m", "e") as found, fake._batch:
        await asyncio.sleep(2.5)
        assert found.said == []
        fake.beat_error = "Stub process 'm' is not healthy."
        found.stubs["m"].kill()
        found.stubs["m"].wait()
        await found.says("m does not answer: reload the model")
        assert not any(line.startswith("e ") for line in found.said)
        os.kill(found.stubs["e"].pid, signal.SIGSTOP)
        await found.says("e does not answer: reload the model")


async def test_what_is_another_s_work_is_not_mended(tmp_path: Path, fake: FakeTriton, stubs: Any) -> None:
    """While an operator holds the lock of a model nothing is done to it; the look after that acts."""
    async with watching(tmp_path, fake, stubs, "m") as found:
        with (tmp_path / "models-m.lock").open("w") as lock:  # a command that has begun between two looks
            fcntl.flock(lock, fcntl.LOCK_EX)
            fake.beat_error = "Stub process 'm' is not healthy."
            found.stubs["m"].kill()
            found.stubs["m"].wait()
            await found.says("m does not answer")
            await asyncio.sleep(1.5)
            assert len(found.said) == 1 and found.restarts == []
        await found.says("m could not be reloaded")


async def test_a_reload_in_vain_has_the_watch_start_the_server_again(
    tmp_path: Path, fake: FakeTriton, stubs: Any
) -> None:
    """Once, and by the watch itself, so that no two servers are started; not while another model answers."""
    fake.encoders["e"], fake.models["e"] = EMBEDS, "READY"
    async with watching(tmp_path, fake, stubs, "m", "e") as found:
        for name in ("m", "e"):
            fake.models[name] = "UNAVAILABLE"
            found.stubs[name].kill()
            found.stubs[name].wait()
            if name == "m":
                fake.config_facts = {"max_batch_size": "nonsense"}
            else:
                fake.beat_error = "Stub process 'e' is not healthy."
            await found.says(f"{name} could not be reloaded")
            await asyncio.sleep(0.8)
            assert len(found.restarts) == (name == "e")
        assert found.restarts == ["the watch"]


async def test_who_dies_before_being_seen_well_is_mended_as_soon(tmp_path: Path, fake: FakeTriton, stubs: Any) -> None:
    """A server was started anew and says that it has the model, whose process is dead: patience was for its loading."""
    async with watching(tmp_path, fake, stubs, "m") as found:
        fake.beat_error = "Stub process 'm' is not healthy."
        found.stubs["m"].kill()
        found.stubs["m"].wait()
        await until(lambda: len(found.restarts) >= 2, 4 * SOON_S)
