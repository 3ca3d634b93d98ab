"""Old versions of models: what may go, and that nothing does that anybody serves."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import models
from orchestrator.jobs.identity import FILE, identity
from orchestrator.jobs.ledger import seen
from orchestrator.local import modelset, state
from orchestrator.local.places import Place
from orchestrator.models import Entry, Version, read
from orchestrator.ops import serving
from orchestrator.ops.cleanup import clean
from orchestrator.ops.cleanwork import Tally, Work
from orchestrator.ops.oldversions import old
from orchestrator.settings import Settings
from tests.orchestrator.gateway import write_state
from tests.redis import RealRedis


def entry(repository: Path, name: str, versions: int, **manifest: Any) -> Path:
    for number in range(1, versions + 1):
        folder = repository / name / str(number)
        folder.mkdir(parents=True)
        said = {key: value(number) if callable(value) else value for key, value in manifest.items()}
        (folder / "manifest.json").write_text(json.dumps(said))
        (folder / "model.onnx").write_text("x" * 100)
    (repository / name / "config.pbtxt").write_text(f'name: "{name}"\n')
    return repository / name


def engine(number: int) -> dict[str, object]:
    return {"name": "encoder--engine", "version": number, "manifest_sha256": "0"}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "home").mkdir()
    (tmp_path / "repository").mkdir()
    return replace(Settings(), home=tmp_path / "home", model_repository=tmp_path / "repository", keep_versions=2)


def run(settings: Settings, **more: object) -> Tally:
    (tally,) = clean(settings, Work(**more), ["models"])  # type: ignore[arg-type]
    return tally


def left(settings: Settings) -> dict[str, list[int]]:
    return {one.name: [version.number for version in reversed(one.versions)] for one in read(settings.model_repository)}


class Triton:
    """A server that says what it has loaded, or nothing that makes sense."""

    def __init__(self) -> None:
        self.rows: list[dict[str, str]] | None = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                body = json.dumps(outer.rows).encode()
                self.send_response(200 if outer.rows is not None else 500)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def triton() -> Iterator[Triton]:
    made = Triton()
    yield made
    made.close()


def test_the_newest_are_kept(settings: Settings) -> None:
    """Of each model the newest keep_versions stay; 0 keeps all; a plan removes nothing and names what would go."""
    entry(settings.model_repository, "demo", 5)
    entry(settings.model_repository, "few", 2)
    assert run(replace(settings, keep_versions=0)).count == 0
    plan = Work(dry=True)
    clean(settings, plan, ["models"])
    assert [item.path for item in plan.items] == [str(settings.model_repository / "demo" / n) for n in "123"]
    assert plan.items[0].bytes == 102 and "demo has 5 versions, 2 are kept" in plan.items[0].why
    tally = run(settings)
    assert (tally.count, tally.failed) == (3, 0) and left(settings) == {"demo": [4, 5], "few": [1, 2]}
    assert not (settings.model_repository / ".staging").exists()


def test_what_a_home_is_to_serve_stays(settings: Settings) -> None:
    """A version that home/models.json names is not removed, running or not; nor one that another replica serves."""
    entry(settings.model_repository, "demo", 6)
    modelset.write(settings.home, {"demo": 1})
    run(settings, elsewhere=lambda: {("demo", 3)})
    assert left(settings) == {"demo": [1, 3, 5, 6]}


@pytest.mark.parametrize("state", ["READY", "LOADING", "UNLOADING"])
def test_what_triton_has_loaded_stays(settings: Settings, triton: Triton, state: str) -> None:
    """Whatever the running stack's Triton has in memory is not removed, also while it comes and goes."""
    entry(settings.model_repository, "demo", 5)
    write_state(settings.home, "http://127.0.0.1:1", triton_http=triton.url)
    triton.rows = [
        {"name": "demo", "version": "2", "state": state}, {"name": "demo", "version": "1", "state": "UNAVAILABLE"},
    ]  # fmt: skip
    run(settings)
    assert left(settings) == {"demo": [2, 4, 5]}


def places(*urls: str) -> list[Place]:
    return [Place(f"triton-{number}", url, "", "", "") for number, url in enumerate(urls)]


@pytest.fixture
def two(triton: Triton) -> Iterator[tuple[Triton, Triton]]:
    """Two servers that have different things loaded."""
    second = Triton()
    triton.rows = [{"name": "demo", "version": "1", "state": "READY"}]
    second.rows = [{"name": "demo", "version": "2", "state": "LOADING"}]
    yield triton, second
    second.close()


def test_what_any_server_of_a_stack_has_stays(settings: Settings, two: tuple[Triton, Triton]) -> None:
    """Of several servers all are asked; while one of them does not answer nothing goes."""
    entry(settings.model_repository, "demo", 5)
    urls = [server.url for server in two]
    write_state(settings.home, "http://127.0.0.1:1", servers=places(*urls, "http://127.0.0.1:1"))
    tally = run(settings)
    assert tally.count == 0 and "http://127.0.0.1:1 does not say" in tally.errors[0]
    write_state(settings.home, "http://127.0.0.1:1", servers=places(*urls))
    run(settings)
    assert left(settings) == {"demo": [1, 2, 4, 5]}


def test_what_servers_of_others_have_stays(settings: Settings, two: tuple[Triton, Triton]) -> None:
    """Those of triton_urls may serve this repository; where a name of theirs has no address nothing goes."""
    entry(settings.model_repository, "demo", 5)
    settings = replace(settings, triton_urls=", ".join(server.url.replace("127.0.0.1", "localhost") for server in two))
    tally = run(replace(settings, triton_urls=f"{settings.triton_urls},http://no-such-host.invalid"))
    assert tally.count == 0 and "has an address" in tally.errors[0]
    run(settings)
    assert left(settings) == {"demo": [1, 2, 4, 5]}


def test_a_version_is_ready_that_any_server_has_ready(settings: Settings, two: tuple[Triton, Triton]) -> None:
    """One that does not answer says nothing of the others'."""
    first, second = two
    second.rows = [{"name": "demo", "version": "1", "state": "UNLOADING"}, *(second.rows or ())]
    for urls in ((first.url, second.url), (second.url, "http://127.0.0.1:1", first.url)):
        write_state(settings.home, "http://127.0.0.1:1", servers=places(*urls))
        assert serving.of_home(settings) == {("demo", "1"): "READY", ("demo", "2"): "LOADING"}


def test_where_triton_does_not_say_nothing_goes(settings: Settings, triton: Triton) -> None:
    """A stack runs and its Triton answers nonsense, or not at all: nothing is removed, and the job has failed."""
    entry(settings.model_repository, "demo", 5)
    triton.rows = None
    for url in (triton.url, "http://127.0.0.1:1"):
        write_state(settings.home, "http://127.0.0.1:1", triton_http=url)
        tally = run(settings)
        assert (tally.count, tally.failed) == (0, 1) and "does not say what it has loaded" in tally.errors[0]
    state.clear(settings.home)
    assert run(settings).count == 3


def test_what_was_loaded_meanwhile_stays(settings: Settings, triton: Triton) -> None:
    """Between the plan and the removal somebody loads a version: it is asked again, and that one stays."""
    entry(settings.model_repository, "demo", 5)
    write_state(settings.home, "http://127.0.0.1:1", triton_http=triton.url)

    def guard() -> None:
        triton.rows = [{"name": "demo", "version": "3", "state": "READY"}]

    run(settings, guard=guard)
    assert left(settings) == {"demo": [3, 4, 5]}


def test_what_a_replica_begins_to_serve_meanwhile_stays(settings: Settings) -> None:
    """Other replicas are asked again before each version that goes."""
    entry(settings.model_repository, "demo", 6)
    served: set[tuple[str, int]] = set()

    def guard() -> None:
        if not (settings.model_repository / "demo" / "1").exists():
            served.add(("demo", 3))

    tally = run(settings, guard=guard, elsewhere=lambda: served)
    assert left(settings) == {"demo": [3, 5, 6]} and tally.count == 3


def test_where_redis_does_not_say_what_others_serve_nothing_goes(
    settings: Settings, server: RealRedis, client: redis.Redis
) -> None:
    """A Redis is set, or a running stack has one, and it cannot be asked: no version goes, and the target has failed.

    Without either there are no others. One that stops answering in the middle is the same.
    """
    entry(settings.model_repository, "demo", 5)
    refused = "Redis does not say what other replicas serve"
    given = replace(settings, redis_url="unix:///nowhere/redis.sock")
    tally = run(given, elsewhere=serving.elsewhere(given, None))
    assert (tally.count, tally.failed) == (0, 1) and refused in tally.errors[0]
    with redis.Redis(unix_socket_path="/nowhere/redis.sock") as nobody:
        tally = run(settings, elsewhere=serving.elsewhere(settings, nobody))
    assert (tally.count, tally.failed) == (0, 1) and refused in tally.errors[0]
    write_state(settings.home, "http://127.0.0.1:1")
    with pytest.raises(serving.CannotTell, match=refused):
        serving.elsewhere(settings, None)()
    state.clear(settings.home)
    assert left(settings) == {"demo": [1, 2, 3, 4, 5]}
    assert run(settings, elsewhere=serving.elsewhere(settings, None)).count == 3


def test_what_other_homes_serve_stays(settings: Settings, client: redis.Redis) -> None:
    """Of this repository, and as long as it has no name of its own of any; what this home has told before is no bar."""
    entry(settings.model_repository, "demo", 7)

    def tell(home: str, repository: str, number: int) -> None:
        script, keys, arguments = seen(time.time(), home, repository, {"demo": number})
        client.eval(script.text, len(keys), *keys, *map(str, arguments))

    ask = serving.elsewhere(settings, client)
    tell("b" * 16, "c" * 16, 1)
    assert set(ask()) == {("demo", 1)}
    assert not (settings.model_repository / FILE).exists() and not (settings.home / FILE).exists()
    own = identity(settings.model_repository)
    tell("b" * 16, own, 2)
    tell(identity(settings.home), own, 3)
    run(settings, elsewhere=ask)
    assert left(settings) == {"demo": [2, 6, 7]}


def test_a_model_that_an_operator_works_on_is_left(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a model is being loaded none of its versions go, and that is told."""
    monkeypatch.setattr("orchestrator.ops.oldversions.BUSY_S", 0.0)
    entry(settings.model_repository, "demo", 3)
    with modelset.changing(settings.home, "demo", 1.0):
        tally = run(settings)
    assert tally.failed == 1 and "another command is working on demo" in tally.errors[0]
    assert left(settings) == {"demo": [1, 2, 3]} and run(settings).count == 1


def test_the_graph_of_a_version_that_stays_stays(settings: Settings) -> None:
    """A graph that a kept version runs on is not removed; those whose versions go are."""
    entry(settings.model_repository, "encoder", 5, served_by=lambda number: engine(max(1, number - 2)))
    entry(settings.model_repository, "encoder--engine", 5, graph_only=True)
    modelset.write(settings.home, {"encoder": 1})
    run(settings)
    # of encoder 1, 4 and 5 stay, which need 1, 2 and 3 of the graph
    assert left(settings) == {"encoder": [1, 4, 5], "encoder--engine": [1, 2, 3, 4, 5]}
    modelset.clear(settings.home)
    run(settings)
    assert left(settings) == {"encoder": [4, 5], "encoder--engine": [2, 3, 4, 5]}


def test_a_version_that_does_not_say_what_it_needs_keeps_every_graph(settings: Settings) -> None:
    """Where a kept version's manifest cannot be read no graph goes: it may need any of them."""
    entry(settings.model_repository, "encoder", 3, served_by=engine)
    entry(settings.model_repository, "encoder--engine", 4, graph_only=True)
    for broken in ('{"served_by": 7}', "{"):
        (settings.model_repository / "encoder" / "3" / "manifest.json").write_text(broken)
        run(settings)
        assert left(settings) == {"encoder": [2, 3], "encoder--engine": [1, 2, 3, 4]}


def test_a_graph_outlives_the_version_in_front_of_it(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a version that was to go cannot go, its graph stays, too."""
    entry(settings.model_repository, "encoder", 3, served_by=engine)
    entry(settings.model_repository, "encoder--engine", 3, graph_only=True)
    real = models.remove

    def remove(repository: Path, one: Entry, number: int | None = None) -> list[Path]:
        if one.name == "encoder":
            raise models.ModelsError("it could not be removed", "")
        return real(repository, one, number)

    with monkeypatch.context() as patch:
        patch.setattr(models, "remove", remove)
        assert run(settings).failed == 1
    assert left(settings) == {"encoder": [1, 2, 3], "encoder--engine": [1, 2, 3]}
    run(settings)
    assert left(settings) == {"encoder": [2, 3], "encoder--engine": [2, 3]}


def test_links_lead_nowhere(settings: Settings, tmp_path: Path) -> None:
    """A model's folder that is a link is left alone; a version that is one loses the link and not its target."""
    outside = entry(tmp_path / "outside", "linked", 4)
    (settings.model_repository / "linked").symlink_to(outside)
    model = entry(settings.model_repository, "demo", 3)
    (model / "1" / "model.onnx").unlink()
    (model / "1" / "manifest.json").unlink()
    (model / "1").rmdir()
    (model / "1").symlink_to(outside / "1")
    assert run(settings).count == 1
    assert sorted(os.listdir(model)) == ["2", "3", "config.pbtxt"]
    assert sorted(os.listdir(outside)) == ["1", "2", "3", "4", "config.pbtxt"]
    assert (outside / "1" / "model.onnx").exists()


NUMBERS = st.sets(st.integers(1, 9), min_size=1, max_size=6)


@given(
    fronts=NUMBERS, graphs=NUMBERS, needs=st.dictionaries(st.integers(1, 9), st.integers(1, 9)), keep=st.integers(1, 4),
    held=st.sets(st.tuples(st.sampled_from(["m", "m--engine"]), st.integers(1, 9))),
)  # fmt: skip
def test_what_goes_is_never_needed(
    fronts: set[int], graphs: set[int], needs: dict[int, int], keep: int, held: set[tuple[str, int]]
) -> None:
    """Whatever there is and whoever serves it: nothing goes that is held, newest, kept, or the graph of what stays."""

    def made(name: str, numbers: set[int]) -> Entry:
        rows = []
        for number in sorted(numbers, reverse=True):
            said: dict[str, Any] = {"graph_only": name.endswith("--engine")}
            if name == "m" and number in needs:
                said["served_by"] = {"name": "m--engine", "version": needs[number], "manifest_sha256": "0"}
            rows.append(Version(name, number, Path("/x") / name / str(number), said))
        return Entry(name, Path("/x") / name, tuple(rows))

    entries = [made("m", fronts), made("m--engine", graphs)]
    going = {(version.name, version.number) for version in old(entries, keep, held)}
    for one in entries:
        numbers = [version.number for version in one.versions]
        assert not going & {(one.name, number) for number in numbers[:keep]}
        for number in numbers[keep:]:
            needed = any(needs.get(n) == number and ("m", n) not in going for n in fronts) and one.name != "m"
            assert ((one.name, number) in going) is not ((one.name, number) in held or needed)
    assert not going & held
