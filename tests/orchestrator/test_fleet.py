"""Several servers as one: what they serve together, who is asked, who rests, who joins and who leaves."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from orchestrator.domain import GenerateRequest
from orchestrator.errors import Draining, ModelNotFound, UpstreamUnavailable
from orchestrator.fleet import Fleet, Member, Visit
from orchestrator.triton import Deadlines

from .conftest import until
from .fake_triton import FakeTriton
from .fleets import fakes, fleet_of, running


@pytest.fixture
async def pair() -> AsyncIterator[list[FakeTriton]]:
    async with fakes(2) as both:
        yield both


def urls(*those: FakeTriton) -> list[str]:
    return [fake.url for fake in those]


def states(fleet: Fleet) -> dict[str, str]:
    return {state.url: state.state for state in fleet.states()}


def asked(fleet: Fleet, count: int = 20, **how: Any) -> Counter[str]:
    """Which servers so many requests go to, one after the other."""
    seen: Counter[str] = Counter()
    for _ in range(count):
        with fleet.attend("m", **how) as visit:
            seen[visit.member.url] += 1
    return seen


def member(fleet: Fleet, fake: FakeTriton) -> Member:
    return next(one for one in fleet.members if one.url == fake.url)


class Names:
    """A DNS whose names have the ports of fakes: each server is 127.0.0.N at one port, or what it is told."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)

    async def __call__(self, host: str, port: int) -> list[tuple[Any, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.addresses]


async def test_outstanding_requests_are_shared(pair: list[FakeTriton]) -> None:
    """Requests that run at the same time are as many at each server, and one more goes to who has fewer."""
    async with running(fleet_of(*urls(*pair))) as fleet:
        visits = [fleet.attend("m").__enter__() for _ in range(10)]
        assert [state.outstanding for state in fleet.states()] == [5, 5]
        first = visits[0].member
        for visit in visits:
            if visit.member is first:
                visit.__exit__(None, None, None)
        assert set(asked(fleet)) == {first.url}
        for visit in visits:
            if visit.member is not first:
                visit.__exit__(None, None, None)
        assert len(asked(fleet, 40)) == 2, "of servers that are as idle any is asked"


async def test_one_server_is_as_it_says(fake: FakeTriton) -> None:
    """With one server nothing is put together: its health's own answers are the fleet's."""
    async with running(fleet_of(fake.url)) as fleet:
        health = fleet.members[0].health
        assert fleet.served() == health.served() and fleet.served()[0] is health.served()[0]
        assert fleet.ready and fleet.triton_up and fleet.serves("m")
        with fleet.attend("m") as visit:
            fleet.fail_all(Draining())
            assert isinstance(visit.attendance.error, Draining)
        with pytest.raises(UpstreamUnavailable), fleet.attend("m"):
            raise UpstreamUnavailable("the connection was lost", server=True)
        assert states(fleet) == {fake.url: "ready"}, "nobody could take its place: it does not rest"
        with pytest.raises(ModelNotFound):
            await fleet.find("ghost")
        assert not fleet.another("m", [])


async def test_what_is_served_together(pair: list[FakeTriton]) -> None:
    """A model is ready if any server has it ready, its loads are summed, and who is not well is named."""
    one, other = pair
    one.beat |= {"running": 2, "waiting": 1, "device": "cpu"}
    other.beat |= {"running": 3, "waiting": 0, "busy": True, "step_age_s": 0.5, "device": "cuda"}
    other.models["more"] = "READY"
    async with running(fleet_of(*urls(*pair))) as fleet:
        await until(lambda: all(served.model.ready for served in fleet.served()) and len(fleet.served()) == 2)
        served = {row.model.name: row for row in fleet.served()}
        beat = served["m"].beat
        assert beat is not None and served["m"].detail == "ready"
        assert (beat.running, beat.waiting, beat.slots, beat.busy, beat.step_age_s) == (5, 1, 8, True, 0.5)
        assert set(beat.device.split(", ")) == {"cpu", "cuda"}
        assert fleet.ready and await fleet.find("more")
        one.beat_error = "Stub process 'm' is not healthy."
        await until(lambda: "not ready at" in fleet.served()[0].detail)
        assert fleet.served()[0].model.ready and one.url in fleet.served()[0].detail and fleet.ready
        assert set(asked(fleet)) == {other.url}
        other.beat_error = "Stub process 'm' is not healthy."
        await until(lambda: not fleet.require("m").ready)
        assert not fleet.ready
        with pytest.raises(UpstreamUnavailable, match="not healthy") as raised:
            fleet.attend("m")
        assert all(url in str(raised.value) for url in urls(*pair))
        assert not (await fleet.find("m")).ready


async def test_a_model_that_only_a_lost_server_had_is_not_ready(pair: list[FakeTriton]) -> None:
    """Readiness is about every model that was judged: one more server that is away changes nothing, its own model."""
    one, other = pair
    async with running(fleet_of(*urls(*pair))) as fleet:
        await other.stop()
        await until(lambda: states(fleet)[other.url] == "down")
        assert fleet.ready and fleet.triton_up
        await other.start(other.port)
        other.models["own"] = "READY"
        await until(lambda: fleet.serves("own") and fleet.ready)
        await other.stop()
        await until(lambda: not fleet.ready)
        assert fleet.triton_up and (await fleet.find("m")).ready
        await one.stop()
        await until(lambda: not fleet.triton_up)
        await one.start(one.port)
        await other.start(other.port)


async def test_an_unknown_model_is_looked_for_everywhere(pair: list[FakeTriton]) -> None:
    """One that was just loaded at one server is found; none of a name is 404, unless nobody can be asked."""
    async with running(fleet_of(*urls(*pair), interval_s=0.2)) as fleet:
        await asyncio.sleep(1.0)
        pair[1].models["new"] = "READY"
        assert (await fleet.find("new")).name == "new"
        with pytest.raises(ModelNotFound):
            await fleet.find("ghost")
        for fake in pair:
            await fake.stop()
        await until(lambda: not fleet.triton_up)
        assert not (await fleet.find("ghost")).ready
        with pytest.raises(UpstreamUnavailable):
            fleet.require("ghost")
        for fake in pair:
            await fake.start(fake.port)


def lose(fleet: Fleet, at: Member) -> None:
    """One request finds this server dead."""
    with pytest.raises(UpstreamUnavailable), Visit(at, at.health.attend("m"), fleet._failed):
        raise UpstreamUnavailable("the connection was lost", server=True)


async def test_a_server_that_failed_rests_and_comes_back(
    pair: list[FakeTriton], caplog: pytest.LogCaptureFixture
) -> None:
    """One lost connection takes it out before any heartbeat says so; after a rest and a heartbeat it is asked anew."""
    async with running(fleet_of(*urls(*pair))) as fleet:
        out = member(fleet, pair[0])
        lose(fleet, out)
        assert states(fleet)[out.url] == "ejected" and set(asked(fleet)) == {pair[1].url}
        assert f"{out.url} rests for 0.3 s: the connection was lost" in caplog.text
        assert f"{out.url} failed and rests" in fleet.served()[0].detail and fleet.served()[0].model.ready
        await until(lambda: states(fleet)[out.url] == "ready")
        assert len(asked(fleet, 40)) == 2
        lose(fleet, out)
        assert out.ejection.rest_s == 0.6


async def test_ejection_leaves_nobody_without_a_server(pair: list[FakeTriton]) -> None:
    """While all of them rest, those that answer heartbeats are used all the same."""
    async with running(fleet_of(*urls(*pair), eject_s=30.0)) as fleet:
        for one in fleet.members:
            lose(fleet, one)
        assert set(states(fleet).values()) == {"ejected"} and fleet.ready
        assert len(asked(fleet, 40)) == 2 and not fleet.another("m", [])
        await pair[0].stop()
        await until(lambda: states(fleet)[pair[0].url] == "down")
        assert set(asked(fleet)) == {pair[1].url}
        await pair[0].start(pair[0].port)


@pytest.mark.parametrize("error", [UpstreamUnavailable("m was unloaded"), Draining(), ValueError("a fault")])
async def test_what_is_not_the_servers_fault_ejects_nobody(pair: list[FakeTriton], error: Exception) -> None:
    """A model that is being reloaded, a gateway that stops, a fault of ours: the server goes on."""
    async with running(fleet_of(*urls(*pair))) as fleet:
        with pytest.raises(type(error)), fleet.attend("m"):
            raise error
        assert set(states(fleet).values()) == {"ready"}


@pytest.mark.parametrize("fault", ["killed", "stopped"])
async def test_a_silent_server_is_found_by_its_heartbeat(pair: list[FakeTriton], fault: str) -> None:
    """Nobody's request has to die for a dead or stopped server to be left alone, and it has to rest as well."""
    async with running(fleet_of(*urls(*pair), deadlines=Deadlines(connect_s=0.5, heartbeat_s=0.4))) as fleet:
        out = member(fleet, pair[0])
        if fault == "killed":
            await pair[0].stop()
        else:
            pair[0].stopped = True
        await until(lambda: states(fleet)[out.url] == "down")
        assert out.resting and out.ejection.rest_s == 0.3
        assert set(asked(fleet)) == {pair[1].url}
        pair[0].stopped = False
        if fault == "killed":
            await pair[0].start(pair[0].port)
        await until(lambda: states(fleet)[out.url] == "ready")


async def test_versions_side_by_side(pair: list[FakeTriton]) -> None:
    """While servers are reloaded one by one, the version that most have is what is served, of as many the newer; who
    needs one version is sent to who has it.
    """
    async with fakes(1) as (third,), running(fleet_of(*urls(*pair, third))) as fleet:
        for fake, version in zip((*pair, third), "112", strict=True):
            fake.config_facts["version"] = version
        third.version, third.beat["digest"] = "2", "d2"
        newer = member(fleet, third)
        await until(lambda: newer.health.served()[0].model.version == "2")
        assert (await fleet.find("m")).version == "1" and fleet.require("m").version == "1"
        assert f"version 2 at {third.url}" in fleet.served()[0].detail
        assert set(asked(fleet, version="1")) == {fake.url for fake in pair}
        assert set(asked(fleet, version="2")) == {third.url}
        assert set(asked(fleet, 60)) == {fake.url for fake in (*pair, third)}, "any will do where none is named"
        assert asked(fleet, 60, version="3").total() == 60
        for _ in range(6):
            assert (await fleet.describe("m", "", "config"))["version"] == "1"
        assert (await fleet.describe("m", "2", "config"))["version"] == "2"
        pair[0].version = pair[0].beat["digest"] = "2"
        await until(lambda: fleet.require("m").version == "2")


async def test_a_reload_that_an_answer_tells_of_is_read_at_once(pair: list[FakeTriton]) -> None:
    """Without waiting for a heartbeat, the versions of all servers are known after `renew`."""
    async with running(fleet_of(*urls(*pair), interval_s=60.0)) as fleet:
        known = fleet.require("m")
        for fake in pair:
            fake.version, fake.beat["digest"] = "2", "d2"
        assert (await fleet.renew(known)).version == "2"


async def test_drained_servers_get_nothing_new(pair: list[FakeTriton]) -> None:
    """What runs there goes on, and afterwards requests come again; with all drained nothing is ready."""
    async with running(fleet_of(*urls(*pair))) as fleet:
        one, other = fleet.members
        with Visit(one, one.health.attend("m"), fleet._failed) as visit:
            fleet.drain({one.url})
            assert states(fleet)[one.url] == "draining" and set(asked(fleet)) == {other.url}
            await asyncio.sleep(0.1)
            assert visit.attendance.error is None and fleet.ready
        fleet.drain({one.url, other.url})
        assert not fleet.ready and not (await fleet.find("m")).ready
        with pytest.raises(UpstreamUnavailable, match="is drained"):
            fleet.attend("m")
        fleet.drain(frozenset())
        assert fleet.ready and len(asked(fleet, 40)) == 2


async def test_a_sole_server_can_be_drained(fake: FakeTriton) -> None:
    """It is refused with a reason, and not asked all the same."""
    async with running(fleet_of(fake.url)) as fleet:
        fleet.drain({fake.url})
        with pytest.raises(UpstreamUnavailable, match="is drained"):
            fleet.attend("m")
        assert not fleet.ready and fleet.serves("m")


async def test_prompts_that_begin_alike_go_to_one_server(pair: list[FakeTriton]) -> None:
    """With prefix affinity: always where it is on, never where it is off, and for a model that reuses prefixes."""
    asks = GenerateRequest(id="r", model="m", accepted_at=0.0, text="Hola")
    for affinity, wanted in (("on", True), ("off", False), ("auto", False)):
        async with running(fleet_of(*urls(*pair), affinity=affinity)) as fleet:
            key = fleet.key(asks)
            assert (key is not None) == wanted
            assert len(asked(fleet, 40, key=key)) == (1 if wanted else 2)
    for fake in pair:
        fake.parameters["prefix_reuse"] = "true"
    async with running(fleet_of(*urls(*pair))) as fleet:
        assert (key := fleet.key(asks)) is not None
        (own,) = asked(fleet, 40, key=key)
        first = next(one for one in fleet.members if one.url == own)
        first.outstanding = 10
        assert set(asked(fleet, key=key)) == {one.url for one in fleet.members} - {own}
        first.outstanding = 0
    async with running(fleet_of(pair[0].url, affinity="on")) as fleet:
        assert fleet.key(asks) is None, "one server: there is no choice"


async def test_a_name_that_cannot_be_looked_up_at_the_start(fake: FakeTriton) -> None:
    """The gateway lives and is not ready; it is as soon as the name has an address."""
    dns = Names()
    async with running(fleet_of(f"http://triton:{fake.port}", look_up=dns), 0) as fleet:
        await until(lambda: fleet.lookup_failures > 1)
        assert not fleet.ready and not fleet.triton_up and fleet.states() == [] and fleet.served() == []
        assert not (await fleet.find("m")).ready
        with pytest.raises(UpstreamUnavailable):
            fleet.require("m")
        with pytest.raises(UpstreamUnavailable, match="no Triton server is known"):
            fleet.attend("m")
        with pytest.raises(UpstreamUnavailable):
            await fleet.describe("m", "", "config")
        dns.addresses = ["127.0.0.1"]
        await until(lambda: fleet.ready)
        dns.addresses = []
        await asyncio.sleep(0.1)
        assert fleet.ready, "a DNS that forgets takes nobody away"


async def test_servers_join_and_leave_with_their_name(caplog: pytest.LogCaptureFixture) -> None:
    """A new address takes requests once its model answers; one that is gone takes no more, and what runs there ends."""
    caplog.set_level(logging.INFO)
    port = 0
    async with fakes(1) as (one,):
        port = one.port
        late = FakeTriton()
        late.models = {"m": "LOADING"}
        server = await asyncio.start_server(late._connection, "127.0.0.2", port)
        late._server = server
        try:
            dns = Names("127.0.0.1")
            async with running(fleet_of(f"http://triton:{port}", look_up=dns), 1) as fleet:
                dns.addresses.append("127.0.0.2")
                second = f"http://127.0.0.2:{port}"
                await until(lambda: len(fleet.members) == 2)
                assert fleet.ready and set(asked(fleet)) == {one.url}
                late.models = {"m": "READY", "own": "READY"}
                await until(lambda: states(fleet).get(second) == "ready")
                assert fleet.ready and len(asked(fleet, 40)) == 2
                gone: list[str] = []
                fleet.on_gone.append(gone.append)
                leaver = fleet.members[1]
                with Visit(leaver, leaver.health.attend("m"), fleet._failed) as visit:
                    dns.addresses.pop()
                    await until(lambda: len(fleet.members) == 1)
                    assert states(fleet)[second] == "draining" and set(asked(fleet)) == {one.url}
                    assert gone == ["own"], "the other model is still served"
                    await asyncio.sleep(0.1)
                    assert visit.attendance.error is None
                assert second not in states(fleet)
                assert leaver.task is not None and await until(leaver.task.done) < 5.0
                assert f"{second} has joined" in caplog.text and f"{second} has left: 1 requests" in caplog.text
        finally:
            await late.stop()


async def test_a_server_that_comes_back_while_it_leaves_is_the_same(pair: list[FakeTriton]) -> None:
    """DNS that flickers cuts nothing off: the one that was leaving takes requests again."""
    dns = Names("127.0.0.1")
    async with running(fleet_of(f"http://triton:{pair[0].port}", pair[1].url, look_up=dns), 2) as fleet:
        out = member(fleet, pair[0])
        with Visit(out, out.health.attend("m"), fleet._failed):
            dns.addresses = ["127.0.0.9"]
            await until(lambda: out.leaving)
            dns.addresses = ["127.0.0.1"]
            await until(lambda: not out.leaving)
        assert member(fleet, pair[0]) is out and out.task is not None and not out.task.done()
        assert len(asked(fleet, 40)) == 2


async def test_a_thousand_joins_and_leaves_leave_nothing(fake: FakeTriton) -> None:
    """Neither tasks nor connections nor members of servers that have left are there afterwards."""
    async with running(fleet_of(fake.url)) as fleet:
        entry = fleet._roster._resolver.servers
        other = type(entry[0])("127.0.0.1", 9)  # the discard port: nobody listens
        await asyncio.sleep(0.1)
        before = len(asyncio.all_tasks())
        for _ in range(1000):
            fleet._roster._settle((*entry, other))
            if _ % 100 == 0:
                await asyncio.sleep(0.05)  # so that it has begun to watch it
            fleet._roster._settle(entry)
            await asyncio.sleep(0)
        await until(lambda: len(asyncio.all_tasks()) <= before)
        assert fleet._roster._leaving == {} and fleet._roster._closing == set()
        gc.collect()
        assert len([one for one in gc.get_objects() if type(one) is Member]) == 1
        await until(lambda: len(fake._writers) <= 4)
        assert fleet.ready


async def test_a_model_is_described_by_who_serves_it(pair: list[FakeTriton]) -> None:
    """By a server that has it ready, also while another is dead and nobody has noticed."""
    pair[1].models = {"other": "READY"}
    async with running(fleet_of(*urls(*pair))) as fleet:
        assert (await fleet.describe("m", "", "config"))["name"] == "m"
        assert (await fleet.describe("other", "", "config"))["name"] == "other"
        pair[1].models = dict(pair[0].models)
    async with running(fleet_of(*urls(*pair), interval_s=60.0)) as fleet:
        await pair[0].stop()
        for _ in range(6):
            assert (await fleet.describe("m", "", "config"))["name"] == "m"
        await pair[0].start(pair[0].port)
