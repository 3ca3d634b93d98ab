"""The watcher: figures become alerts in the book and messages at real servers, with Redis and disk or without."""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.metrics_table import TABLE
from orchestrator.monitor import alertbook
from orchestrator.monitor.alerts import Acknowledged, Alert, Document
from orchestrator.monitor.notifier import Notifier
from orchestrator.monitor.watcher import Watcher
from orchestrator.settings import Settings
from orchestrator.store import Store, told_key
from tests.clock import awake
from tests.disks import small_disk
from tests.orchestrator.conftest import until
from tests.orchestrator.monitor.receivers import Receiver, mute, receiving
from tests.orchestrator.monitor.test_conditions import WELL
from tests.redis import RealRedis


class Deployment:
    """Figures that a test changes, a clock that it turns, and settings with short intervals."""

    def __init__(self, home: Path, receiver: Receiver | None = None, **changes: Any) -> None:
        url = None if receiver is None else receiver.url
        self.settings = replace(
            Settings(), home=home, alert_interval_s=0.2, alert_webhook_url=url, **{"alert_timeout_s": 20.0, **changes}
        )
        self.figures: dict[str, Any] = dict(WELL)
        self.at = 1_795_717_800.0
        self.made: list[Watcher] = []

    def watcher(self, store: Store | None = None, host: str = "node-1") -> Watcher:
        """With intervals as in production and looks by hand: `look`."""
        settings = replace(self.settings, alert_interval_s=10.0)
        made = Watcher(
            settings,
            lambda: self.figures,
            Notifier(settings, pause_s=0.05),
            store,
            lambda: self.at,
            lambda: self.at,
            host,
        )
        self.made.append(made)
        return made

    async def looks(self, watcher: Watcher, seconds: float) -> None:
        """Look every ten seconds, for so long by the clock that is turned."""
        until_s = self.at + seconds
        while self.at < until_s:
            await watcher.look()
            self.at += 10

    def book(self) -> Document:
        return alertbook.read(self.settings.home)

    def states(self) -> dict[str, str]:
        return {alert.name: alert.state for alert in self.book().alerts.values()}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as running:
        yield running


@asynccontextmanager
async def watching(watcher: Watcher) -> AsyncIterator[None]:
    task = asyncio.create_task(watcher.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def store_of(server: RealRedis) -> AsyncIterator[Store]:
    store = Store(server.url, 5.0)
    task = asyncio.create_task(store.run())
    try:
        await until(lambda: store.up)
        yield store
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_an_alert_fires_and_is_resolved(tmp_path: Path, receiver: Receiver) -> None:
    """Watched for real: the webhook gets both messages, the book has both states, the series count them."""
    place = Deployment(tmp_path / "home", receiver)
    watcher = Watcher(place.settings, lambda: place.figures, Notifier(place.settings))
    async with watching(watcher):
        place.figures = {**WELL, "audit_up": False}
        await until(lambda: receiver.seen == [("firing", "TruthGPTAuditAway")], 20)
        assert place.states() == {"TruthGPTAuditAway": "firing"} and watcher.counts() == {"firing": 1, "critical": 1}
        readings = {name: dict(read()) for name, read in watcher.readings().items()}
        assert readings["truthgpt_alerts_firing"] == {("critical",): 1.0, ("warning",): 0.0}
        for name, values in readings.items():
            assert values and all(len(labels) == len(TABLE[name].labels) for labels in values)
        place.figures = WELL
        await until(lambda: len(receiver.seen) == 2, 30)
        assert receiver.seen[1] == ("resolved", "TruthGPTAuditAway") and watcher.counts()["firing"] == 0
        await until(lambda: _told(place) == [{"webhook": "ok"}], 20)
        assert watcher.readings()["truthgpt_notifications_total"]()["webhook", "ok"] == 2


def _told(place: Deployment) -> list[dict[str, str]]:
    return [{sender: told.outcome for sender, told in a.told.items()} for a in place.book().alerts.values()]


async def test_a_restart_tells_nothing_twice(tmp_path: Path, receiver: Receiver) -> None:
    """The next process finds in the book what was told, goes on with what fires, and tells its end."""
    place = Deployment(tmp_path, receiver)
    place.figures = {**WELL, "audit_up": False}
    first = place.watcher()
    async with watching(first):
        await until(lambda: _told(place) == [{"webhook": "ok"}], 20)
    place.at += 500
    second = place.watcher()
    await place.looks(second, 200)
    assert receiver.seen == [("firing", "TruthGPTAuditAway")]
    place.figures = WELL
    await place.looks(second, 100)
    await until(lambda: len(receiver.seen) == 2, 20)
    assert receiver.seen[1][0] == "resolved"
    second._notifier.close()


async def test_replicas_agree_through_redis(tmp_path: Path, receiver: Receiver) -> None:
    """Of two hosts with one Redis one tells that the deployment's alert fires, and the last one that it is resolved;
    a machine's own alert is told by each.
    """
    one, other = (Deployment(tmp_path / name, receiver) for name in "ab")
    with RealRedis() as server:
        async with store_of(server) as store:
            watchers = [one.watcher(store, "node-1"), other.watcher(store, "node-2")]
            for place in (one, other):
                place.figures = {**WELL, "audit_up": False, "jobs": [{"name": "logs", "failing": True}]}
            for place, watcher in zip((one, other), watchers, strict=True):
                await place.looks(watcher, 30)
            await until(lambda: len(receiver.seen) == 3, 20)
            assert sorted(receiver.seen) == [("firing", "TruthGPTAuditAway")] * 2 + [("firing", "TruthGPTJobFailing")]
            one.figures = {**WELL, "audit_up": False}
            await one.looks(watchers[0], 100)
            await other.looks(watchers[1], 100)
            assert one.states()["TruthGPTJobFailing"] == "resolved" and len(receiver.seen) == 3
            other.figures = {**WELL, "audit_up": False}
            await other.looks(watchers[1], 100)
            await until(lambda: len(receiver.seen) == 4, 20)
            assert receiver.seen[3] == ("resolved", "TruthGPTJobFailing")
            assert receiver.requests[3].json["instance"] == "node-2"
            for watcher in watchers:
                watcher._notifier.close()


async def test_a_replica_that_is_gone_holds_up_nobody(tmp_path: Path, receiver: Receiver) -> None:
    """The one that told that it fires dies; the other tells the end once, and all that fires afterwards."""
    one, other = (Deployment(tmp_path / name, receiver) for name in "ab")
    failing = {**WELL, "jobs": [{"name": "logs", "failing": True}]}
    one.figures = other.figures = failing
    with RealRedis() as server:
        async with store_of(server) as store:
            first, second = one.watcher(store, "node-1"), other.watcher(store, "node-2")
            await one.looks(first, 20)
            await other.looks(second, 20)
            other.figures = WELL
            await other.looks(second, 100)
            assert other.states() == {"TruthGPTJobFailing": "resolved"}
            key = told_key(one_of(one).id)
            assert await store.call("HSET", key, f"on:{first._replica}", "1") == 0  # what it said counts no longer
            for figures in (WELL, failing, WELL):
                other.figures = figures
                await other.looks(second, 100)
            await until(lambda: len(receiver.seen) == 4, 20)
            assert [status for status, _ in receiver.seen] == ["firing", "resolved", "firing", "resolved"]
            assert [request.json["instance"] for request in receiver.requests] == ["node-1"] + ["node-2"] * 3
            for watcher in (first, second):
                watcher._notifier.close()


async def test_a_word_is_renewed_while_it_fires(tmp_path: Path, receiver: Receiver) -> None:
    """Every twenty seconds whoever still sees it fire says so again; who sees it no longer says nothing."""
    one, other = (Deployment(tmp_path / name, receiver) for name in "ab")
    one.figures = other.figures = {**WELL, "jobs": [{"name": "logs", "failing": True}]}
    with RealRedis() as server:
        async with store_of(server) as store:
            first, second = one.watcher(store, "node-1"), other.watcher(store, "node-2")
            await one.looks(first, 20)
            await other.looks(second, 20)
            other.figures = WELL
            await other.looks(second, 100)
            key, words = told_key(one_of(one).id), [f"on:{each._replica}" for each in (first, second)]
            assert [word is None for word in await store.call("HMGET", key, *words)] == [False, True]
            await store.call("HSET", key, words[0], "1")
            await one.looks(first, 20)
            await said(store, key, words[0])
            await other.looks(second, 30)
            assert await store.call("HGET", key, words[1]) is None
            assert receiver.seen == [("firing", "TruthGPTJobFailing")]
            for watcher in (first, second):
                watcher._notifier.close()


async def said(store: Store, key: str, word: str) -> None:
    """Wait until a word that was over is renewed."""
    for _ in range(2000):
        if await store.call("HGET", key, word) != b"1":
            return
        await asyncio.sleep(0.01)
    raise AssertionError("nobody has renewed it")


def one_of(place: Deployment) -> Alert:
    (alert,) = place.book().alerts.values()
    return alert


async def test_replicas_repeat_it_together(tmp_path: Path, receiver: Receiver) -> None:
    """A deployment's alert that still fires is repeated by one of two hosts, not by both."""
    one, other = (Deployment(tmp_path / name, receiver, alert_repeat_s=600.0) for name in "ab")
    with RealRedis() as server:
        async with store_of(server) as store:
            watchers = [one.watcher(store, "node-1"), other.watcher(store, "node-2")]
            for place in (one, other):
                place.figures = {**WELL, "jobs": [{"name": "logs", "failing": True}]}
            for _ in range(130):  # 1300 seconds
                for place, watcher in zip((one, other), watchers, strict=True):
                    await watcher.look()
                    place.at += 10
                await asyncio.sleep(0)
            await until(lambda: len(receiver.seen) == 3, 20)
            await asyncio.sleep(0.3)
            assert [request.json["repeated"] for request in receiver.requests] == [False, True, True]
            for watcher in watchers:
                watcher._notifier.close()


async def test_without_redis_each_replica_tells(tmp_path: Path, receiver: Receiver) -> None:
    """A Redis that does not answer is no reason not to tell: here of itself."""
    places = [Deployment(tmp_path / name, receiver) for name in "ab"]
    with RealRedis() as server:
        async with store_of(server) as store:
            server.kill()
            await until(lambda: not store.up)
            for place, host in zip(places, ("node-1", "node-2"), strict=True):
                place.figures = {**WELL, "redis_up": False}
                watcher = place.watcher(store, host)
                await place.looks(watcher, 30)
            await until(lambda: len(receiver.seen) == 2, 20)
    assert receiver.seen == [("firing", "TruthGPTRedisAway")] * 2
    for place in places:
        place.made[0]._notifier.close()


async def test_a_command_and_the_watcher_change_the_book_together(tmp_path: Path, receiver: Receiver) -> None:
    """What is acknowledged by a command stays so and is not repeated; what is cleared fires and is told again."""
    place = Deployment(tmp_path, receiver, alert_repeat_s=60.0)
    place.figures = {**WELL, "audit_up": False}
    watcher = place.watcher()
    await place.looks(watcher, 10)

    def acknowledge(document: Document) -> None:
        for alert in document.alerts.values():
            alert.acknowledged = Acknowledged("ana", place.at)

    alertbook.change(tmp_path, acknowledge)
    await place.looks(watcher, 300)
    (alert,) = place.book().alerts.values()
    assert alert.acknowledged is not None and len(receiver.seen) == 1
    alertbook.change(tmp_path, lambda document: document.alerts.clear())
    await watcher.look()
    await until(lambda: len(receiver.seen) == 2, 20)
    ids = {request.json["id"] for request in receiver.requests}
    assert len(ids) == 2 and {status for status, _ in receiver.seen} == {"firing"}
    watcher._notifier.close()


async def test_a_sender_that_fails_is_an_alert(tmp_path: Path) -> None:
    """A webhook that gives up is told of by Slack, and is well again after a message has arrived."""
    with receiving(400, 200) as webhook, receiving() as slack:
        place = Deployment(tmp_path, webhook, alert_slack_url=slack.url)
        place.figures = {**WELL, "audit_up": False}
        watcher = Watcher(place.settings, lambda: place.figures, Notifier(place.settings))
        async with watching(watcher):
            await until(lambda: "TruthGPTNotificationsFailing" in place.states(), 20)
            await until(lambda: any("NotificationsFailing" in r.json["text"] for r in slack.requests), 20)
            await until(lambda: place.states().get("TruthGPTNotificationsFailing") == "resolved", 30)
        assert watcher.readings()["truthgpt_notifications_total"]()["webhook", "error"] == 1


async def test_a_hanging_sender_does_not_hold_up_the_watcher(tmp_path: Path) -> None:
    """While the only sender hangs the looks go on, and the loop is never held up."""
    with mute() as port:
        place = Deployment(tmp_path, alert_slack_url=f"http://127.0.0.1:{port}/", alert_timeout_s=30.0)
        place.figures = {**WELL, "audit_up": False}
        watcher = Watcher(place.settings, lambda: place.figures, Notifier(place.settings))
        async with watching(watcher):
            await until(lambda: place.states() == {"TruthGPTAuditAway": "firing"}, 10)
            place.figures = {**WELL, "audit_up": False, "jobs": [{"name": "logs", "failing": True}]}
            await until(lambda: len(place.states()) == 2, 10)
            slowest = 0.0
            for _ in range(100):
                began = awake()
                await asyncio.sleep(0.005)
                slowest = max(slowest, awake() - began)
            assert slowest < 0.5
        began = awake()
    assert awake() - began < 5


@pytest.mark.parametrize("ticks", range(5))
async def test_it_ends_when_it_is_cancelled(tmp_path: Path, ticks: int) -> None:
    """Also when it is cancelled in the moment in which a sender has something to say."""
    place = Deployment(tmp_path)
    settings = replace(place.settings, alert_interval_s=3600.0)
    watcher = Watcher(settings, lambda: place.figures, Notifier(settings))
    task = asyncio.create_task(watcher.run())
    await until(lambda: (tmp_path / alertbook.NAME).exists(), 20)
    await asyncio.sleep(0.1)
    watcher._heard.set()
    for _ in range(ticks):
        await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=10)
    assert done == {task} and task.cancelled()


async def test_figures_that_cannot_be_had(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are one line in the log, whatever fires stays, and all goes on once they are there again."""
    place = Deployment(tmp_path)
    place.figures = {**WELL, "audit_up": False}
    watcher = place.watcher()
    await place.looks(watcher, 10)
    good, watcher._figures = watcher._figures, lambda: {}["no"]
    with caplog.at_level(logging.ERROR):
        await place.looks(watcher, 300)
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1 and place.states() == {"TruthGPTAuditAway": "firing"}
    watcher._figures = good
    place.figures = WELL
    await place.looks(watcher, 100)
    assert place.states() == {"TruthGPTAuditAway": "resolved"}


async def test_a_fault_does_not_end_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What nobody thought of is logged once, and the watcher goes on."""
    place = Deployment(tmp_path)
    watcher = Watcher(place.settings, lambda: place.figures, Notifier(place.settings))
    place.figures = [1]  # type: ignore[assignment]
    async with watching(watcher):
        await until(lambda: any("cannot be looked at" in record.message for record in caplog.records), 20)
        await asyncio.sleep(0.5)
        place.figures = {**WELL, "audit_up": False}
        await until(lambda: place.states() == {"TruthGPTAuditAway": "firing"}, 20)
    assert sum("cannot be looked at" in record.message for record in caplog.records) == 1


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "small", "64k") as folder:
        yield folder


async def test_on_a_full_disk_alerts_go_on(small: Path, receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    """With no room for the book each alert is told once all the same, and the book is written once there is room."""
    place = Deployment(small, receiver)
    watcher = place.watcher()
    await watcher.look()
    ballast = small / "ballast"
    with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(b"x" * 4096)
    place.figures = {**WELL, "audit_up": False}
    with caplog.at_level(logging.ERROR, "orchestrator.monitor.watcher"):
        await place.looks(watcher, 100)
    await until(lambda: len(receiver.seen) == 1, 20)
    assert sum("cannot be kept" in record.message for record in caplog.records) == 1
    assert place.states() == {}
    figures = watcher.figures()
    assert (figures["names"], figures["unwritten"]) == (["TruthGPTAuditAway"], "No space left on device")
    ballast.unlink()
    await place.looks(watcher, 30)
    assert place.states() == {"TruthGPTAuditAway": "firing"} and len(receiver.seen) == 1
    assert watcher.figures() == {"firing": 1, "critical": 1, "names": ["TruthGPTAuditAway"], "unwritten": None}
    watcher._notifier.close()


async def test_a_lock_that_is_held_holds_up_nothing(tmp_path: Path, receiver: Receiver) -> None:
    """While another process sits on the lock alerts are told from memory; then the book has them."""
    place = Deployment(tmp_path, receiver)
    watcher = place.watcher()
    await watcher.look()
    place.figures = {**WELL, "audit_up": False}
    with (tmp_path / alertbook.LOCK).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        await place.looks(watcher, 20)
        await until(lambda: receiver.seen == [("firing", "TruthGPTAuditAway")], 20)
        assert place.states() == {}
    await place.looks(watcher, 20)
    assert place.states() == {"TruthGPTAuditAway": "firing"} and len(receiver.seen) == 1
    watcher._notifier.close()


async def test_a_disk_that_hangs_holds_up_nothing(tmp_path: Path, receiver: Receiver) -> None:
    """While the book cannot even be opened alerts are told from memory, and the loop runs; then the book has them."""
    place = Deployment(tmp_path, receiver)
    os.mkfifo(tmp_path / alertbook.NAME)  # to open it waits for somebody who writes
    place.figures = {**WELL, "audit_up": False}
    watcher = Watcher(place.settings, lambda: place.figures, Notifier(place.settings))
    async with watching(watcher):
        slowest, began = 0.0, awake()
        while not receiver.seen:
            assert awake() - began < 20
            before = awake()
            await asyncio.sleep(0.01)
            slowest = max(slowest, awake() - before)
        assert slowest < 1.0 and watcher.counts()["firing"] == 1
        with (tmp_path / alertbook.NAME).open("wb"):
            pass  # whoever waited reads an empty book, which is none
        await until(lambda: (tmp_path / "alerts.json.corrupt").exists() and bool(_told(place)), 20)
        await until(lambda: _told(place) == [{"webhook": "ok"}], 20)
        await asyncio.sleep(0.5)
    assert receiver.seen == [("firing", "TruthGPTAuditAway")]


async def test_no_secret_is_in_a_log_or_the_book(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """URLs and passwords of senders that fail are neither logged nor written."""
    caplog.set_level(logging.DEBUG)
    with receiving(500) as receiver:
        place = Deployment(
            tmp_path, receiver, alert_slack_url="http://ana:s3cr3t@127.0.0.1:1/s3cr3t", alert_retries=1,
            smtp_url="smtp://ana:s3cr3t@127.0.0.1:1", alert_email_to="ops@example.org",
        )  # fmt: skip
        place.figures = {**WELL, "audit_up": False}
        watcher = Watcher(place.settings, lambda: place.figures, Notifier(place.settings, pause_s=0.01))
        async with watching(watcher):
            names = {"webhook": "error", "slack": "error", "email": "error"}
            await until(lambda: names in _told(place), 30)
    assert "s3cr3t" not in caplog.text and "alerts by slack" in caplog.text
    assert b"s3cr3t" not in (tmp_path / alertbook.NAME).read_bytes()
    assert json.loads((tmp_path / alertbook.NAME).read_text())["version"] == 1
