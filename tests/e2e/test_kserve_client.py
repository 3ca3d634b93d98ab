"""tritonclient's HTTP client, pointed at the gateway instead of Triton, and Triton's own answers next to ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from .stack import Stack

GREEDY = {"text_input": "one two", "max_tokens": 7, "temperature": 0}
ALL = {"return_finish_reason": True, "return_num_input_tokens": True, "return_num_output_tokens": True}


@pytest.fixture(scope="module")
def stack(two_models: Stack) -> Stack:
    return two_models


@pytest.fixture(scope="module")
def admin_key(stack: Stack) -> str:
    return str(json.loads(stack.cli("keys", "create", "--tenant", "ops", "--scope", "admin", "--json").stdout)["key"])


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[triton.InferenceServerClient]:
    """A client of the gateway."""
    client = client_of(stack)
    yield client
    client.close()


def client_of(stack: Stack, port: str = "HTTP") -> triton.InferenceServerClient:
    return triton.InferenceServerClient(f"127.0.0.1:{stack.ports[port]}")


def tensor(name: str, values: Any, dtype: Any, binary: bool = True) -> triton.InferInput:
    array = np.array(values, dtype=object if dtype is bytes else dtype)
    kind = {bytes: "BYTES", np.int32: "INT32", np.float32: "FP32", np.bool_: "BOOL"}[dtype]
    given = triton.InferInput(name, list(array.shape), kind)
    given.set_data_from_numpy(array, binary_data=binary)
    return given


def text(result: triton.InferResult, name: str) -> list[str]:
    return [one.decode() if isinstance(one, bytes) else str(one) for one in result.as_numpy(name).reshape(-1)]


def both(stack: Stack, path: str, body: object) -> list[tuple[int, Any]]:
    """Status and decoded body of the gateway's answer and of Triton's own."""
    answers = [stack.request("POST", path, body, port) for port in ("HTTP", "TRITON_HTTP")]
    return [(status, json.loads(data)) for status, _, data in answers]


def test_health_metadata_config_and_statistics(stack: Stack, client: triton.InferenceServerClient) -> None:
    """What a client asks of a server and its models is answered as by Triton, and for versions too."""
    direct = client_of(stack, "TRITON_HTTP")
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata()["name"] == "truthgpt"
    for model in ("counting", "addsub"):
        assert client.is_model_ready(model)
        assert client.is_model_ready(model, "1")
        assert not client.is_model_ready(model, "7")
        assert client.get_model_metadata(model) == direct.get_model_metadata(model)
        assert client.get_model_metadata(model, "1") == direct.get_model_metadata(model)
        assert client.get_model_config(model) == direct.get_model_config(model)
        assert client.get_inference_statistics(model)["model_stats"][0]["name"] == model
    names = [row["name"] for row in client.get_inference_statistics()["model_stats"]]
    assert sorted(names) == ["addsub", "counting"]
    assert not client.is_model_ready("nope")
    for missing in (("nope", ""), ("counting", "7")):
        with pytest.raises(InferenceServerException) as caught:
            client.get_model_metadata(*missing)
        assert caught.value.status() == "404"
    direct.close()


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_infer_on_a_generation_model(
    client: triton.InferenceServerClient, binary: bool, compression: str | None
) -> None:
    """Plain infer, which Triton refuses for such a model, gives the collected answer in the form that was asked for."""
    sampling = json.dumps({"max_tokens": 4, "temperature": 0})
    inputs = [
        tensor("text_input", ["one"], bytes, binary),
        tensor("sampling_parameters", [sampling], bytes, binary),
        tensor("return_num_input_tokens", [True], np.bool_, binary),
    ]
    names = ("text_output", "finish_reason", "num_output_tokens")
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in names]
    result = client.infer(
        "counting", inputs, request_id="r7", outputs=outputs, request_compression_algorithm=compression
    )
    assert text(result, "text_output") == ["two three one two"]
    assert text(result, "finish_reason") == ["length"]
    assert result.as_numpy("num_output_tokens").tolist() == [4]
    assert result.as_numpy("num_output_tokens").dtype == np.uint32
    assert result.as_numpy("num_input_tokens") is None
    assert {k: v for k, v in result.get_response().items() if k != "outputs"} == {
        "id": "r7", "model_name": "counting", "model_version": "1",
    }  # fmt: skip
    assert client.infer("counting", inputs, model_version="1").as_numpy("num_input_tokens").tolist() == [1]


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_infer_on_another_model(client: triton.InferenceServerClient, binary: bool, compression: str | None) -> None:
    """Numbers and texts go through the gateway to a model that does not generate, and come back."""
    inputs = [
        tensor("A", [1, 2**31 - 1, -5], np.int32, binary),
        tensor("B", [4, 0, 6], np.int32, binary),
        tensor("TEXT", ["¿Qué?", "日本"], bytes, binary),
    ]
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("SUM", "ECHO")]
    result = client.infer("addsub", inputs, request_id="q", outputs=outputs, request_compression_algorithm=compression)
    assert result.as_numpy("SUM").tolist() == [5, 2**31 - 1, 1]
    assert text(result, "ECHO") == ["¿Qué?", "日本"]
    assert result.as_numpy("DIFF") is None
    assert result.get_response()["id"] == "q"
    everything = client.infer("addsub", inputs[:2])
    assert everything.as_numpy("DIFF").tolist() == [-3, 2**31 - 1, -11]
    best = client.infer("addsub", inputs, outputs=[triton.InferRequestedOutput("SUM", class_count=1)])
    assert text(best, "SUM") == [f"{2**31 - 1}:1"]


def test_what_is_wrong_with_an_inference_is_said_as_triton_says_it(
    stack: Stack, client: triton.InferenceServerClient
) -> None:
    """Wrong names, types, shapes and outputs raise the client's exception with Triton's status and sentence."""
    a, b = tensor("A", [1, 2], np.int32), tensor("B", [3, 4], np.int32)
    direct = client_of(stack, "TRITON_HTTP")
    no = [triton.InferRequestedOutput("NO")]
    cases: list[tuple[list[triton.InferInput], Any]] = [
        ([a], None), ([a, b, tensor("C", [1], np.int32)], None), ([a, tensor("B", [1, 2], np.float32)], None),
        ([a, tensor("B", [[1], [2]], np.int32)], None), ([a, b], no),
    ]  # fmt: skip
    for inputs, outputs in cases:
        said = []
        for asked in (client, direct):
            with pytest.raises(InferenceServerException) as caught:
                asked.infer("addsub", inputs, outputs=outputs)
            said.append(
                (caught.value.status(), str(caught.value.message()).partition("] ")[2] or caught.value.message())
            )
        ours, theirs = said
        assert ours[0] == theirs[0] == "400"
        assert ours[1].strip() in theirs[1].strip() or theirs[1].strip() in ours[1].strip()
    with pytest.raises(InferenceServerException) as caught:
        client.infer("addsub", [a, tensor("B", [1, 2, 3], np.int32)])
    assert caught.value.status() == "500"  # a fault of the model's code: its details are for the log only
    assert "differ" not in caught.value.message()
    direct.close()
    for wrong in (
        tensor("text", ["x"], bytes),
        tensor("text_input", [1], np.int32),
        tensor("text_input", ["x", "y"], bytes),
    ):
        with pytest.raises(InferenceServerException) as caught:
            client.infer("counting", [wrong])
        assert caught.value.status() == "400"


@pytest.mark.parametrize(
    "change",
    [
        {}, ALL, {"id": "x1"}, {"exclude_input_in_output": False}, {"stop": "one"}, {"max_tokens": 1, **ALL},
        {"sampling_parameters": '{"max_tokens": 3}', "max_tokens": 9, **ALL}, {"parameters": {"top_k": 2}},
        {"text_input": "", "sampling_parameters": '{"messages": [{"role": "user", "content": "two"}]}', **ALL},
        {"text_input": "", "sampling_parameters": '{"prompt_token_ids": [0, 1]}', **ALL},
    ],
    ids=str,
)  # fmt: skip
def test_generate_answers_as_triton_does(stack: Stack, change: dict[str, object]) -> None:
    """For the same body `generate` and `generate_stream` give field by field what Triton itself gives."""
    body = {**GREEDY, **change}
    ours, theirs = both(stack, "/v2/models/counting/generate", body)
    assert ours == theirs
    assert ours[0] == 200
    streams = []
    for port in ("HTTP", "TRITON_HTTP"):
        status, headers, data = stack.request(
            "POST", "/v2/models/counting/generate_stream", {**body, "stream": True}, port
        )
        assert status == 200
        assert {k.lower(): v for k, v in headers.items()}["content-type"].startswith("text/event-stream")
        events = [json.loads(part.removeprefix(b"data: ")) for part in data.split(b"\n\n") if part]
        whole = {**events[-1], "text_output": "".join(event["text_output"] for event in events)}
        if "num_output_tokens" in whole:
            whole["num_output_tokens"] = sum(event["num_output_tokens"] for event in events)
        streams.append(whole)
    assert streams[0] == streams[1]
    assert streams[0] == ours[1]


def test_generate_errors_are_tritons_where_it_names_them(stack: Stack) -> None:
    """What the backend refuses has its status and its sentence without the kind; an unknown name is refused here."""
    too_much = {**GREEDY, "max_tokens": 5000}
    ours, theirs = both(stack, "/v2/models/counting/generate", too_much)
    assert (ours[0], theirs[0]) == (400, 400)
    assert "max_tokens" in ours[1]["error"]
    ours, theirs = both(stack, "/v2/models/counting/generate", {**GREEDY, "tokens": 3})
    assert (ours[0], theirs[0]) == (400, 400)
    assert "'tokens'" in ours[1]["error"]
    ours, theirs = both(stack, "/v2/models/counting/versions/7/generate", GREEDY)
    assert (ours[0], theirs[0]) == (404, 404)
    assert stack.request("POST", "/v2/models/addsub/generate", {"text_input": "x"})[0] in (400, 404)


def test_model_control_needs_the_admin_edge_and_an_admin_key(
    stack: Stack, client: triton.InferenceServerClient, admin_key: str
) -> None:
    """The public port refuses control whoever asks; the admin port takes an admin key only, and hands it on."""
    headers = {"authorization": f"Bearer {admin_key}"}
    inference = json.loads(stack.cli("keys", "create", "--tenant", "t", "--json").stdout)["key"]
    admin = client_of(stack, "OPS")
    calls = [
        lambda c, h: c.load_model("addsub", headers=h), lambda c, h: c.unload_model("addsub", headers=h),
        lambda c, h: c.get_model_repository_index(headers=h), lambda c, h: c.get_trace_settings(headers=h),
        lambda c, h: c.get_log_settings(headers=h), lambda c, h: c.get_system_shared_memory_status(headers=h),
        lambda c, h: c.unregister_cuda_shared_memory(headers=h),
    ]  # fmt: skip
    for call in calls:
        for asked, key, status in (
            (client, headers, "403"),
            (admin, None, "401"),
            (admin, {"x-api-key": inference}, "403"),
        ):
            with pytest.raises(InferenceServerException) as caught:
                call(asked, key)
            assert caught.value.status() == status
    index = admin.get_model_repository_index(headers=headers)
    assert {row["name"]: row["state"] for row in index} == {"addsub": "READY", "counting": "READY"}
    assert "trace_level" in admin.get_trace_settings(headers=headers)
    assert admin.update_log_settings({"log_verbose_level": 1}, headers=headers)["log_verbose_level"] == 1
    assert admin.get_system_shared_memory_status(headers=headers) == []
    admin.load_model("addsub", headers=headers)
    with pytest.raises(InferenceServerException) as caught:
        admin.load_model("nope", headers=headers)
    assert "failed to poll from model repository" in caught.value.message()
    assert stack.request("GET", "/health/live", port="OPS")[0] == 200
    assert client.is_model_ready("addsub")
    admin.close()


def test_shared_memory_inputs_are_refused(client: triton.InferenceServerClient) -> None:
    """A tensor in shared memory is 403 at the public port."""
    given = triton.InferInput("A", [2], "INT32")
    given.set_shared_memory("region", 8)
    with pytest.raises(InferenceServerException) as caught:
        client.infer("addsub", [given, tensor("B", [1, 2], np.int32)])
    assert caught.value.status() == "403"
