"""Batches: what a line may be, what is kept whatever happens, and how a gateway that refuses or fails is asked."""

from __future__ import annotations

import asyncio
import json
import random
import resource
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.ops import batch, batchclient, batchfile
from orchestrator.ops.batchclient import Asker, Gate
from orchestrator.ops.batchfile import BadLine, BatchError, Line, Source, answered
from orchestrator.ops.batchjournal import Journal
from tests.orchestrator.conftest import serving, until
from tests.orchestrator.fake_triton import FakeTriton, answer, failure

Row = dict[str, Any]


def line(custom_id: str, prompt: str = "Hola", **changes: Any) -> dict[str, Any]:
    """One request as a batch file has it."""
    body = {"model": "m", "prompt": prompt}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body, **changes}


def write(path: Path, *lines: Any) -> Path:
    """A batch file; bytes are written as they are."""
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines) + b"\n")
    return path


def rows(path: Path) -> list[Row]:
    return [json.loads(text) for text in path.read_bytes().splitlines()]


class Echo:
    """Answers each line with its own custom_id, in an order of its own; `after` lines it says stop."""

    def __init__(self, seed: int = 0, concurrency: int = 3) -> None:
        self.concurrency, self.asked = concurrency, []  # type: int, list[str]
        self._random = random.Random(seed)

    async def ask(self, line: Line, id: str) -> Row:
        self.asked.append(line.custom_id)
        for _ in range(self._random.randrange(4)):
            await asyncio.sleep(0)
        return answered(id, line.custom_id, 200, "r", {"usage": {"completion_tokens": 2}, "echo": "ñ\n" * 3})


async def do(file: Path, out: Path, asker: Any, stop: asyncio.Event | None = None, overwrite: bool = False) -> Any:
    """What the command does: (whether it came to the end, the counts)."""
    source = Source.open(file)
    tally = batch.Tally(source.lines)
    journal = Journal.open(out, source, overwrite, tally.keep)
    try:
        whole = await batch.run(source, journal, tally, asker, stop or asyncio.Event())
        if whole:
            journal.finish()
        return whole, tally
    finally:
        journal.close()


@asynccontextmanager
async def scripted(reply: Callable[[int, Row], tuple[int, dict[str, str], Any]]) -> AsyncIterator[str]:
    """A server on a real socket; `reply` gets the number of the request and its body: status, headers, body."""
    count = 0

    async def handle(request: web.Request) -> web.Response:
        nonlocal count
        count += 1
        status, headers, body = reply(count, await request.json())
        return web.json_response(body, status=status, headers=headers)

    app = web.Application()
    app.router.add_post("/{path:.*}", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def asker(url: str, **changes: Any) -> Asker:
    return Asker(**{
        "url": url, "api_key": None, "concurrency": 4, "retries": 3, "timeout_s": 10.0, "backoff_s": 0.01, **changes,
    })  # fmt: skip


# The input


@pytest.mark.parametrize(
    ("bad", "custom_id", "code"),
    [
        (b"{", None, "invalid_json"),
        (b"\xff\xfe", None, "invalid_json"),
        (b'{"custom_id": NaN}', None, "invalid_json"),
        (b"[" * 100_000, None, "invalid_json"),
        (b"[1]", None, "invalid_line"),
        (line(""), None, "invalid_line"),
        ({**line("b"), "custom_id": 7}, None, "invalid_line"),
        (line("b", method="GET"), "b", "invalid_line"),
        (line("b", url="/v1/files"), "b", "invalid_line"),
        (line("b", url=["/v1/completions"]), "b", "invalid_line"),
        (line("b", body=[]), "b", "invalid_line"),
        ({k: v for k, v in line("b").items() if k != "body"}, "b", "invalid_line"),
        (b'{"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"x": 1e999}}', "b", "invalid_line"),
        (line("b", body={"stream": True}), "b", "stream_unsupported"),
        (line("a"), None, "duplicate_custom_id"),
        (b'"' + b"x" * batchfile.MAX_LINE_BYTES + b'"', None, "line_too_long"),
    ],
    ids=lambda value: "" if isinstance(value, bytes | dict) else str(value),
)
def test_a_wrong_line_is_an_error_of_its_own(tmp_path: Path, bad: Any, custom_id: str | None, code: str) -> None:
    """Whatever is wrong with a line, it is told by its code, with its custom_id where it has one of its own."""
    source = Source.open(write(tmp_path / "in", line("a"), bad, b" ", line("z")))
    first, wrong, last = source.read()
    assert source.lines == 3
    assert isinstance(wrong, BadLine) and (wrong.number, wrong.custom_id, wrong.code) == (2, custom_id, code)
    assert isinstance(first, Line) and isinstance(last, Line) and (first.number, last.number) == (1, 4)


def test_a_line_as_long_as_allowed_is_read(tmp_path: Path) -> None:
    """The bound itself is allowed, with a newline or without."""
    text = json.dumps(line("a", "x")).encode()
    full = text.replace(b'"x"', b'"' + b"x" * (batchfile.MAX_LINE_BYTES - len(text) + 1) + b'"')
    assert len(full) == batchfile.MAX_LINE_BYTES
    (tmp_path / "in").write_bytes(full + b"\n" + full.replace(b'"a"', b'"b"'))
    assert [type(each) for each in Source.open(tmp_path / "in").read()] == [Line, Line]


def test_what_is_sent_is_the_body(tmp_path: Path) -> None:
    """A request is the body as JSON, whatever letters it holds; a mark at the file's beginning is no part of it."""
    wanted = line("ñ", "¿Qué tal? \ud800 \u2028")
    (only,) = Source.open(write(tmp_path / "in", b"\xef\xbb\xbf" + json.dumps(wanted).encode())).read()
    assert isinstance(only, Line) and json.loads(only.body) == wanted["body"] and only.custom_id == "ñ"


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=40), st.sampled_from([json.dumps(line(c)).encode() for c in "abc"]))))
def test_any_bytes_are_read(lines: list[bytes]) -> None:
    """No input makes reading fail; the count of lines is the number of results, and no custom_id is asked twice."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in"
        path.write_bytes(b"\n".join(lines))
        source = Source.open(path)
        found = list(source.read())
    assert len(found) == source.lines
    asked = [each.custom_id for each in found if isinstance(each, Line)]
    assert len(asked) == len(set(asked))
    numbers = [each.number for each in found]
    assert numbers == sorted(set(numbers))


async def test_an_input_that_changes_is_noticed(tmp_path: Path) -> None:
    """Lines that were added or changed while a batch runs end it with an error, because its answers fit nothing."""
    file = write(tmp_path / "in", line("a"), line("b"))

    class Meddler(Echo):
        async def ask(self, line: Line, id: str) -> Row:
            with file.open("ab") as more:
                more.write(b"\n\n")
            return await super().ask(line, id)

    with pytest.raises(BatchError, match="was changed"):
        await do(file, tmp_path / "out", Meddler(concurrency=1))
    assert not (tmp_path / "out").exists()


# The output


async def test_the_output_has_the_order_of_the_input(tmp_path: Path) -> None:
    """Every line has its answer at its place, in OpenAI's form, and nothing else stays in the folder."""
    names = [f"r{n}" for n in range(40)]
    file = write(tmp_path / "in", *map(line, names), b"{", b"")
    whole, tally = await do(file, tmp_path / "out", Echo(seed=1, concurrency=7))
    found = rows(tmp_path / "out")
    assert whole and [row["custom_id"] for row in found] == [*names, None]
    assert all(set(row) == {"id", "custom_id", "response", "error"} for row in found)
    assert found[0]["response"]["status_code"] == 200 and found[0]["error"] is None
    assert found[-1]["response"] is None and found[-1]["error"]["line"] == 41
    assert len({row["id"] for row in found}) == 41 and all(row["id"].startswith("batch_req_") for row in found)
    assert (tally.total, tally.succeeded, tally.failed, tally.skipped, tally.output_tokens) == (41, 40, 1, 0, 80)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_is_left_each_line_is_there_once(data: st.DataObject) -> None:
    """A partial file that is cut at any byte resumes to the same output: every line once, and only what lacks is
    asked.
    """
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "in", Path(folder) / "out"
        names = [f"r{n}" for n in range(data.draw(st.integers(0, 12), "lines"))]
        write(file, *map(line, names), b"{", line("r0"))
        stop, first = asyncio.Event(), Echo(seed=data.draw(st.integers(0, 99), "order"))
        partial = out.with_name("out.partial")

        async def begin() -> None:
            source = Source.open(file)
            journal = Journal.open(out, source, False, lambda row: None)
            await batch.run(source, journal, batch.Tally(source.lines), first, stop)
            journal.close()  # as kill -9: before it is finished

        asyncio.run(begin())
        content = partial.read_bytes()
        partial.write_bytes(content[: data.draw(st.integers(0, len(content)), "cut")])
        kept = max(0, partial.read_bytes().count(b"\n") - 1)
        second = Echo()
        whole, tally = asyncio.run(do(file, out, second))
        found = rows(out)
        expected = [*names, None, None if names else "r0"]
        assert whole and [row["custom_id"] for row in found] == expected
        assert tally.skipped == kept and tally.done == tally.total == len(expected)
        assert len(second.asked) <= len(expected) - kept and not partial.exists()
        assert tally.output_tokens == 2 * (len(names) or 1)


async def test_stopping_keeps_what_is_done(tmp_path: Path) -> None:
    """A stop ends the run at once, though an answer never comes, and the next run asks only what is not done."""
    file, stop = write(tmp_path / "in", *(line(f"r{n}") for n in range(9))), asyncio.Event()

    class Stuck(Echo):
        async def ask(self, line: Line, id: str) -> Row:
            if line.custom_id == "r4":
                stop.set()
                await asyncio.sleep(3600)
            return await super().ask(line, id)

    whole, tally = await do(file, tmp_path / "out", Stuck(concurrency=1), stop)
    assert (whole, tally.done) == (False, 4) and not (tmp_path / "out").exists()
    echo = Echo()
    whole, tally = await do(file, tmp_path / "out", echo)
    assert whole and tally.skipped == 4 and sorted(echo.asked) == ["r4", "r5", "r6", "r7", "r8"]


async def test_zeros_of_a_power_failure_are_cut_off(tmp_path: Path) -> None:
    """A block of zeros at the end of the partial file, as a file system can leave it, costs only those lines."""
    file, out = write(tmp_path / "in", line("a"), line("b")), tmp_path / "out"
    await do(file, out, Echo())
    source = Source.open(file)
    header = json.dumps({"truthgpt_batch": 1, "input": {"sha256": source.sha256, "bytes": source.size}}) + "\n"
    first = out.read_bytes().splitlines(keepends=True)[0]
    Path(f"{out}.partial").write_bytes(header.encode() + first + b"\0" * 500 + b"\n")
    out.unlink()
    echo = Echo()
    await do(file, out, echo)
    assert echo.asked == ["b"] and [row["custom_id"] for row in rows(out)] == ["a", "b"]


async def test_an_answer_of_any_letters_is_one_line(tmp_path: Path) -> None:
    """Half surrogates, line separators and newlines in an answer stay inside their line and come back unchanged."""
    text = "\ud83d \u2028 \n \x00 ñ"

    class Strange(Echo):
        async def ask(self, line: Line, id: str) -> Row:
            return answered(id, line.custom_id, 200, "", {"text": text})

    await do(write(tmp_path / "in", line("a")), tmp_path / "out", Strange())
    (row,) = [json.loads(each) for each in (tmp_path / "out").read_bytes().split(b"\n") if each]
    assert row["response"]["body"]["text"] == text


async def test_what_belongs_to_something_else_is_refused(tmp_path: Path) -> None:
    """An existing output, another input's partial file and a file that is no batch's are left as they are."""
    file, other, out = write(tmp_path / "in", line("a")), write(tmp_path / "in2", line("b")), tmp_path / "out"
    partial = tmp_path / "out.partial"
    out.write_text("mine")
    with pytest.raises(BatchError, match="exists already"):
        await do(file, out, Echo())
    with pytest.raises(BatchError, match="input itself"):
        await do(file, file, Echo(), overwrite=True)
    assert out.read_text() == "mine" and not partial.exists()
    assert (await do(file, out, Echo(), overwrite=True))[0] and rows(out)[0]["custom_id"] == "a"
    out.unlink()
    Journal.open(out, Source.open(file), False, lambda row: None).close()
    with pytest.raises(BatchError, match="begun with another input"):
        await do(other, out, Echo())
    partial.write_text("notes of mine\n")
    with pytest.raises(BatchError, match="not a batch's output"):
        await do(file, out, Echo())
    assert partial.read_text() == "notes of mine\n"


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    """While one batch has an output another cannot begin it; afterwards it can."""
    source = Source.open(write(tmp_path / "in", line("a")))
    first = Journal.open(tmp_path / "out", source, False, lambda row: None)
    with pytest.raises(BatchError, match="another process"):
        Journal.open(tmp_path / "out", source, False, lambda row: None)
    first.close()
    Journal.open(tmp_path / "out", source, False, lambda row: None).close()


def test_a_full_disk_costs_no_line(tmp_path: Path) -> None:
    """A line that could be written in part only is taken back, and the error says where what is done stays."""
    source = Source.open(write(tmp_path / "in", line("a"), line("b")))
    journal = Journal.open(tmp_path / "out", source, False, lambda row: None)
    row = answered(journal.id(1), "a", 200, "", {})
    journal.append(1, row)
    size = journal.partial.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))
    try:
        with pytest.raises(BatchError, match="cannot be written"):
            journal.append(2, answered(journal.id(2), "b", 200, "", {"text": "x" * 100}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
        journal.close()
    assert journal.partial.stat().st_size == size and not journal.done(2)


# The gateway


async def test_a_batch_through_the_gateway(tmp_path: Path, fake: FakeTriton) -> None:
    """Chats and completions are answered, a refused request is a response with its status, and all have request ids."""
    fake.script = answer("Hola")
    fake.by_text = {"bad": [failure("it broke")]}
    chat = {"model": "m", "messages": [{"role": "user", "content": "Hola"}]}
    lines = [
        line("a"),
        line("chat", url="/v1/chat/completions", body=chat),
        line("refused", body={"model": "m", "prompt": "x", "temperature": 9}),
        line("nobody", body={"model": "nobody", "prompt": "x"}),
        line("bad", "bad"),
        line("z"),
    ]
    async with serving(fake) as stack, asker(stack.url, retries=1) as client:
        whole, tally = await do(write(tmp_path / "in", *lines), tmp_path / "out", client)
    found = {row["custom_id"]: row for row in rows(tmp_path / "out")}
    assert whole and (tally.succeeded, tally.failed) == (3, 3)
    assert {name: row["response"]["status_code"] for name, row in found.items()} == {
        "a": 200, "chat": 200, "refused": 400, "nobody": 404, "bad": 500, "z": 200,
    }  # fmt: skip
    assert all(row["error"] is None and row["response"]["request_id"] for row in found.values())
    assert found["chat"]["response"]["body"]["choices"][0]["message"]["content"] == "Hola"
    assert found["refused"]["response"]["body"]["error"]["param"] == "temperature"
    assert len(tally.reasons) == 3


async def test_what_may_pass_is_asked_again(tmp_path: Path, fake: FakeTriton) -> None:
    """A full queue, a lost stream and a failure of the model are followed by a success, and no line fails."""
    fake.scripts = [["close"], [failure("it broke")], [failure("it broke")]]
    fake.script = answer("Hola")
    file = write(tmp_path / "in", *(line(f"r{n}", f"prompt {n}") for n in range(4)))
    async with serving(fake, retries=0) as stack, asker(stack.url) as client:
        whole, tally = await do(file, tmp_path / "out", client)
    assert whole and (tally.succeeded, tally.failed) == (4, 0) and len(fake.requests) == 7


async def test_a_gateway_that_goes_and_comes_back(tmp_path: Path) -> None:
    """Connections that are refused or cut are retried; a gateway that stays away fails the lines and not the batch."""
    calls = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        await reader.readuntil(b"\r\n\r\n")
        if calls > 2:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    file = write(tmp_path / "in", line("a"))
    async with asker(url) as client:
        _, tally = await do(file, tmp_path / "out", client)
        assert (tally.succeeded, calls) == (1, 3)
        server.close()
        await server.wait_closed()
        whole, tally = await do(file, tmp_path / "out", client, overwrite=True)
    (row,) = rows(tmp_path / "out")
    assert whole and tally.failed == 1 and row["response"] is None
    assert row["error"]["code"] == "connection_failed" and row["error"]["line"] == 1


async def test_a_slow_answer_ends_in_time(tmp_path: Path, fake: FakeTriton) -> None:
    """--timeout ends a line whose answer does not come, and the gateway gives up its stream; the others go on."""
    fake.by_text = {"slow": [3600.0]}
    file = write(tmp_path / "in", line("slow", "slow"), *(line(f"r{n}", f"{n}") for n in range(5)))
    async with serving(fake, stall_s=60.0) as stack, asker(stack.url, timeout_s=0.4, concurrency=2) as client:
        began = time.monotonic()
        whole, tally = await do(file, tmp_path / "out", client)
        assert time.monotonic() - began < 3
        await until(lambda: fake.running == 0)
    found = rows(tmp_path / "out")
    assert whole and (tally.succeeded, tally.failed) == (5, 1)
    assert found[0]["error"]["code"] == "timeout"


async def test_a_limit_is_waited_for_without_hammering(tmp_path: Path) -> None:
    """A server that takes 8 requests and then says 429 for a second is left alone by all workers for that second."""
    refused_at: list[float] = []
    asked_at: list[float] = []

    def reply(number: int, body: Row) -> tuple[int, dict[str, str], Any]:
        now = time.monotonic()
        asked_at.append(now)
        if number > 8 and (not refused_at or now - refused_at[0] < 1.0):
            refused_at.append(now)
            return 429, {"Retry-After": "1"}, {"error": {"message": "used up"}}
        return 200, {}, {}

    file = write(tmp_path / "in", *(line(f"r{n}") for n in range(30)))
    async with scripted(reply) as url, asker(url, concurrency=6, retries=0) as client:
        whole, tally = await do(file, tmp_path / "out", client)
    assert whole and (tally.succeeded, tally.failed) == (30, 0)
    assert 1 <= len(refused_at) <= 6, "only what was under way was refused"
    assert not [at for at in asked_at if refused_at[-1] < at < refused_at[-1] + 0.9]


async def test_a_limit_that_ends_too_late_ends_the_run(tmp_path: Path) -> None:
    """A day's limit that is used up loses nothing: the run ends with a hint and the next one goes on."""
    open_again = False

    def reply(number: int, body: Row) -> tuple[int, dict[str, str], Any]:
        late = number > 3 and not open_again
        return (429, {"Retry-After": "7200"}, {"error": {"message": "used up"}}) if late else (200, {}, {})

    file = write(tmp_path / "in", *(line(f"r{n}") for n in range(9)))
    async with scripted(reply) as url, asker(url, concurrency=1) as client:
        with pytest.raises(BatchError, match="used up for 7200 s"):
            await do(file, tmp_path / "out", client)
        open_again = True
        whole, tally = await do(file, tmp_path / "out", client)
    assert whole and (tally.succeeded, tally.skipped) == (9, 3)


async def test_a_missing_key_costs_no_line(tmp_path: Path) -> None:
    """A 401 ends the run with a hint instead of being every line's answer; with a key the same command goes on."""
    file = write(tmp_path / "in", *(line(f"r{n}") for n in range(9)))
    async with (
        scripted(lambda number, body: (401 if number < 2 else 200, {}, {})) as url,
        asker(url, concurrency=1) as client,
    ):
        with pytest.raises(BatchError, match="asks for an API key"):
            await do(file, tmp_path / "out", client)
        whole, tally = await do(file, tmp_path / "out", client)
    assert whole and tally.succeeded == 9


@pytest.mark.parametrize(
    ("status", "retries", "tries"), [(503, 2, 3), (500, 0, 1), (408, 1, 2), (400, 5, 1), (404, 5, 1), (307, 5, 1)]
)
async def test_retries_are_bounded(tmp_path: Path, status: int, retries: int, tries: int) -> None:
    """What may pass is tried 1 + retries times, anything else once; the last answer is the line's."""
    count = 0

    def reply(number: int, body: Row) -> tuple[int, dict[str, str], Any]:
        nonlocal count
        count = number
        return status, {"X-Request-Id": f"r{number}", "Location": "/elsewhere"}, {"error": {"message": "no"}}

    async with scripted(reply) as url, asker(url, retries=retries) as client:
        await do(write(tmp_path / "in", line("a")), tmp_path / "out", client)
    (row,) = rows(tmp_path / "out")
    assert count == tries and row["error"] is None
    assert row["response"] == {
        "status_code": status, "request_id": f"r{tries}", "body": {"error": {"message": "no"}},
    }  # fmt: skip


async def test_the_key_is_sent_and_not_shown() -> None:
    """settings.api_key goes out as a bearer token, and no repr has it."""
    seen: list[str | None] = []

    async def handle(request: web.Request) -> web.Response:
        seen.append(request.headers.get("authorization"))
        return web.json_response({})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"127.0.0.1:{runner.addresses[0][1]}/prefix/"
    async with asker(url, api_key="sk-secret") as client:
        await client.ask(Line(1, "a", "/v1/completions", b"{}"), "id")
        await batchclient.slots(url, "sk-secret")
        assert "secret" not in repr(client)
    await runner.cleanup()
    assert seen == ["Bearer sk-secret"] * 2


async def test_slots_are_the_gateways(fake: FakeTriton) -> None:
    """As many lines at once as the models have slots; a server that does not tell is asked little at a time."""
    async with serving(fake) as stack:
        assert await batchclient.slots(stack.url, None) == 4
        fake.beat["slots"] = 500
        gateway = stack.gateway
        await until(lambda: bool((beat := gateway.served[0].beat) and beat.slots == 500))
        assert await batchclient.slots(stack.url, None) == 64
    async with scripted(lambda number, body: (200, {}, {})) as url:
        assert await batchclient.slots(url, None) == batchclient.OTHER_SLOTS
    with pytest.raises(BatchError, match="does not answer"):
        await batchclient.slots(url, None)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.lists(st.booleans(), min_size=1, max_size=40))
def test_the_gate_bounds_and_never_shuts_for_good(most: int, refusals: list[bool]) -> None:
    """Never more than `most` inside, never none for ever, whatever is answered and refused."""
    inside = highest = 0

    async def one(gate: Gate, refused: bool) -> None:
        nonlocal inside, highest
        async with gate.passing():
            inside += 1
            highest = max(highest, inside)
            await asyncio.sleep(0)
            inside -= 1
            gate.refused(0.0005) if refused else gate.answered()

    async def all_of_them() -> None:
        gate = Gate(most)
        async with asyncio.timeout(10):
            await asyncio.gather(*(one(gate, refused) for refused in refusals))

    asyncio.run(all_of_them())
    assert 1 <= highest <= most
