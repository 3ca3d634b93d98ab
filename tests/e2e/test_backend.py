"""The backend inside the real Triton, asked through Triton's own protocols and through the gateway."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from tritonclient.utils import InferenceServerException

from tests.clock import awake

from .stack import Stack, wait_until

LONG = " ".join(["one"] * 1900)  # 238 steps of prefill: about five seconds


def generate(stack: Stack, stream: bool = False, **body: object) -> tuple[int, list[dict]]:
    """Ask Triton's generate extension; the events of its answer."""
    path = f"/v2/models/{stack.model}/generate{'_stream' if stream else ''}"
    full = {"text_input": "one", "stream": stream, "return_finish_reason": True, **body}
    status, _, answer = stack.request("POST", path, full, "TRITON_HTTP", timeout=60)
    lines = [line.removeprefix("data: ") for line in answer.decode().splitlines() if line.strip()]
    return status, [json.loads(line) for line in lines]


def raw_stream(stack: Stack, **body: object) -> socket.socket:
    """A generate_stream request on a bare socket, so that the client can vanish at any moment."""
    data = json.dumps({"text_input": "one", "stream": True, "max_tokens": 1500, **body}).encode()
    sock = socket.create_connection(("127.0.0.1", stack.ports["TRITON_HTTP"]), timeout=10)
    head = f"POST /v2/models/{stack.model}/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    sock.sendall(head.encode() + data)
    return sock


@pytest.fixture(autouse=True)
def idle_before_and_after(stack: Stack) -> Iterator[None]:
    """Each test starts with free slots and leaves them free."""
    wait_until(lambda: stack.load()["running"] + stack.load()["waiting"] == 0, 10, "idle before")
    yield
    wait_until(lambda: stack.load()["running"] + stack.load()["waiting"] == 0, 10, "idle after")


def test_generate_answers_once_and_generate_stream_token_by_token(stack: Stack):
    """Without `stream` exactly one response, with it one a token; the same text, usage and finish reason either way."""
    counts = {"max_tokens": 5, "return_num_input_tokens": True, "return_num_output_tokens": True}
    status, once = generate(stack, **counts)
    assert status == 200 and len(once) == 1
    assert once[0]["text_output"] == "two three one two three" and once[0]["finish_reason"] == "length"
    assert (once[0]["num_input_tokens"], once[0]["num_output_tokens"]) == (1, 5)
    status, events = generate(stack, stream=True, **counts)
    assert status == 200 and "".join(e["text_output"] for e in events) == once[0]["text_output"]
    assert sum(e["num_output_tokens"] for e in events) == 5
    assert [e["finish_reason"] for e in events if e["finish_reason"]] == ["length"] == [events[-1]["finish_reason"]]


def test_input_is_echoed_only_when_asked(stack: Stack):
    """exclude_input_in_output false puts the prompt in front of the answer."""
    _, events = generate(stack, text_input="one two", max_tokens=1, exclude_input_in_output=False)
    assert events[0]["text_output"] == "one twothree"


@pytest.mark.parametrize(
    ("count", "good"),
    [(0, False), (1, True), pytest.param(1999, True, marks=pytest.mark.slow), (2000, False), (2001, False)],
)
def test_prompts_at_the_limits_of_the_context(stack: Stack, count, good):
    """Of a context of 2000 tokens: 0, 2000 and 2001 prompt tokens are refused before they queue, 1 and 1999 not."""
    sampling = {"prompt_token_ids": [0] * count, "max_tokens": 1}
    status, events = generate(stack, text_input="", sampling_parameters=json.dumps(sampling))
    if good:
        assert status == 200 and events[0]["text_output"] == "two" and events[0]["finish_reason"] == "length"
    else:
        assert status == 400 and events[0]["error"].startswith("invalid_argument: ")


def test_what_can_never_fit_is_refused_before_it_queues(stack: Stack):
    """max_tokens beyond the room that the prompt leaves is an error that says how much room there is."""
    status, events = generate(stack, max_tokens=2000)
    assert status == 400 and "leave 1999 of" in events[0]["error"]


def test_sixty_four_clients_on_four_slots(stack: Stack):
    """All are answered in full and in order, four at a time."""
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda _: generate(stack, max_tokens=4), range(64)))
    assert all(status == 200 and e[0]["text_output"] == "two three one two" for status, e in answers)


def test_a_full_queue_refuses_at_once(stack: Stack):
    """With 4 running and 80 waiting the next request gets resource_exhausted, over the gateway 503 with Retry-After."""
    clients = [raw_stream(stack) for _ in range(4)]
    try:
        # else the queue could be full before the first ones have left it for their slots
        wait_until(lambda: stack.load()["running"] == 4, 10, "every slot is taken")
        clients += [raw_stream(stack) for _ in range(80)]
        wait_until(lambda: stack.load()["waiting"] == 80, 10, "the queue is full")
        _, events = generate(stack)
        assert events[0]["error"].startswith("resource_exhausted: ") and "max_queue" in events[0]["error"]
        asked = {"model": stack.model, "prompt": "one", "seed": time.time_ns() % 2**31}  # no answer to it is cached
        status, headers, _ = stack.request("POST", "/v1/completions", asked)
        assert status == 503 and int(headers["retry-after"]) >= 1
    finally:
        for client in clients:
            client.close()


@pytest.mark.parametrize("edge", ["triton", "gateway", "gateway without stream"])
@pytest.mark.parametrize("phase", ["streaming", "prefilling", "queued"])
def test_a_client_that_hangs_up_frees_its_slot_within_a_second(stack: Stack, phase, edge):
    """Queued, prefilling or streaming, over Triton's HTTP or the gateway's: its place is free within a second."""
    blockers = [raw_stream(stack) for _ in range(4)] if phase == "queued" else []
    if blockers:
        wait_until(lambda: stack.load()["running"] == 4, 5, "all slots are taken")
    prompt = LONG if phase == "prefilling" else "one"
    if edge == "triton":
        client = raw_stream(stack, text_input=prompt, max_tokens=50 if phase == "prefilling" else 1500)
    else:
        body = {"model": stack.model, "prompt": prompt, "max_tokens": 50 if phase == "prefilling" else 1500}
        data = json.dumps({**body, "stream": edge == "gateway"}).encode()
        client = socket.create_connection(("127.0.0.1", stack.ports["HTTP"]), timeout=10)
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
    key = "waiting" if phase == "queued" else "running"
    wait_until(lambda: stack.load()[key] == 1, 5, phase)
    time.sleep(0.3)
    assert stack.load()[key] == 1
    client.close()
    wait_until(lambda: stack.load()[key] == 0, 1.0, "the place is free")
    for blocker in blockers:
        blocker.close()


def test_a_queued_stream_is_written_to_every_quarter_second(stack: Stack):
    """While it waits for a slot, a stream gets an empty response at least every 250 ms (0.4 s on a busy machine)."""
    with contextlib.ExitStack() as closing:
        for _ in range(4):
            closing.callback(raw_stream(stack).close)
        wait_until(lambda: stack.load()["running"] == 4, 5, "all slots are taken")
        queued = raw_stream(stack)
        closing.callback(queued.close)
        stamps = []
        while len(stamps) < 8:
            assert b'"text_output":""' in queued.recv(4096) or not stamps
            stamps.append(awake())
    gaps = np.diff(stamps[1:])
    assert np.median(gaps) <= 0.25 and gaps.max() < 0.4, gaps


@pytest.mark.slow
def test_enormous_prompts_delay_nobody_else(stack: Stack):
    """While four prompts of 4 MB are read and refused, heartbeats and a running stream go on as ever."""
    running = raw_stream(stack)
    wait_until(lambda: stack.load()["running"] == 1, 5, "the stream runs")
    delays = []
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        enormous = [pool.submit(generate, stack, text_input="one " * 1_000_000) for _ in range(4)]
        while not all(answer.done() for answer in enormous):
            began = awake()
            assert stack.load()["running"] == 1
            delays.append(awake() - began)
    running.close()
    assert all("leaves no room" in answer.result()[1][0]["error"] for answer in enormous)
    assert max(delays) < 0.8, max(delays)  # below the time after which the gateway calls a model not ready


def test_deadlines_are_kept(stack: Stack):
    """timeout_s and Triton's own timeout (microseconds) end a request with deadline_exceeded."""
    for body in ({"timeout_s": 0.3}, {"parameters": {"timeout": 300_000}}):
        began = awake()
        _, events = generate(stack, max_tokens=1500, **body)
        assert events[-1]["error"].startswith("deadline_exceeded: ") and awake() - began < 1.5


def test_stop_strings_end_the_answer_and_do_not_leak(stack: Stack):
    """The text ends before the stop string, also when it is spread over two tokens."""
    _, events = generate(stack, stream=True, max_tokens=50, sampling_parameters=json.dumps({"stop": ["one two"]}))
    assert "".join(e["text_output"] for e in events) == "two three " and events[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize("name", ["foo", "max_token"])
def test_unknown_parameters_are_refused_by_name(stack: Stack, name):
    """A misspelt parameter is an error, not silence."""
    status, events = generate(stack, **{name: 1})
    assert status == 400 and repr(name) in events[0]["error"]


def grpc_inputs(text: bytes, **sampling: object) -> list[grpcclient.InferInput]:
    values = {"text_input": text, "sampling_parameters": json.dumps(sampling).encode()}
    inputs = []
    for name, value in values.items():
        tensor = grpcclient.InferInput(name, [1], "BYTES")
        tensor.set_data_from_numpy(np.array([value], dtype=object))
        inputs.append(tensor)
    flag = grpcclient.InferInput("stream", [1], "BOOL")
    flag.set_data_from_numpy(np.array([True]))
    return [*inputs, flag]


@pytest.fixture
def grpc_stream(stack: Stack):
    """A tritonclient.grpc stream and the list that its callback fills."""
    client, got, ended = (
        grpcclient.InferenceServerClient(f"127.0.0.1:{stack.ports['TRITON_GRPC']}"),
        [],
        threading.Event(),
    )

    def callback(result, error) -> None:
        got.append(error or result)
        final = error is not None or result.get_response().parameters.get("triton_final_response")
        if error is not None or (final is not None and final.bool_param):
            ended.set()

    client.start_stream(callback)
    yield client, got, ended
    client.stop_stream(cancel_requests=True)
    client.close()


def test_tritonclient_grpc_streams_the_answer(stack: Stack, grpc_stream):
    """The real gRPC client gets the tokens one by one through ModelStreamInfer."""
    client, got, ended = grpc_stream
    client.async_stream_infer(stack.model, grpc_inputs(b"one", max_tokens=4), enable_empty_final_response=True)
    assert ended.wait(10)
    texts = [r.as_numpy("text_output") for r in got]
    assert b"".join(t[0] for t in texts if t is not None) == b"two three one two"


def test_tritonclient_grpc_hang_up_frees_the_slot(stack: Stack, grpc_stream):
    """Cancelling the gRPC stream reaches the backend."""
    client, got, _ = grpc_stream
    client.async_stream_infer(stack.model, grpc_inputs(b"one", max_tokens=1500))
    wait_until(lambda: len(got) > 3, 5, "tokens come")
    client.stop_stream(cancel_requests=True)
    wait_until(lambda: stack.load()["running"] == 0, 1.0, "the slot is free")


def test_invalid_utf8_is_refused(stack: Stack, grpc_stream):
    """Bytes that are no UTF-8 are an error of the request, over gRPC tensors and over the gateway's JSON."""
    client, got, ended = grpc_stream
    client.async_stream_infer(stack.model, grpc_inputs(b"one \xff\xfe"))
    assert ended.wait(10)
    assert isinstance(got[0], InferenceServerException) and "invalid_argument: text_input is not valid UTF-8" in str(
        got[0]
    )
    sock = socket.create_connection(("127.0.0.1", stack.ports["HTTP"]), timeout=10)
    body = b'{"model": "counting", "prompt": "\xff"}'
    sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    assert b" 400 " in sock.recv(4096).split(b"\r\n")[0]
    sock.close()


def test_tritonclient_http_reads_health_metadata_and_statistics(stack: Stack):
    """The real HTTP client finds the model alive, described and counted."""
    client = httpclient.InferenceServerClient(f"127.0.0.1:{stack.ports['TRITON_HTTP']}")
    try:
        assert client.is_server_live() and client.is_model_ready(stack.model)
        metadata = client.get_model_metadata(stack.model)
        assert [i["name"] for i in metadata["inputs"]][:3] == ["text_input", "stream", "sampling_parameters"]
        assert client.get_model_config(stack.model)["model_transaction_policy"]["decoupled"]
        assert client.get_inference_statistics(stack.model)["model_stats"][0]["inference_count"] > 0
    finally:
        client.close()


def test_a_prompt_is_inspected_without_generating(stack: Stack):
    """inspect counts the prompt's tokens, gives the text of token ids, and refuses what generating would refuse."""

    def inspect(**fields: object) -> Any:
        return generate(stack, **{"text_input": "", **fields, "parameters": {"inspect": True}})[1][0]

    def said(**fields: object) -> Any:
        return json.loads(inspect(**fields)["text_output"])

    assert said(text_input="one two three") == {"tokens": 3, "text": None}
    assert said(sampling_parameters=json.dumps({"prompt_token_ids": [0, 2]})) == {"tokens": 2, "text": "one three"}
    messages = [{"role": "user", "content": "one two"}]
    assert said(sampling_parameters=json.dumps({"messages": messages}))["tokens"] == 2
    assert said(text_input="one " * 20_000)["tokens"] == 20_000
    assert "vocabulary" in inspect(sampling_parameters=json.dumps({"prompt_token_ids": [99]}))["error"]


def test_the_heartbeat_names_what_is_loaded(stack: Stack):
    """The digest is that of the manifest in the repository."""
    manifest = stack.repository / "counting" / "1" / "manifest.json"
    assert stack.load()["digest"] == hashlib.sha256(manifest.read_bytes()).hexdigest()[:32]
