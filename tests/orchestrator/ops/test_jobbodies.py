"""What jobs do, run under their leases on a real Redis."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from orchestrator.auditlog import folder_of
from orchestrator.jobs.identity import identity
from orchestrator.jobs.lease import LeaseLost
from orchestrator.jobs.ledger import RUNNING, Claim, Ledger, Run, seen
from orchestrator.jobs.table import JOBS
from orchestrator.ops import auditread, backup, cachetools, cleanrun, cleanup, jobrun
from orchestrator.ops.cachetools import Overtaken
from orchestrator.ops.checks_profile import check_backup
from orchestrator.ops.cleanwork import Tally, Work
from orchestrator.ops.finding import Deployment
from orchestrator.ops.jobbodies import Task
from orchestrator.settings import Settings
from orchestrator.store import JOBS as HASH
from orchestrator.store import REGISTRY, lease_key, stats_key
from tests.redis import RealRedis


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    for name in ("home", "repository"):
        (tmp_path / name).mkdir()
    return replace(Settings(), home=tmp_path / "home", model_repository=tmp_path / "repository")


def run(settings: Settings, client: redis.Redis, name: str, **more: Any) -> Run:
    ended = jobrun.run(settings, JOBS[name], client, **more)
    assert isinstance(ended, Run)
    return ended


def test_every_cleaning_job_runs(settings: Settings, client: redis.Redis) -> None:
    """Each cleans its target, says what it has done, and stands in the history with who did it."""
    for name in ("logs", "cache", "temporary", "metrics", "models", "shared_memory", "audit"):
        ended = run(settings, client, name)
        assert (ended.result, ended.did, ended.error, ended.manual) == ("ok", "nothing to remove", "", True)
        assert ended.holder.endswith(f":{os.getpid()}")
        assert Ledger(client).history(jobrun.name_of(settings, JOBS[name])) == [ended]


def test_a_failure_is_written_down(settings: Settings, client: redis.Redis) -> None:
    """An error becomes the run's, with what was done before it; whatever kind it is the lease is free afterwards."""

    def fail(error: Exception) -> Any:
        def do(task: Task) -> str:
            raise error

        return do

    for error, said in (
        (OSError(28, "No space left on device", "/x"), "/x: No space left on device"),
        (ValueError("odd"), "ValueError: odd"), (KeyError(), "KeyError: KeyError"), (Overtaken(), str(Overtaken())),
    ):  # fmt: skip
        ended = run(settings, client, "logs", do=fail(error))
        assert (ended.result, ended.error) == ("failed", said)
    (known,) = Ledger(client).known([(jobrun.name_of(settings, JOBS["logs"]), "logs")])
    assert known.last is not None and known.last.result == "failed" and known.success is None and not known.holder


def test_a_deadline_ends_a_job(settings: Settings, client: redis.Redis) -> None:
    """What takes too long is ended in the middle, whatever errors it would swallow, and has failed."""

    swallowed: list[Exception] = []

    def work(task: Task) -> str:
        while True:
            try:
                time.sleep(0.01)
            except Exception as error:
                swallowed.append(error)

    ended = jobrun.run(settings, replace(JOBS["logs"], deadline_s=0.2), client, do=work)
    assert isinstance(ended, Run) and (ended.result, ended.error) == ("failed", "it took longer than 0.2 s")
    assert swallowed == []
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_sigterm_gives_the_job_back(settings: Settings, client: redis.Redis) -> None:
    """A process that is told to end leaves the lease free, and nothing counts as done or failed."""

    def work(task: Task) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        return "too late"

    with pytest.raises(jobrun.Stopped):
        jobrun.run(settings, JOBS["logs"], client, do=work)
    (known,) = Ledger(client).known([(jobrun.name_of(settings, JOBS["logs"]), "logs")])
    assert known.holder == "" and known.last is None
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_job_that_runs_is_not_run_twice(settings: Settings, client: redis.Redis) -> None:
    """By hand, too: the second one is told who is at it."""

    def work(task: Task) -> str:
        other = jobrun.run(settings, JOBS["logs"], client)
        assert isinstance(other, Claim) and other.outcome == RUNNING and other.holder.endswith(f":{os.getpid()}")
        return "once"

    assert run(settings, client, "logs", do=work).did == "once"


def test_a_lost_lease_ends_without_a_word_in_redis(settings: Settings, client: redis.Redis) -> None:
    """A run that was taken over stops at its next step and writes nothing down."""
    name = jobrun.name_of(settings, JOBS["logs"])

    def work(task: Task) -> str:
        client.delete(f"truthgpt:{{jobs}}:lease:{name}")
        assert Ledger(client).claim(name, "logs", "b:2", time.time(), None).token > task.token
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            task.guard()
            time.sleep(0.01)
        return "never"

    with pytest.raises(LeaseLost):
        jobrun.run(settings, JOBS["logs"], client, do=work)
    assert Ledger(client).history(name) == [] and Ledger(client).known([(name, "logs")])[0].holder == "b:2"


def test_a_scheduled_run_of_what_is_not_due_does_nothing(settings: Settings, client: redis.Redis) -> None:
    """Seen for the first time, or done by somebody else meanwhile: no work, no history."""
    for _ in range(2):
        assert isinstance(jobrun.run(settings, JOBS["logs"], client, scheduled=True), Claim)
    assert Ledger(client).history(jobrun.name_of(settings, JOBS["logs"])) == []


def test_what_other_homes_serve_reaches_the_job(settings: Settings, client: redis.Redis) -> None:
    """The versions that replicas say they serve of this repository stay, whoever runs the job."""
    for number in range(1, 7):
        (settings.model_repository / "demo" / str(number)).mkdir(parents=True)
    script, keys, arguments = seen(time.time(), "b" * 16, identity(settings.model_repository), {"demo": 2})
    client.eval(script.text, len(keys), *keys, *map(str, arguments))
    assert run(replace(settings, keep_versions=2), client, "models").did.startswith("3 removed")
    assert sorted(os.listdir(settings.model_repository / "demo")) == ["2", "5", "6"]


def test_redis_failing_between_claim_and_work_leaves_no_lease(
    settings: Settings, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is raised before the work begins, the job is free at once, and still due."""

    def fail(*_: object) -> object:
        raise redis.ResponseError("no")

    monkeypatch.setattr(jobrun, "_worked", fail)
    with pytest.raises(redis.ResponseError):
        jobrun.run(settings, JOBS["logs"], client)
    (known,) = Ledger(client).known([(jobrun.name_of(settings, JOBS["logs"]), "logs")])
    assert known.holder == "" and known.last is None


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGALRM, jobrun.DeadlinePassed), (signal.SIGTERM, jobrun.Stopped)]
)
def test_an_end_that_a_loop_swallows_is_found_at_the_next_step(
    settings: Settings, client: redis.Redis, number: signal.Signals, kind: type[BaseException]
) -> None:
    """A signal that comes while an event loop runs a callback is not lost: the guard raises what the loop swallowed."""
    found: list[BaseException] = []

    def work(task: Task) -> str:
        async def loop() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: found.append(context["exception"]))
            asyncio.get_running_loop().call_soon(os.kill, os.getpid(), number)
            await asyncio.sleep(0.1)

        asyncio.run(loop())
        task.guard()
        return "never"

    if kind is jobrun.Stopped:
        with pytest.raises(jobrun.Stopped):
            jobrun.run(settings, JOBS["logs"], client, do=work)
    else:
        assert run(settings, client, "logs", do=work).error == "it took longer than 600 s"
    assert isinstance(found[0], kind)  # it was swallowed


def test_a_path_that_is_no_text_is_told_as_text(settings: Settings, client: redis.Redis) -> None:
    """Bytes that are no UTF-8 stand escaped in the run's error, which every encoding and JSON can have."""
    path = os.fsdecode(b"/x/\xff")

    def unreadable(task: Task) -> str:
        raise OSError(5, "Input/output error", path)

    def unclean(task: Task) -> str:
        work = Work()
        work.begin("logs")
        work.failed(path, OSError(5, "Input/output error"))
        return work.done(work.tally)

    for do in (unreadable, unclean):
        ended = run(settings, client, "logs", do=do)
        assert "/x/\\xff: Input/output error" in ended.error
        assert ended.error.encode() and json.loads(ended.to_json())["error"].encode("utf-8")


def test_cleaning_by_hand_that_is_ended_has_failed(
    settings: Settings, client: redis.Redis, server: RealRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target whose deadline passes counts as failed, with what was done until then, and the next one is done."""

    def slow(settings: Settings, work: Work) -> None:
        work.remove("/x", 5, "", lambda: None)
        time.sleep(20)

    monkeypatch.setitem(cleanrun.JOBS, "cache", replace(JOBS["cache"], deadline_s=0.2))
    monkeypatch.setitem(cleanup.TARGETS, "cache", slow)
    done: list[Tally] = []
    cleanrun.run(replace(settings, redis_url=server.url), ["cache", "logs"], pytest.fail, done)
    cache, logs = done
    assert (cache.count, cache.failed, cache.errors) == (1, 1, ["it took longer than 0.2 s"]) and logs.failed == 0


def test_cleaning_by_hand_counts_what_went_before_it_was_ended(
    settings: Settings, client: redis.Redis, server: RealRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost lease and SIGTERM, with and without a Redis, end it with what was removed until then; the rest is left."""

    def lose(settings: Settings, work: Work) -> None:
        work.remove("/x", 5, "", lambda: None)
        name = jobrun.name_of(settings, JOBS["cache"])
        client.delete(lease_key(name))
        assert Ledger(client).claim(name, "cache", "b:2", time.time(), None).token
        for _ in range(2000):
            work.guard()
            time.sleep(0.01)

    def told(settings: Settings, work: Work) -> None:
        work.remove("/x", 5, "", lambda: None)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    with_redis = replace(settings, redis_url=server.url)
    for given, target, kind in (
        (with_redis, told, jobrun.Stopped), (settings, told, jobrun.Stopped), (with_redis, lose, LeaseLost),
    ):  # fmt: skip
        monkeypatch.setitem(cleanup.TARGETS, "cache", target)
        done: list[Tally] = []
        with pytest.raises(kind):
            cleanrun.run(given, ["metrics", "cache", "logs"], lambda text: None, done)
        assert [(tally.name, tally.count) for tally in done] == [("metrics", 0), ("cache", 1)]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_cleaning_by_hand_goes_on_where_redis_fails_at_a_targets_end(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was done is counted once, and told not to be in the history; targets after it are done without a lease."""
    monkeypatch.setattr(jobrun, "FINISH_S", 0.2)
    told: list[str] = []
    done: list[Tally] = []
    with RealRedis() as own:

        def kill(settings: Settings, work: Work) -> None:
            work.remove("/x", 5, "", lambda: None)
            own.kill()

        monkeypatch.setitem(cleanup.TARGETS, "cache", kill)
        given = replace(settings, redis_url=own.url)
        cleanrun.run(given, ["cache", "logs", "models"], told.append, done)
        assert [(tally.name, tally.count) for tally in done] == [("cache", 1), ("logs", 0), ("models", 0)]
        assert len(told) == 1 and "nobody else is kept from cleaning up" in told[0]
        own.start()
        done.clear()
        cleanrun.run(given, ["logs", "cache"], told.append, done)
        assert [(tally.name, tally.count) for tally in done] == [("logs", 0), ("cache", 1)]
        assert "not in the history" in told[1]


def use(client: redis.Redis, tenant: str, task: str, count: int) -> None:
    client.hincrby(stats_key(tenant), f"hits:{task}", count)


def test_the_cache_is_fitted_once_for_each_use(settings: Settings, client: redis.Redis) -> None:
    """Uses are counted over tenants, each once; the run says what has changed."""
    use(client, "acme", "translation", 10)
    use(client, "beta", "text_generation", 101)
    ended = run(settings, client, "cache_ttls")
    assert "text_generation 3600 s to 7200 s" in ended.did and "translation" not in ended.did
    assert cachetools.ttls(client)["text_generation"] == 7200
    assert "text_generation 7200 s to 3600 s" in run(settings, client, "cache_ttls").did


def test_an_overtaken_run_cannot_change_the_cache(client: redis.Redis) -> None:
    """Once a run with a larger token has written, one with a smaller token is refused, in every hash."""
    use(client, "acme", "translation", 500)
    cachetools.adapt_ttls(client, fence=7)
    before = client.hgetall(REGISTRY), client.hgetall(stats_key("acme"))
    use(client, "acme", "translation", 500)
    with pytest.raises(Overtaken):
        cachetools.adapt_ttls(client, fence=6)
    assert client.hgetall(REGISTRY) == before[0]
    assert client.hget(stats_key("acme"), "adapted:translation") == b"500"
    client.hset(stats_key("acme"), "fence", "5")  # overtaken between its two steps
    with pytest.raises(Overtaken):
        cachetools.adapt_ttls(client, fence=6)
    assert client.hgetall(REGISTRY) == before[0]
    cachetools.adapt_ttls(client)  # by hand it has no token, and always may
    assert "fence" not in cachetools.stats(client)["tasks"]


def test_the_guard_is_asked_before_each_change(client: redis.Redis) -> None:
    """A run that has lost its lease changes neither counters nor times."""
    use(client, "acme", "translation", 500)

    def lost() -> None:
        raise LeaseLost("cache_ttls")

    with pytest.raises(LeaseLost):
        cachetools.adapt_ttls(client, lost, 7)
    assert client.hgetall(REGISTRY) == {} and client.hget(stats_key("acme"), "adapted:translation") is None


def older(settings: Settings) -> None:
    """The newest backup becomes one of long ago."""
    (path,) = (made.path for made in backup.infos(settings.backups))
    path.rename(path.with_name(path.name.replace(path.name[9:24], "20200101T000000")))


def test_a_backup_is_made_and_old_ones_go(settings: Settings, client: redis.Redis) -> None:
    """First the new one, then those that are too old; the run names it, and the audit log has it."""
    settings = replace(settings, backup_models=False, backup_keep=1)
    assert run(settings, client, "backup").result == "ok"
    older(settings)
    ended = run(settings, client, "backup")
    (kept,) = backup.infos(settings.backups)
    assert ended.result == "ok", ended.error
    assert ended.did == f"made {kept.path.name}, removed 1 that are too old"
    row = auditread.tail(folder_of(settings.home), 1, auditread.Wanted(("security",)))[0]
    assert (row["operation"], row["detail"]) == ("backup create", kept.id)


def test_a_backup_needs_no_models_where_those_are_elsewhere(settings: Settings, client: redis.Redis) -> None:
    """With servers of others a repository that is not there is no fault; else it is one."""
    settings = replace(settings, backup_models=True, model_repository=settings.home / "nowhere")
    assert "there is no model repository" in run(settings, client, "backup").error
    assert run(replace(settings, triton_urls="http://127.0.0.1:1"), client, "backup").result == "ok"


def test_the_newest_backup_is_checked(settings: Settings, client: redis.Redis) -> None:
    """None, one that does not verify, and one that is too old are failures with their reasons."""
    assert "there is no backup" in run(settings, client, "backup_check").error
    assert run(settings, client, "backup").result == "ok"
    (made,) = backup.infos(settings.backups)
    assert run(settings, client, "backup_check").did == f"{made.path.name} verifies"
    with made.path.open("r+b") as file:
        file.seek(made.bytes // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    ended = run(settings, client, "backup_check")
    assert ended.result == "failed" and str(made.path) in ended.error
    older(settings)
    assert "hours old" in run(settings, client, "backup_check").error


def test_each_home_is_backed_up(settings: Settings, client: redis.Redis, tmp_path: Path) -> None:
    """Of replicas with homes of their own on one Redis each makes a backup of its own, and checks it."""
    settings = replace(settings, backup=True, backup_models=False)
    other = replace(settings, home=tmp_path / "other")
    other.home.mkdir()
    names = ("backup", "backup_check")
    client.hset(HASH, mapping={f"{jobrun.name_of(one, JOBS[n])}:due": "1" for one in (settings, other) for n in names})
    for one in (settings, other):
        for name in names:
            ended = run(one, client, name, scheduled=True)
            assert (ended.result, ended.error) == ("ok", "")
            assert isinstance(jobrun.run(one, JOBS[name], client, scheduled=True), Claim)  # once
        assert len(backup.infos(one.home / "backups")) == 1


def test_a_backup_from_the_future(settings: Settings, client: redis.Redis) -> None:
    """It does not cost the one that is made now; while it is there, job and doctor say that a clock is wrong."""
    settings = replace(settings, backup_models=False, backup_keep=1)
    assert run(settings, client, "backup").result == "ok"
    (made,) = backup.infos(settings.backups)
    late = made.path.with_name(made.path.name.replace(made.path.name[9:24], "29990101T000000"))
    late.write_bytes(made.path.read_bytes())
    ended = run(settings, client, "backup_check")
    assert ended.result == "failed" and f"{late.name}, is dated in the future" in ended.error
    finding = check_backup(Deployment(settings))
    assert finding.ok is False and late.name in finding.detail and "clock" in finding.hint
    assert run(settings, client, "backup").result == "ok"
    (kept,) = backup.infos(settings.backups)
    assert kept.path not in (late, made.path)
    assert run(settings, client, "backup_check").result == "ok"


@pytest.mark.slow
def test_a_lease_is_renewed_while_a_backup_is_made(settings: Settings, client: redis.Redis) -> None:
    """A job that works longer than a lease lasts keeps it."""
    ended = run(settings, client, "logs", lease_s=6.0, do=lambda task: time.sleep(7.0) or task.guard() or "kept")
    assert ended.did == "kept" and threading.active_count() < 20
