"""Triton's HTTP API at the gateway: generate, its stream, infer on a generation model, and what is refused."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import pytest

from orchestrator.api import kserve_request
from orchestrator.ops import entrycheck

from ..conftest import Stack, serving, until
from ..fake_triton import FakeTriton, answer, answers, entry, event, failure

PATH = "/v2/models/m/"
BODY: dict[str, Any] = {"text_input": "Hola"}
ALL = {"return_finish_reason": True, "return_num_input_tokens": True, "return_num_output_tokens": True}


def sent(stack: Stack) -> dict[str, Any]:
    """The sampling parameters that reached Triton with the last request."""
    return dict(json.loads(stack.fake.requests[-1]["sampling_parameters"]))


def text(name: str, value: str) -> dict[str, Any]:
    return {"name": name, "datatype": "BYTES", "shape": [1], "data": [value]}


def flag(name: str, value: bool = True) -> dict[str, Any]:
    return {"name": name, "datatype": "BOOL", "shape": [1], "data": [value]}


async def test_generate(stack: Stack) -> None:
    """Only the text comes without flags, everything with them, and the id is echoed."""
    plain = {"model_name": "m", "model_version": "1", "text_output": "Hola, ¿qué tal?"}
    assert (await stack.post(PATH + "generate", BODY))[:2] == (200, plain)
    whole = {**plain, "id": "a1", "finish_reason": "stop", "num_input_tokens": 3, "num_output_tokens": 3}
    status, body, headers = await stack.post(
        "/v2/models/m/versions/1/generate", {**BODY, **ALL, "id": "a1"}, **{"x-request-id": "abc"}
    )
    assert (status, body, headers["x-request-id"]) == (200, whole, "abc")
    assert [record.operation for record in stack.records] == ["generate", "generate"]


async def test_generate_stream(stack: Stack) -> None:
    """A stream has an event a chunk, empty finish reasons before the last one, and no [DONE]."""
    events = [json.loads(e) for e in await stack.events(PATH + "generate_stream", {**BODY, **ALL, "stream": True})]
    assert [e["text_output"] for e in events] == ["Hola", ", ", "¿qué tal?"]
    assert [e["finish_reason"] for e in events] == ["", "", "stop"]
    assert [e["num_output_tokens"] for e in events] == [1, 1, 1]
    assert {e["num_input_tokens"] for e in events} == {3}
    (only,) = await stack.events(PATH + "generate_stream", {**BODY, **ALL})
    assert json.loads(only)["text_output"] == "Hola, ¿qué tal?"


async def test_the_prompt_in_front_of_the_answer(stack: Stack) -> None:
    """Without exclude_input_in_output the text prompt comes before the answer, once."""
    body = {**BODY, "exclude_input_in_output": False, "stream": True}
    assert (await stack.post(PATH + "generate", body))[1]["text_output"] == "HolaHola, ¿qué tal?"
    events = [json.loads(e)["text_output"] for e in await stack.events(PATH + "generate_stream", body)]
    assert events == ["HolaHola", ", ", "¿qué tal?"]


@pytest.mark.parametrize(
    "body",
    [
        {"max_tokens": 5, "temperature": 0, "seed": 7, "stop": "x", "top_k": -1},
        {"parameters": {"max_tokens": 5, "temperature": 0, "seed": 7, "stop": "x", "top_k": -1}},
        {"sampling_parameters": {"max_tokens": 5, "temperature": 0, "seed": 7, "stop": ["x"], "top_k": -1}},
        {"sampling_parameters": '{"max_tokens": 5, "temperature": 0, "seed": 7, "stop": ["x"], "top_k": -1}'},
        {"max_tokens": 9, "parameters": {"max_tokens": 8, "temperature": 0, "seed": 7, "stop": "x"},
         "sampling_parameters": '{"max_tokens": 5}'},
        {"max_tokens": 5, "parameters": {"max_tokens": 8, "temperature": 0, "seed": 7}, "stop": "x", "id": None},
    ],
)  # fmt: skip
async def test_where_sampling_parameters_may_stand(stack: Stack, body: dict[str, Any]) -> None:
    """Plain fields, `parameters` and the JSON object say the same; the object beats fields, they beat parameters."""
    assert (await stack.post(PATH + "generate", {**BODY, **body}))[0] == 200
    given = sent(stack)
    assert {name: given[name] for name in ("max_tokens", "temperature", "seed", "stop", "top_k")} == {
        "max_tokens": 5, "temperature": 0, "seed": 7, "stop": ["x"], "top_k": 0,
    }  # fmt: skip


async def test_defaults_are_the_gateways(fake: FakeTriton) -> None:
    """What a request does not say is the profile's, as for OpenAI's clients."""
    async with serving(fake, temperature=0.25, max_new_tokens=17) as stack:
        await stack.post(PATH + "generate", BODY)
        assert (sent(stack)["temperature"], sent(stack)["max_tokens"]) == (0.25, 17)


async def test_prompts_of_each_kind(stack: Stack) -> None:
    """Messages and token ids come in sampling_parameters, with or without an empty text_input."""
    turns = [{"role": "user", "content": "Hola"}]
    await stack.post(PATH + "generate", {"text_input": "", "sampling_parameters": json.dumps({"messages": turns})})
    assert sent(stack)["messages"] == turns
    await stack.post(PATH + "generate", {"sampling_parameters": {"messages": turns}})
    assert sent(stack)["messages"] == turns


@pytest.mark.parametrize(("timeouts", "expected_s"), [
    ({"timeout_s": 7}, 7), ({"timeout": 3_000_000}, 3), ({"timeout": 9_000_000, "timeout_s": 7}, 7),
    ({"timeout": 0}, 600),
])  # fmt: skip
async def test_the_nearest_deadline_counts(stack: Stack, timeouts: dict[str, Any], expected_s: float) -> None:
    """timeout_s in seconds and KServe's timeout in microseconds bound the request, the nearer one."""
    await stack.post(PATH + "generate", {**BODY, **timeouts})
    assert sent(stack)["timeout_s"] == expected_s


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"text_input": "x", "n_tokens": 3}, "n_tokens"), ({"text_input": "x", "max_token": 3}, "max_tokens"),
    ({"text_input": "x", "parameters": {"heartbeat": True}}, "heartbeat"),
    ({"text_input": "x", "parameters": {"inspect": True}}, "inspect"),
    ({"text_input": "x", "sampling_parameters": {"logit_bias": {"a": 1}}}, "logit_bias"),
    ({"text_input": "x", "parameters": {"logit_bias": {"1": 1}}}, "logit_bias"),
    ({"text_input": "x", "stop_token_ids": 3}, "stop_token_ids"), ({"text_input": "x", "n": 17}, "n"),
    ({"text_input": "x", "n": 2, "best_of": 3, "stream": True}, "best_of"),
    ({"text_input": "x", "best_of": 0}, "best_of"),
    ({"text_input": "x", "logprobs": 21}, "logprobs"), ({"text_input": "x", "min_p": -0.1}, "min_p"),
    ({"text_input": "x", "sampling_parameters": {"priority": 1001}}, "priority"),
    ({"text_input": "x", "sampling_parameters": {"text_input": "y"}}, "text_input"),
    ({"text_input": "x", "sampling_parameters": "{"}, "sampling_parameters"),
    ({"text_input": "x", "sampling_parameters": "[1]"}, "sampling_parameters"),
    ({"text_input": "x", "sampling_parameters": '{"temperature": NaN}'}, "sampling_parameters"),
    ({"text_input": "x", "sampling_parameters": '{"stop": "\\ud800"}'}, "UTF-8"),
    ({"text_input": "x", "return_logprobs": 1}, "return_logprobs"),
    ({"text_input": "x", "stream": 1}, "stream"), ({"text_input": 7}, "text_input"), ({}, "text_input"),
    ({"text_input": ["a", "b"]}, "text_input"), ({"text_input": ""}, "text_input"),
    ({"text_input": "x", "id": 7}, "id"),
    ({"text_input": "x", "parameters": {"stop": ["a"]}}, "stop"), ({"text_input": "x", "parameters": 7}, "parameters"),
    ({"text_input": "x", "temperature": 101}, "temperature"), ({"text_input": "x", "timeout_s": 0}, "timeout_s"),
    ({"text_input": "x", "timeout": -1}, "timeout"), ({"text_input": "x", "max_tokens": 0}, "max_tokens"),
    ({"text_input": "x", "seed": 2**64}, "seed"), ({"text_input": "x", "stop": [""]}, "stop"),
    ({"text_input": "x", "sampling_parameters": {"messages": []}}, "messages"),
    ({"text_input": "x", "sampling_parameters": {"messages": [{"role": "user", "content": "y"}]}}, "text_input"),
    ({"sampling_parameters": {"prompt_token_ids": "1"}}, "prompt_token_ids"),
    ({"sampling_parameters": {"prompt_token_ids": []}}, "prompt_token_ids"),
    ({"sampling_parameters": {"prompt_token_ids": [-1]}}, "prompt_token_ids"),
]  # fmt: skip


@pytest.mark.parametrize("what", ["generate", "generate_stream"])
async def test_what_is_wrong_is_named(stack: Stack, what: str) -> None:
    """A wrong or unknown parameter is a 400 of KServe's form that names it, and reaches no model."""
    for body, named in WRONG:
        status, answer, _ = await stack.post(PATH + what, body)
        assert (status, list(answer)) == (400, ["error"]), body
        assert named in answer["error"], body
    assert stack.fake.requests == []


async def test_several_answers_with_log_probabilities(stack: Stack) -> None:
    """Outputs have an element for each answer: lists in JSON, empty where an answer has nothing new; echo is before
    each; one answer is written as plain values.
    """
    stack.fake.script = [
        answers(["a", ""], ["", ""], [[entry("a")], []]),
        answers(["", "b"], ["stop", "length"], [[], [entry("b")]]),
        "end",
    ]
    how = {"sampling_parameters": {"n": 2, "seed": 7}, "return_logprobs": True, "return_finish_reason": True}
    body = {"text_input": "Hola ", **how, "return_num_output_tokens": True, "exclude_input_in_output": False}
    events = [json.loads(e) for e in await stack.events(PATH + "generate_stream", {**body, "stream": True})]
    assert [e["text_output"] for e in events] == [["Hola a", ""], ["", "Hola b"]]
    assert [e["finish_reason"] for e in events] == [["", ""], ["stop", "length"]]
    assert [e["num_output_tokens"] for e in events] == [[1, 0], [0, 1]]
    assert [[len(json.loads(own)) for own in e["logprobs"]] for e in events] == [[1, 0], [0, 1]]
    assert (sent(stack)["n"], sent(stack)["logprobs"], stack.fake.requests[-1]["return_logprobs"]) == (2, 0, True)
    inputs = [text("text_input", "Hola"), text("sampling_parameters", '{"n": 2, "logprobs": 1}')]
    _, whole, _ = await stack.post(PATH + "infer", {"inputs": [*inputs, flag("return_num_cached_tokens")]})
    assert [(o["name"], o["shape"]) for o in whole["outputs"]] == [
        ("text_output", [2]), ("logprobs", [2]), ("num_cached_tokens", [1]),
    ]  # fmt: skip
    assert whole["outputs"][0]["data"] == ["a", "b"]
    stack.fake.script = answer("Hola")
    _, one, _ = await stack.post(PATH + "generate", {"text_input": "x", "logprobs": 1})
    assert one["text_output"] == "Hola"
    assert [entry["token"] for entry in json.loads(one["logprobs"])] == ["Hola"]


async def test_an_error_in_a_stream(stack: Stack) -> None:
    """Before the first event an error has its own status, afterwards it is the 200 stream's last event."""
    stack.fake.script = [failure("invalid_argument: max_tokens is 9; 3 prompt tokens leave 2")]
    status, body, _ = await stack.post(PATH + "generate_stream", {**BODY, "stream": True, "max_tokens": 9})
    assert (status, body) == (400, {"error": "max_tokens is 9; 3 prompt tokens leave 2"})
    stack.fake.script = [event("Hola"), failure("internal: logits are not finite")]
    events = [json.loads(e) for e in await stack.events(PATH + "generate_stream", {**BODY, "stream": True})]
    assert events[0]["text_output"] == "Hola"
    assert list(events[1]) == ["error"]
    assert "logits" not in events[1]["error"]
    assert len(events) == 2
    stack.fake.script = [event("Hola"), "close"]
    events = [json.loads(e) for e in await stack.events(PATH + "generate_stream", {**BODY, "stream": True})]
    assert list(events[-1]) == ["error"]


async def test_infer_collects_a_generation_models_stream(stack: Stack) -> None:
    """Plain infer gives the whole answer as tensors: what the flags ask for, or what `outputs` names."""
    inputs = [text("text_input", "Hola"), text("sampling_parameters", '{"max_tokens": 5}'), flag("stream")]
    status, body, _ = await stack.post(PATH + "infer", {"id": "q", "inputs": inputs})
    answer = {"name": "text_output", "datatype": "BYTES", "shape": [1], "data": ["Hola, ¿qué tal?"]}
    assert (status, body) == (200, {"id": "q", "model_name": "m", "model_version": "1", "outputs": [answer]})
    assert sent(stack)["max_tokens"] == 5
    _, body, _ = await stack.post(PATH + "infer", {"inputs": [inputs[0], flag("return_num_output_tokens")]})
    count = {"name": "num_output_tokens", "datatype": "UINT32", "shape": [1], "data": [3]}
    assert body["outputs"] == [answer, count]
    wanted = [{"name": "finish_reason"}]
    _, body, _ = await stack.post(PATH + "infer", {"inputs": [{**inputs[0], "shape": [1, 1]}], "outputs": wanted})
    assert body["outputs"] == [{"name": "finish_reason", "datatype": "BYTES", "shape": [1], "data": ["stop"]}]


async def test_an_output_that_is_declared_and_never_sent_may_be_asked_for(stack: Stack) -> None:
    """`logprobs`, which every generation entry declares, is left out of the answer of who does not ask for them by a
    parameter, be it among others or alone.
    """
    asked = {"inputs": [text("text_input", "Hola")], "outputs": [{"name": "logprobs"}, {"name": "finish_reason"}]}
    status, body, _ = await stack.post(PATH + "infer", asked)
    assert (status, [output["name"] for output in body["outputs"]]) == (200, ["finish_reason"])
    status, body, _ = await stack.post(PATH + "infer", {**asked, "outputs": [{"name": "logprobs"}]})
    assert (status, body["outputs"]) == (200, [])
    assert {*kserve_request.OUTPUTS} == {*entrycheck.OUTPUTS, *entrycheck.OUTPUTS_MAY}
    assert {*kserve_request.TEXTS, *kserve_request.FLAGS} == {*entrycheck.INPUTS, *entrycheck.INPUTS_MAY}


WRONG_TENSORS: list[tuple[dict[str, Any], str]] = [
    ({"inputs": [text("text", "x")]}, "unexpected inference input 'text' for model 'm'"),
    ({"inputs": [flag("text_input")]}, "inference input 'text_input' data-type is 'BOOL', but model 'm' expects"),
    ({"inputs": [{**text("text_input", "x"), "shape": [2], "data": ["x", "y"]}]}, "Expected [1], got [2]"),
    ({"inputs": [{**text("text_input", "x"), "shape": [], "data": ["x"]}]}, "Expected [1], got []"),
    ({"inputs": [flag("stream")]}, "text_input is required"), ({"inputs": []}, "text_input is required"),
    ({"inputs": [text("text_input", "x")], "outputs": [{"name": "no"}]}, "unexpected inference output 'no'"),
    ({"inputs": [text("text_input", "x")], "outputs": [{"name": "logprobs2"}]}, "output 'logprobs2'"),
    ({"inputs": [text("text_input", "x")], "outputs": [{"name": "logprobs", "parameters": {"classification": 2}}]},
     "output 'logprobs'"),
    ({"inputs": [text("text_input", "x")], "parameters": {"heartbeat": True}}, "heartbeat"),
    ({"inputs": [text("text_input", "x"), text("sampling_parameters", "{")]}, "sampling_parameters"),
]  # fmt: skip


async def test_wrong_tensors_for_a_generation_model(stack: Stack) -> None:
    """A tensor that the model does not have, or of another type or shape, is refused as Triton words it."""
    for body, message in WRONG_TENSORS:
        status, answer, _ = await stack.post(PATH + "infer", body)
        assert status == 400, body
        assert message in answer["error"], body


async def test_models_and_versions_that_are_not_served(stack: Stack) -> None:
    """An unknown model or another version is 404 everywhere, and merely not ready where readiness is asked."""
    for what in ("", "/ready", "/config", "/stats", "/infer", "/generate", "/generate_stream"):
        for place in ("nope", "a%2Fb", "m/versions/7"):
            post = what in ("/infer", "/generate", "/generate_stream")
            path = f"/v2/models/{place}{what}"
            status, body, _ = await (stack.post(path, BODY) if post else stack.get(path))
            assert (status, list(body)) == (400 if what == "/ready" else 404, ["error"]), path


async def test_ready_follows_the_model(stack: Stack) -> None:
    """A model's readiness is 200 without a body while it answers, and 400 once it does not."""
    for path in ("ready", "versions/1/ready"):
        async with stack.http.get(stack.url + PATH + path) as response:
            assert (response.status, await response.read()) == (200, b"")
    stack.fake.beat_error = "Stub process 'm' is not healthy."
    await until(lambda: not stack.gateway.models[0].ready)
    assert (await stack.get(PATH + "ready"))[:2] == (400, {"error": "Model version not ready"})


async def test_server_metadata(stack: Stack) -> None:
    """The server names itself, its version and what of Triton's extensions it offers: nothing of the admin's."""
    status, body, _ = await stack.get("/v2")
    assert (status, body["name"]) == (200, "truthgpt")
    assert "binary_tensor_data" in body["extensions"]
    assert not {"model_repository", "trace", "logging", "system_shared_memory"} & set(body["extensions"])


CONTROL = [
    ("POST", "repository/index"), ("POST", "repository/models/m/load"), ("POST", "repository/models/m/unload"),
    ("GET", "trace/setting"), ("POST", "trace/setting"), ("POST", "models/m/trace/setting"), ("GET", "logging"),
    ("POST", "logging"), ("GET", "systemsharedmemory/status"), ("POST", "systemsharedmemory/region/r/register"),
    ("POST", "cudasharedmemory/region/r/unregister"), ("POST", "cudasharedmemory/unregister"),
]  # fmt: skip


async def test_what_is_the_administrators_is_refused(stack: Stack) -> None:
    """Model control, trace, logging and shared memory are 403 at this edge, and Triton hears nothing of it."""
    stack.fake.calls.clear()
    for method, path in CONTROL:
        async with stack.http.request(method, f"{stack.url}/v2/{path}", data=b"{}") as response:
            assert response.status == 403, path
            assert "admin port" in (await response.json())["error"]
    heard = {call for call in stack.fake.calls if "index" not in call}  # the gateway itself reads the index
    assert heard <= {"POST /v2/models/m/generate", "GET /v2/models/m/config"}


async def test_shared_memory_in_a_request_is_refused(stack: Stack) -> None:
    """An input that lies in shared memory is 403."""
    row = {"name": "text_input", "datatype": "BYTES", "shape": [1], "parameters": {"shared_memory_region": "r"}}
    status, body, _ = await stack.post(PATH + "infer", {"inputs": [row]})
    assert (status, "admin port" in body["error"]) == (403, True)


@pytest.mark.parametrize("what", ["generate", "generate_stream", "infer"])
async def test_a_hang_up_frees_the_slot(stack: Stack, what: str) -> None:
    """A client that leaves before the answer is noticed at once on every way to ask."""
    stack.fake.script = [event("Hola"), math.inf]
    body = {"inputs": [text("text_input", "Hola")]} if what == "infer" else {**BODY, "stream": True}
    task = asyncio.create_task(stack.post(PATH + what, body))
    await until(lambda: stack.fake.running == 1)
    task.cancel()
    assert await until(lambda: stack.fake.running == 0) < 1
    await until(lambda: len(stack.records) == 1)
    assert stack.records[0].outcome == "cancelled"


async def test_while_triton_is_away(fake: FakeTriton) -> None:
    """Whatever a model may be, asking it is 503 until Triton can say that it does not exist."""
    await fake.stop()
    async with serving(fake, wait=False) as stack:
        number = {"name": "A", "datatype": "INT32", "shape": [1], "data": [1]}
        for what, body in (
            ("infer", {"inputs": [number]}), ("infer", {"inputs": [text("text_input", "x")]}), ("generate", BODY),
        ):  # fmt: skip
            status, answer, headers = await stack.post(PATH + what, body)
            assert (status, list(answer)) == (503, ["error"])
            assert int(headers["retry-after"]) >= 1
        assert (await stack.get(PATH + "ready"))[0] == 400
        assert (await stack.get("/v2/models/m"))[0] == 503
