"""Readiness that follows the stub's heartbeat, and streams that fall with their model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from orchestrator.domain import Model
from orchestrator.errors import Draining, ModelNotFound, UpstreamUnavailable
from orchestrator.health import Health
from orchestrator.triton import Deadlines, Triton
from tests.clock import awake

from .conftest import until
from .fake_triton import FakeTriton


@pytest.fixture
async def health(fake: FakeTriton) -> AsyncIterator[Health]:
    triton = Triton(fake.url, Deadlines(heartbeat_s=0.3))
    watch = Health(triton, interval_s=0.03, engine_stall_s=5.0)
    task = asyncio.create_task(watch.run())
    yield watch
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await triton.close()


async def ready(health: Health, name: str) -> Model:
    """A model that a request sent now could use. Raises as one on the request path would."""
    model = await health.find(name)
    with health.attend(name):
        return model


async def test_a_model_that_answers_is_ready(health: Health, fake: FakeTriton) -> None:
    """Nothing is ready before a heartbeat came back; then the model is, with what its entry says."""
    assert not health.ready
    model = await ready(health, "m")
    assert (model.name, model.version, model.ready, model.chat, model.max_len) == ("m", "1", True, True, 64)
    assert health.ready


async def test_models_that_are_not_ready_in_the_index_are_not_served(health: Health, fake: FakeTriton) -> None:
    """Only READY rows count: an entry that was never loaded is 404."""
    fake.models["never"] = ""
    with pytest.raises(ModelNotFound):
        await ready(health, "never")


async def test_the_graph_of_a_model_is_not_served(health: Health, fake: FakeTriton) -> None:
    """A model named m--engine beside m is nobody's to ask and has no part in readiness; without an m it is a model."""
    fake.models |= {"m--engine": "READY", "other--engine": "READY"}
    fake.other_backends |= {"m--engine", "other--engine"}
    await ready(health, "m")
    with pytest.raises(ModelNotFound):
        await health.find("m--engine")
    assert (await health.find("other--engine")).name == "other--engine"
    assert [served.model.name for served in health.served()] == ["m", "other--engine"]


@pytest.mark.parametrize("fault", ["error", "stopped", "killed", "stalled"])
async def test_faults_turn_it_unready_and_back(health: Health, fake: FakeTriton, fault: str) -> None:
    """A dead stub, a stopped or killed server and an engine stuck in a step: unready in time, ready again after."""
    await ready(health, "m")
    port = fake.port
    began = awake()
    if fault == "error":
        fake.beat_error = "Stub process 'm' is not healthy."
    elif fault == "stopped":
        fake.stopped = True
    elif fault == "stalled":
        fake.beat |= {"busy": True, "step_age_s": 6.0}
    else:
        await fake.stop()
    await until(lambda: not health.ready)
    assert awake() - began < 0.6
    with pytest.raises(UpstreamUnavailable):
        await ready(health, "m")
    if fault == "killed":
        await fake.start(port)
    fake.beat_error, fake.stopped = None, False
    fake.beat |= {"busy": False, "step_age_s": 0.0}
    await until(lambda: health.ready)


async def test_a_long_idle_step_is_no_stall(health: Health, fake: FakeTriton) -> None:
    """An old step of an engine that is not busy says nothing."""
    fake.beat["step_age_s"] = 1000.0
    assert (await ready(health, "m")).ready
    await asyncio.sleep(0.1)
    assert health.ready


async def test_streams_fall_with_their_model(health: Health, fake: FakeTriton) -> None:
    """When a model turns unready its streams are failed at once, those of another model are not."""
    fake.models["other"] = "READY"
    await ready(health, "m")
    with health.attend("m") as mine:
        fake.beat_error = "Stub process is not healthy"
        await until(lambda: mine.error is not None)
    assert isinstance(mine.error, UpstreamUnavailable)
    fake.beat_error = None
    await until(lambda: health.ready)
    with health.attend("m") as fresh:
        await asyncio.sleep(0.1)
        assert fresh.error is None
        health.fail_all(Draining())
        assert isinstance(fresh.error, Draining)


async def test_a_stream_that_is_written_to_outweighs_a_late_heartbeat(health: Health, fake: FakeTriton) -> None:
    """On a machine too busy for heartbeats, bytes on a stream prove the stub alive; once they stop, it is unready."""
    await ready(health, "m")
    loop = asyncio.get_running_loop()
    with health.attend("m") as stream:
        fake.stopped = True
        for _ in range(20):
            stream.heard_at = loop.time()
            await asyncio.sleep(0.05)
        assert health.ready
        assert stream.error is None
        await until(lambda: stream.error is not None)
    assert not health.ready


async def test_unknown_models_are_looked_up_at_most_once_a_second(health: Health, fake: FakeTriton) -> None:
    """A model loaded a moment ago is found on demand, and a storm of unknown names does not reach Triton."""
    await ready(health, "m")
    await asyncio.sleep(1.0)
    fake.models["new"] = "READY"
    assert (await ready(health, "new")).ready
    calls = fake.calls.count("POST /v2/repository/index")
    for _ in range(50):
        with pytest.raises(ModelNotFound):
            await ready(health, "ghost")
    assert fake.calls.count("POST /v2/repository/index") <= calls + 1


async def test_healing_and_removal(health: Health, fake: FakeTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model being healed answers 503, not 404; one that left the repository, or stays unloaded, is gone."""
    monkeypatch.setattr("orchestrator.health.INDEX_INTERVAL_S", 0.05)
    monkeypatch.setattr("orchestrator.health.FORGET_S", 1.0)
    fake.models["other"] = "READY"
    await ready(health, "m")
    await until(lambda: len(health.served()) == 2)
    await asyncio.sleep(2.1)  # the watch still sleeps its first long interval
    fake.beat_error = "Stub process 'm' is not healthy."
    await until(lambda: not any(served.model.ready for served in health.served()))  # each has its own heartbeat
    fake.models["m"] = "UNAVAILABLE"
    fake.beat_error = "Request for unknown model: 'm' is not found"
    await asyncio.sleep(0.1)
    with pytest.raises(UpstreamUnavailable):
        await ready(health, "m")
    fake.models["m"], fake.parameters["chat"] = "READY", "false"
    await asyncio.sleep(0.1)  # a heartbeat that had read the old configuration has failed by now
    fake.beat_error = None
    await until(lambda: all(served.model.ready for served in health.served()))
    assert not (await ready(health, "m")).chat, "the configuration is read anew after a reload"
    del fake.models["other"]
    await until(lambda: len(health.served()) == 1)
    fake.models["m"] = "UNAVAILABLE"
    await until(lambda: not health.served())
    with pytest.raises(ModelNotFound):
        await ready(health, "m")


async def test_an_unloaded_model_is_gone_at_once_and_its_streams_may_end(fake: FakeTriton) -> None:
    """A model that answered until it was unloaded is 404 by its next heartbeat; its streams get the time to drain."""
    triton = Triton(fake.url, Deadlines(heartbeat_s=0.3))
    health = Health(triton, interval_s=0.03, engine_stall_s=5.0, drain_s=0.5)
    gone: list[str] = []
    health.on_gone.append(gone.append)
    task = asyncio.create_task(health.run())
    await ready(health, "m")
    with health.attend("m") as stream:
        fake.models["m"], fake.beat_error = "UNLOADING", "Request for unknown model: 'm' has no available versions"
        await until(lambda: not health.served())
        with pytest.raises(ModelNotFound):
            await ready(health, "m")
        assert stream.error is None
        await until(lambda: stream.error is not None)
    assert "unloaded" in str(stream.error) and gone == ["m"]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await triton.close()


async def test_a_model_loaded_beside_others_takes_no_readiness_away(health: Health, fake: FakeTriton) -> None:
    """It counts from its first heartbeat on, good or bad."""
    await ready(health, "m")
    await asyncio.sleep(1.0)
    fake.models["new"] = "READY"
    unready = []
    await asyncio.gather(health.find("new"), until(lambda: unready.append(not health.ready) or health.serves("new")))
    assert not any(unready) and len(health.served()) == 2
    fake.beat_error = "Stub process is not healthy"
    await until(lambda: not health.ready)


async def test_version_and_digest_change_in_one_step(health: Health, fake: FakeTriton) -> None:
    """What the cache's key is made of never has one version's number and another's digest."""
    fake.beat["digest"] = "first"
    await ready(health, "m")
    await until(lambda: health.served()[0].model.digest == "first")
    seen = set()

    def moved() -> bool:
        model = health.served()[0].model
        seen.add((model.version, model.digest))
        return model.digest == "second"

    fake.beat["digest"], fake.version = "second", "2"
    await until(moved)
    assert seen <= {("1", "first"), ("2", "second")} and health.ready


@pytest.mark.parametrize("digest", ["", "second"])
async def test_a_reload_that_an_answer_tells_of_is_read_once(fake: FakeTriton, digest: str) -> None:
    """Whoever is answered by a version that no heartbeat has told of reads it anew, all who are at once together."""
    fake.beat["digest"] = digest and "first"
    triton = Triton(fake.url, Deadlines(heartbeat_s=0.3))
    health = Health(triton, interval_s=60.0, engine_stall_s=5.0)
    known = await ready(health, "m")
    await until(lambda: fake.calls.count("POST /v2/models/m/generate") == 2)  # of who found it, and of its watch
    fake.version, fake.beat["digest"], fake.parameters["max_len"] = "2", digest, "32"
    fake.calls.clear()
    found = await asyncio.gather(*(health.renew(known) for _ in range(10)))
    assert {(model.version, model.digest, model.max_len, model.ready) for model in found} == {("2", digest, 32, True)}
    assert fake.calls.count("POST /v2/models/m/generate") == 1
    for served in health.served():
        served.task.cancel()
    await triton.close()


async def test_triton_away_is_not_a_missing_model() -> None:
    """While Triton cannot be asked, no model is said not to exist."""
    async with FakeTriton() as fake:
        url = fake.url
    triton = Triton(url, Deadlines(heartbeat_s=0.3))
    with pytest.raises(UpstreamUnavailable, match="Triton does not answer"):
        await ready(Health(triton, interval_s=0.03, engine_stall_s=5.0), "m")
    await triton.close()
