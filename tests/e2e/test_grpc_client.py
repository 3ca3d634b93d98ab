"""tritonclient's gRPC clients, sync, asyncio and streaming, pointed at the gateway, beside Triton's own answers."""

from __future__ import annotations

import json
import queue
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from google.protobuf.json_format import MessageToDict
from tritonclient.utils import InferenceServerException

from .stack import Stack, wait_until

GREEDY = {"max_tokens": 5, "temperature": 0}
FLAGS = {"return_finish_reason": True, "return_num_input_tokens": True, "return_num_output_tokens": True}


@pytest.fixture(scope="module")
def stack(two_models: Stack) -> Stack:
    return two_models


def client_of(stack: Stack, port: str = "GRPC") -> triton.InferenceServerClient:
    return triton.InferenceServerClient(f"127.0.0.1:{stack.ports[port]}")


@pytest.fixture
def client(stack: Stack) -> Iterator[triton.InferenceServerClient]:
    with client_of(stack) as connected:
        yield connected


@pytest.fixture
def direct(stack: Stack) -> Iterator[triton.InferenceServerClient]:
    """A client of Triton itself."""
    with client_of(stack, "TRITON_GRPC") as connected:
        yield connected


def tensor(name: str, values: Any, dtype: Any) -> triton.InferInput:
    array = np.array(values, dtype=object if dtype is bytes else dtype)
    given = triton.InferInput(name, list(array.shape), {bytes: "BYTES", np.int32: "INT32", np.bool_: "BOOL"}[dtype])
    given.set_data_from_numpy(array)
    return given


def prompt(text: str = "one two", stream: bool = False, flags: dict[str, bool] | None = None, **sampling: Any) -> Any:
    """The inputs of a request to the counting model."""
    inputs = [tensor("text_input", [text], bytes)]
    inputs.append(tensor("sampling_parameters", [json.dumps({**GREEDY, **sampling})], bytes))
    for name, value in {"stream": stream, **(flags or {})}.items():
        inputs.append(tensor(name, [value], np.bool_))
    return inputs


def text(result: Any, name: str = "text_output") -> str:
    return b"".join(result.as_numpy(name).reshape(-1)).decode()


def streamed(client: triton.InferenceServerClient, *requests: dict[str, Any], **options: Any) -> list[Any]:
    """What a stream's callback is given, result or error, until every request has had its last response."""
    heard: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: heard.put(error or result.get_response()), **options)
    for request in requests:
        client.async_stream_infer("counting", **request)
    found, left = [], len(requests)
    while left:
        found.append(heard.get(timeout=20))
        left -= isinstance(found[-1], Exception) or found[-1].parameters["triton_final_response"].bool_param
    client.stop_stream()
    return found


def joined(responses: list[Any]) -> Any:
    """A stream as one message: the last one, with all text and the number of all tokens; how a busy engine divides its
    answer into chunks is not the same twice.
    """
    outputs = [{out.name: one.raw_output_contents[at] for at, out in enumerate(one.outputs)} for one in responses]
    whole = type(responses[-1])()
    whole.CopyFrom(responses[-1])
    names = [out.name for out in whole.outputs]
    assert all([out.name for out in one.outputs] == names and one.id == whole.id for one in responses)
    whole.raw_output_contents[names.index("text_output")] = b"".join(out["text_output"][4:] for out in outputs)
    if "num_output_tokens" in names:
        tokens = sum(int.from_bytes(out["num_output_tokens"], "little") for out in outputs)
        whole.raw_output_contents[names.index("num_output_tokens")] = tokens.to_bytes(4, "little")
    return whole


def idle(stack: Stack) -> bool:
    load = stack.load()
    return bool(load["running"] == 0 and load["waiting"] == 0)


def test_health_metadata_config_and_statistics(
    stack: Stack, client: triton.InferenceServerClient, direct: triton.InferenceServerClient
) -> None:
    """What a client asks of a server and its models is the very message that Triton gives, for versions too."""
    assert client.is_server_live() and client.is_server_ready()
    assert client.get_server_metadata().name == "truthgpt"
    for model in ("counting", "addsub"):
        assert client.is_model_ready(model) and client.is_model_ready(model, "1")
        assert not client.is_model_ready(model, "7")
        assert client.get_model_metadata(model) == direct.get_model_metadata(model)
        assert client.get_model_metadata(model, "1") == direct.get_model_metadata(model)
        assert client.get_model_config(model) == direct.get_model_config(model)
        ours, theirs = (one.get_inference_statistics(model).model_stats[0] for one in (client, direct))
        assert (ours.name, ours.version) == (theirs.name, theirs.version)
        assert set(MessageToDict(ours)) == set(MessageToDict(theirs))
    assert sorted(s.name for s in client.get_inference_statistics().model_stats) == ["addsub", "counting"]
    assert not client.is_model_ready("nope") and not direct.is_model_ready("nope")
    for missing in (("nope", ""), ("counting", "7")):
        for asked in (client, direct):
            with pytest.raises(InferenceServerException) as caught:
                asked.get_model_metadata(*missing)
            assert caught.value.status() == "StatusCode.NOT_FOUND"


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_infer_on_a_generation_model(client: triton.InferenceServerClient, compression: str | None) -> None:
    """Unary infer, which Triton refuses for such a model, gives the whole answer in the outputs that were asked for."""
    outputs = [triton.InferRequestedOutput(name) for name in ("text_output", "finish_reason", "num_output_tokens")]
    result = client.infer(
        "counting", prompt(), outputs=outputs, request_id="r7", compression_algorithm=compression,
        headers={"x-request-id": "mine"},
    )  # fmt: skip
    assert text(result) == "three one two three one"
    assert text(result, "finish_reason") == "length"
    assert result.as_numpy("num_output_tokens").tolist() == [5]
    response = result.get_response()
    assert (response.id, response.model_name, response.model_version) == ("r7", "counting", "1")
    assert text(client.infer("counting", prompt(), parameters={"return_finish_reason": True}), "finish_reason")


def test_infer_on_another_model(client: triton.InferenceServerClient, direct: triton.InferenceServerClient) -> None:
    """Numbers and texts come back from a model that does not generate, message for message as from Triton."""
    inputs = [
        tensor("A", [1, 2**31 - 1, -5], np.int32), tensor("B", [4, 0, 6], np.int32),
        tensor("TEXT", ["¿Qué?", "日本"], bytes),
    ]  # fmt: skip
    some = [triton.InferRequestedOutput(name) for name in ("ECHO", "SUM")]
    best = [triton.InferRequestedOutput("SUM", class_count=1)]
    for outputs in (None, some, best):
        ours, theirs = (one.infer("addsub", inputs, request_id="q", outputs=outputs) for one in (client, direct))
        assert ours.get_response() == theirs.get_response()
    assert text(client.infer("addsub", inputs), "ECHO") == "¿Qué?日本"
    heard: queue.Queue[Any] = queue.Queue()
    client.async_infer("addsub", inputs, lambda result, error: heard.put(error or result))
    assert heard.get(timeout=10).as_numpy("SUM").tolist() == [5, 2**31 - 1, 1]


def test_what_is_wrong_is_said_with_tritons_status(
    client: triton.InferenceServerClient, direct: triton.InferenceServerClient
) -> None:
    """Wrong names, types, shapes, outputs, models and versions have Triton's status, and a model's own sentence."""
    a, b = tensor("A", [1, 2], np.int32), tensor("B", [3, 4], np.int32)
    no, wide = [triton.InferRequestedOutput("NO")], tensor("B", [[1], [2]], np.int32)
    cases: list[tuple[str, str, Any, Any]] = [
        ("addsub", "", [a], None), ("addsub", "", [a, b, tensor("C", [1], np.int32)], None),
        ("addsub", "", [a, wide], None), ("addsub", "", [a, tensor("B", ["x", "y"], bytes)], None),
        ("addsub", "", [a, b], no),
    ]  # fmt: skip
    absent = [("nope", "", [a], None), ("addsub", "7", [a, b], None)]
    for model, version, inputs, outputs in cases + absent:
        said = []
        for asked in (client, direct):
            with pytest.raises(InferenceServerException) as caught:
                asked.infer(model, inputs, version, outputs)
            said.append((caught.value.status(), re.sub(r"^\[request id: [^]]*\] ", "", caught.value.message()).strip()))
        assert said[0] == said[1] or (model, version, inputs, outputs) in absent, said
        assert said[0][0] == said[1][0]
    with pytest.raises(InferenceServerException) as caught:
        client.infer("addsub", [a, tensor("B", [1, 2, 3], np.int32)])
    assert caught.value.status() == "StatusCode.INTERNAL"  # a fault of the model's code: details are for the log only
    assert "differ" not in caught.value.message()
    for control in (client.get_model_repository_index, client.get_log_settings, partial(client.load_model, "addsub")):
        with pytest.raises(InferenceServerException) as caught:
            control()
        assert caught.value.status() == "StatusCode.PERMISSION_DENIED" and "admin port" in caught.value.message()


@pytest.mark.parametrize("flags", [{}, FLAGS, {"exclude_input_in_output": False}], ids=str)
@pytest.mark.parametrize("stream", [True, False])
def test_a_stream_is_tritons_own(
    client: triton.InferenceServerClient, direct: triton.InferenceServerClient, flags: dict[str, bool], stream: bool
) -> None:
    """The stream of chunks, or of one whole answer, is the one that Triton sends, but for where the text is divided."""
    request = {
        "inputs": prompt("one", stream, flags, max_tokens=3), "request_id": "s1", "enable_empty_final_response": True,
    }  # fmt: skip
    headers = {"cache-control": "no-store"}
    ours, theirs = streamed(client, request, headers=headers), streamed(direct, request)
    assert joined(ours) == joined(theirs)
    assert [one.parameters["triton_final_response"].bool_param for one in ours] == [False] * (len(ours) - 1) + [True]
    assert len(ours) > 1 if stream else ours == theirs


def test_several_requests_share_a_stream(client: triton.InferenceServerClient) -> None:
    """Requests of one stream are answered beside each other, a wrong one with an error of its own."""
    requests = [
        {"inputs": prompt(f"one {'two ' * n}", True, max_tokens=20 - 5 * n), "request_id": str(n)} for n in range(3)
    ]
    wrong = {"inputs": prompt(max_tokens=10**6), "request_id": "wrong"}
    heard = streamed(client, *requests, wrong)
    (error,) = [one for one in heard if isinstance(one, Exception)]
    assert "max_tokens" in str(error)
    words = {n: 0 for n in "012"}
    order = [one.id for one in heard if not isinstance(one, Exception)]
    for one in heard:
        if not isinstance(one, Exception):
            words[one.id] += len(one.raw_output_contents[0][4:].split())
    assert words == {"0": 20, "1": 15, "2": 10}
    assert order != sorted(order)


async def test_the_asyncio_client(stack: Stack) -> None:
    """tritonclient's asyncio client infers, streams, and ends a stream by its status where it asked for that."""
    address = f"127.0.0.1:{stack.ports['GRPC']}"
    async with triton_aio.InferenceServerClient(address) as client:
        assert await client.is_model_ready("counting")
        assert text(await client.infer("counting", prompt())) == "three one two three one"

        async def requests(*inputs: Any) -> Any:
            for one in inputs:
                yield {"model_name": "counting", "inputs": one}

        heard = [pair async for pair in client.stream_infer(requests(prompt("one", True)))]
        assert not any(error for _, error in heard)
        assert "".join(text(result) for result, _ in heard) == "two three one two three"
        heard = [pair async for pair in client.stream_infer(requests(prompt(max_tokens=10**6)))]
        assert "max_tokens" in str(heard[0][1])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            strict = {"triton_grpc_error": "true"}
            [pair async for pair in client.stream_infer(requests(prompt(max_tokens=10**6)), headers=strict)]
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_deadline_and_a_cancel_free_the_slot(stack: Stack, client: triton.InferenceServerClient) -> None:
    """Who waits no longer, cancels, or is killed leaves the model free within a second."""
    endless: Any = {"inputs": prompt(stream=True, max_tokens=1900), "request_id": "e"}
    with pytest.raises(InferenceServerException) as caught:
        client.infer("counting", prompt("two", max_tokens=1900), client_timeout=0.5)
    assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    wait_until(lambda: idle(stack), 1, "the deadline has freed the slot")
    heard: queue.Queue[Any] = queue.Queue()
    call = client.async_infer("counting", prompt("three", max_tokens=1900), lambda result, error: heard.put(error))
    wait_until(lambda: stack.load()["running"] == 1, 5, "it runs")
    call.cancel()
    wait_until(lambda: idle(stack), 1, "the cancelled call has freed the slot")
    client.start_stream(lambda result, error: heard.put(error))
    client.async_stream_infer("counting", **endless)
    wait_until(lambda: stack.load()["running"] == 1, 5, "it runs")
    client.stop_stream(cancel_requests=True)
    wait_until(lambda: idle(stack), 1, "the cancelled stream has freed the slot")
    lines = (
        "import grpc, sys",
        "call = grpc.insecure_channel(sys.argv[1]).stream_stream('/inference.GRPCInferenceService/ModelStreamInfer')",
        "[None for _ in call(iter([bytes.fromhex(sys.argv[2])]))]",
    )
    request = triton._utils._get_inference_request(model_name="counting", model_version="", request_id="k",
        outputs=None, sequence_id=0, sequence_start=False, sequence_end=False, priority=0, timeout=None,
        parameters=None, inputs=endless["inputs"])  # fmt: skip
    argv = [
        sys.executable,
        "-c",
        "\n".join(lines),
        f"127.0.0.1:{stack.ports['GRPC']}",
        request.SerializeToString().hex(),
    ]
    with subprocess.Popen(argv) as process:
        wait_until(lambda: stack.load()["running"] == 1, 10, "it runs")
        process.kill()
        wait_until(lambda: idle(stack), 1, "the killed client has freed the slot")


def test_hostile_messages_cost_little(stack: Stack, client: triton.InferenceServerClient) -> None:
    """Too large a message, one that unpacks to too much, too much metadata and what is no gRPC are refused while others
    are served, and the worker does not grow by what they would be.
    """
    (worker,) = [p for p in psutil.Process(stack.pid("gateway")).children() if "orchestrator.worker" in p.cmdline()]
    before = worker.memory_info().rss
    with grpc.insecure_channel(f"127.0.0.1:{stack.ports['GRPC']}") as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for body, options in (
            (bytes(8 << 20), {}),
            (bytes(64 << 20), {"compression": grpc.Compression.Gzip}),
            (b"", {"metadata": (("x-big", "y" * 100_000),)}),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                infer(body, timeout=30, **options)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, caught.value
    for garbage in (
        b"GET / HTTP/1.1\r\nhost: h\r\n\r\n",
        bytes(5000),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 99,
    ):
        with socket.create_connection(("127.0.0.1", stack.ports["GRPC"]), timeout=10) as sock:
            sock.sendall(garbage)
            while sock.recv(65536):  # until it is closed
                continue
    assert client.is_server_ready()
    (peak_kb,) = re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{worker.pid}/status").read_text())
    assert (int(peak_kb) << 10) - before < 40 << 20
