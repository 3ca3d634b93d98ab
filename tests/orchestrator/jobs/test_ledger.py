"""The ledger and the lease, in a real Redis."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import redis

from orchestrator.jobs.lease import Lease, LeaseLost
from orchestrator.jobs.ledger import (
    CLAIMED,
    DONE,
    GIVEN_UP,
    HISTORY,
    PAUSED,
    RUNNING,
    TRIES,
    Claim,
    Ledger,
    Run,
    fields,
    seen,
)
from orchestrator.store import JOBS, lease_key
from tests.redis import RealRedis

NOW = 1_800_000_000.0
NAME = "logs.0123456789abcdef"
RUN = Run("logs", NOW, 1.5, "ok", "3 removed", "", "a:1")


@pytest.fixture
def ledger(client: redis.Redis) -> Ledger:
    made = Ledger(client)
    made.baseline(NOW - 100, [NAME])
    return made


def mark(ledger: Ledger) -> str:
    return ledger.known([(NAME, "logs")])[0].raw_mark


def claim(ledger: Ledger, holder: str = "a:1", **more: object) -> Claim:
    return ledger.claim(NAME, "logs", holder, NOW, mark(ledger), **more)  # type: ignore[arg-type]


def test_one_of_many_gets_it(server: RealRedis, client: redis.Redis, ledger: Ledger) -> None:
    """Of 24 that claim at the same moment exactly one does the work, round after round, and tokens only grow."""
    tokens = []
    with redis.Redis.from_url(server.url) as shared, ThreadPoolExecutor(24) as pool:
        for round in range(10):
            barrier, expected = threading.Barrier(24), mark(ledger)

            def attempt(number: int, barrier: threading.Barrier = barrier, expected: str = expected) -> Claim:
                barrier.wait()
                return Ledger(shared).claim(NAME, "logs", f"h:{number}", NOW + number, expected)

            claims = list(pool.map(attempt, range(24)))
            won = [(number, one) for number, one in enumerate(claims) if one.outcome == CLAIMED]
            assert len(won) == 1 and {one.outcome for one in claims} == {CLAIMED, RUNNING}
            number, one = won[0]
            tokens.append(int(one.token))
            assert all(other.holder == f"h:{number}" for other in claims if other.outcome == RUNNING)
            assert ledger.finish(NAME, one.token, replace(RUN, holder=f"h:{number}", seconds=round), NOW + 100 + round)
            # who comes late, and still believes that it is due, finds it done
            assert attempt(1, threading.Barrier(1)).outcome == DONE
    assert tokens == sorted(set(tokens))
    assert len(ledger.history(NAME)) == 10


def test_tokens_grow_even_if_the_ledger_is_lost(client: redis.Redis, ledger: Ledger) -> None:
    """Somebody deletes the hash: the next token is larger all the same, so fences that remember the last one hold."""
    first = claim(ledger)
    client.delete(JOBS, lease_key(NAME))
    ledger.baseline(NOW - 100, [NAME])
    time.sleep(0.002)
    assert int(claim(ledger).token) > int(first.token)


def test_a_stale_holder_changes_nothing(client: redis.Redis, ledger: Ledger) -> None:
    """Whose lease was taken over can neither renew, nor finish, nor release: every byte stays as it is."""
    stale = claim(ledger)
    client.delete(lease_key(NAME))  # it has ended
    newer = claim(ledger, "b:2")
    assert newer.outcome == CLAIMED
    before = client.hgetall(JOBS), client.get(lease_key(NAME))
    assert not ledger.renew(NAME, stale.token, "a:1")
    assert not ledger.finish(NAME, stale.token, RUN, NOW + 1)
    assert not ledger.release(NAME, stale.token, "a:1")
    assert (client.hgetall(JOBS), client.get(lease_key(NAME))) == before and ledger.history(NAME) == []
    assert ledger.renew(NAME, newer.token, "b:2")
    assert ledger.finish(NAME, newer.token, replace(RUN, holder="b:2"), NOW + 1)
    (known,) = ledger.known([(NAME, "logs")])
    assert (known.holder, known.success, known.mark) == ("", NOW + 1.5, NOW + 1)
    assert known.last is not None and known.last.holder == "b:2"


def test_finishing_twice_is_finishing_once(ledger: Ledger) -> None:
    """An answer that was lost is asked for again: the run stands in the history once."""
    token = claim(ledger).token
    assert ledger.finish(NAME, token, RUN, NOW) and ledger.finish(NAME, token, RUN, NOW)
    assert ledger.history(NAME) == [RUN]


def test_a_lease_ends_by_itself(ledger: Ledger) -> None:
    """A holder that dies keeps others away for its lease; then the same time is due for the next one."""
    assert claim(ledger, lease_s=0.3).outcome == CLAIMED
    assert claim(ledger, "b:2").outcome == RUNNING
    time.sleep(0.4)
    assert claim(ledger, "b:2").outcome == CLAIMED


def test_a_job_that_kills_its_process_is_given_up(client: redis.Redis, ledger: Ledger) -> None:
    """After three runs that never ended the time counts as done and failed, so that it does not go on for ever."""
    for _ in range(TRIES):
        assert claim(ledger).outcome == CLAIMED
        client.delete(lease_key(NAME))
    assert claim(ledger).outcome == GIVEN_UP
    (known,) = ledger.known([(NAME, "logs")])
    assert known.last is not None and known.last.result == "failed" and "killed 3 times" in known.last.error
    assert known.mark == NOW and [run.result for run in ledger.history(NAME)] == ["failed"]
    assert claim(ledger).outcome == CLAIMED  # its next time has three again


def test_a_run_that_was_told_to_end_counts_as_none(client: redis.Redis, ledger: Ledger) -> None:
    """Released runs, as every restart of a stack makes them, never give a job up, and the time stays due."""
    before = mark(ledger)
    for _ in range(TRIES + 2):
        one = claim(ledger)
        assert one.outcome == CLAIMED and ledger.release(NAME, one.token, "a:1")
    assert mark(ledger) == before and claim(ledger).outcome == CLAIMED


def test_a_paused_job_is_not_claimed(ledger: Ledger) -> None:
    """Pausing holds for every folder's ledger name, says whether it changed anything, and can be overruled by hand."""
    assert ledger.pause("logs", NOW) and not ledger.pause("logs", NOW)
    assert claim(ledger).outcome == PAUSED
    assert ledger.claim("logs.ffff", "logs", "a:1", NOW, None).outcome == PAUSED
    assert ledger.known([(NAME, "logs")])[0].paused
    assert ledger.claim(NAME, "logs", "a:1", NOW, None, force=True).outcome == CLAIMED
    assert ledger.resume("logs") and not ledger.resume("logs")


def test_a_run_by_hand_does_what_was_due(ledger: Ledger) -> None:
    """It needs no time that is due, and after it the times up to it are done for everybody."""
    expected = mark(ledger)
    one = ledger.claim(NAME, "logs", "a:1", NOW, None)
    assert one.outcome == CLAIMED and ledger.finish(NAME, one.token, replace(RUN, manual=True), NOW)
    assert ledger.claim(NAME, "logs", "b:2", NOW, expected).outcome == DONE


def test_the_first_sight_is_a_baseline(client: redis.Redis, ledger: Ledger) -> None:
    """A new job has nothing to catch up; a mark that is there stays, unless it is nonsense or far in the future."""
    ledger.baseline(NOW, [NAME, "new"])
    client.hset(JOBS, mapping={"wrong:due": "x", "nan:due": "nan", "future:due": str(NOW + 86_400)})
    ledger.baseline(NOW, ["wrong", "nan", "future"])
    names = (NAME, "new", "wrong", "nan", "future")
    assert [one.mark for one in ledger.known([(name, "logs") for name in names])] == [NOW - 100, NOW, NOW, NOW, NOW]


def test_the_history_is_bounded(client: redis.Redis, ledger: Ledger) -> None:
    """The last 50 runs are kept, each of bounded length, and they end by themselves."""
    for number in range(HISTORY + 5):
        one = ledger.claim(NAME, "logs", "a:1", NOW, None)
        ledger.finish(NAME, one.token, replace(RUN, seconds=number, did="x" * 10_000, error="y\n" * 9000), NOW)
    runs = ledger.history(NAME)
    assert [run.seconds for run in runs] == [float(number) for number in range(HISTORY + 4, 4, -1)]
    assert all(len(run.to_json()) < 2500 for run in runs)
    client.lpush("truthgpt:{jobs}:history:" + NAME, "nonsense", '{"job": 1}')
    assert len(ledger.history(NAME)) == HISTORY - 2
    assert 0 < int(client.ttl("truthgpt:{jobs}:history:" + NAME)) <= 30 * 86_400  # type: ignore[arg-type]


def test_what_homes_serve_is_known_and_forgotten(client: redis.Redis, ledger: Ledger) -> None:
    """Replicas that share a repository see what each serves; a home that is gone for 30 days leaves no field."""
    here, other, old = "a" * 16, "b" * 16, "c" * 16
    for home, repository, models, at in (
        (here, "r1", {"demo": 3}, NOW), (other, "r1", {"demo": 1}, NOW), (other, "r2", {"x": 9}, NOW),
        (old, "r1", {"demo": 2}, NOW - 8 * 86_400),
    ):  # fmt: skip
        script, keys, arguments = seen(at, home, repository, models)
        client.eval(script.text, len(keys), *keys, *map(str, arguments))
    client.hset(JOBS, f"logs.{old}:due", "1")
    assert ledger.served("r1", NOW) == {("demo", 3), ("demo", 1)}
    assert ledger.served("r1", NOW, without=here) == {("demo", 1)}  # its own files are newer
    script, keys, arguments = seen(NOW + 25 * 86_400, here, "", {})
    client.eval(script.text, len(keys), *keys, *map(str, arguments))
    names = {name.decode() for name in client.hkeys(JOBS)}  # type: ignore[union-attr]
    assert not any(old in name for name in names) and f"seen:{other}" in names and f"{NAME}:due" in names


def test_a_repository_that_no_home_names_is_forgotten(client: redis.Redis) -> None:
    """After 30 days in which its home serves another one nothing of it is left; what is named stays."""
    home, before, after = "a" * 16, "d" * 16, "e" * 16
    for repository, at in ((before, NOW), (after, NOW + 10 * 86_400), (after, NOW + 31 * 86_400)):
        client.hset(JOBS, f"models.{repository}:due", "1")
        script, keys, arguments = seen(at, home, repository, {"demo": 1})
        client.eval(script.text, len(keys), *keys, *map(str, arguments))
    names = {name.decode() for name in client.hkeys(JOBS)}  # type: ignore[union-attr]
    assert names == {f"seen:{home}", f"seen:{after}", f"models.{after}:due", f"{after}.{home}:serves"}


def test_fields_are_read_in_their_order(ledger: Ledger, client: redis.Redis) -> None:
    """Several jobs' fields come back as asked, whatever of them is missing."""
    client.hset(JOBS, mapping={"one:success": "5", "job:paused": "1", "two:last": RUN.to_json()})
    one, two, none = ledger.known([("one", "job"), ("two", "x"), ("none", "x")])
    assert (one.success, one.paused, one.last) == (5.0, True, None)
    assert (two.success, two.paused, two.last) == (None, False, RUN)
    assert none.mark is None and len(fields([("a", "b")])) == 4


def test_a_lease_is_kept_while_it_works(ledger: Ledger) -> None:
    """Longer than a lease lasts nobody else gets the job; after the end somebody does."""
    since = time.clock_gettime(time.CLOCK_BOOTTIME)
    one = claim(ledger, lease_s=3.0)
    with Lease(ledger, NAME, one.token, "a:1", since, lease_s=3.0, renew_s=0.2) as lease:
        end = time.monotonic() + 4.0
        while time.monotonic() < end:
            lease.check()
            assert claim(ledger, "b:2").outcome == RUNNING
            time.sleep(0.1)
    assert ledger.finish(NAME, one.token, RUN, NOW)


def test_a_lease_that_cannot_be_renewed_is_lost_in_time(server: RealRedis, ledger: Ledger) -> None:
    """Redis stalls: the holder stops before its lease can have ended, and finds out without waiting for Redis."""
    since = time.clock_gettime(time.CLOCK_BOOTTIME)
    one = claim(ledger, lease_s=1.0)
    with redis.Redis.from_url(server.url, socket_timeout=0.2) as own:
        with Lease(Ledger(own), NAME, one.token, "a:1", since, lease_s=1.0, renew_s=0.2) as lease:
            lease.check()
            server.stop_answering()
            try:
                while lease.held:
                    time.sleep(0.01)
                assert time.clock_gettime(time.CLOCK_BOOTTIME) - since < 30
                with pytest.raises(LeaseLost):
                    lease.check()
            finally:
                server.go_on()


def test_a_lease_that_was_taken_over_is_lost(client: redis.Redis, ledger: Ledger) -> None:
    """Whoever finds another holder at its next renewal stops, long before its own lease would have ended."""
    since = time.clock_gettime(time.CLOCK_BOOTTIME)
    one = claim(ledger)
    with Lease(ledger, NAME, one.token, "a:1", since, renew_s=0.05) as lease:
        client.set(lease_key(NAME), "9999999999999 b:2")
        deadline = time.monotonic() + 10
        while lease.held:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert client.get(lease_key(NAME)) == b"9999999999999 b:2"


def test_a_machine_that_slept_does_not_hold_its_lease(ledger: Ledger) -> None:
    """A process that stood still for longer than its lease knows so at its next step, whatever Redis would say."""
    clock = [1000.0]
    one = claim(ledger)
    lease = Lease(ledger, NAME, one.token, "a:1", 1000.0, clock=lambda: clock[0])
    assert lease.held
    clock[0] += 15.0
    with pytest.raises(LeaseLost):
        lease.check()
