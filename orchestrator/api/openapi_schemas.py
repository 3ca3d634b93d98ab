"""The bodies in the OpenAPI document: JSON Schema 2020-12, made of the tables and limits that the edges check by.

Where a table has a name that nothing here describes, building the document raises KeyError.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from orchestrator.api import encoder_request, fields, kserve_request, kserve_tensors, openai_request
from orchestrator.api import errors as table
from orchestrator.api.fields import Defaults
from orchestrator.api.kserve import EXTENSIONS
from orchestrator.domain import FINISH_REASONS, TASKS
from orchestrator.tensors import MAX_DIMS, SIZES

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NULL: Schema = {"type": "null"}
OPEN: Schema = {"type": "object"}
SCALAR: Schema = {"anyOf": [STRING, {"type": "number"}, BOOLEAN]}


def ref(name: str) -> Schema:
    """The schema of this name in the document's components."""
    return {"$ref": f"#/components/schemas/{name}"}


def schemas(defaults: Defaults) -> dict[str, Schema]:
    """Every named schema of the document."""
    return {
        **_requests(defaults),
        **_answers(),
        **_kserve_answers(),
        **_states(),
        "OpenAIError": openai_error(),
        "KServeError": _closed({"error": STRING}),
    }


def openai_error(rows: Iterable[table.Row] = ()) -> Schema:
    """OpenAI's error object, with the types and codes of these rows, or with any."""
    rows = tuple(rows)
    types, codes = sorted({row.type for row in rows}), {row.code for row in rows}
    known = {
        "type": {**STRING, "enum": types},
        "code": {"enum": sorted(codes - {None}, key=str) + [None] * (None in codes)},
    }
    error = {"message": STRING, "type": STRING, "param": _or_null(STRING), "code": _or_null(STRING)}
    return _closed({"error": _closed(error | (known if rows else {}))})


def _requests(defaults: Defaults) -> dict[str, Schema]:
    text: Schema = {**STRING, "minLength": 1}
    token_ids = _list(_within("integer", fields.TOKEN_ID), 1)
    one_stop = {**STRING, "minLength": 1, "maxLength": fields.MAX_STOP_CHARS}
    common: dict[str, Schema] = {
        "max_tokens": {**_within("integer", fields.MAX_TOKENS), "description": "Tokens to generate at most."},
        "top_p": {**_within("number", fields.TOP_P), "default": 1},
        "top_k": {**_within("integer", fields.TOP_K), "description": "0 and -1: off."},
        "stop": {
            "anyOf": [one_stop, _list(one_stop, 0, fields.MAX_STOPS)],
            "description": "The answer ends before the first of these texts.",
        },
        "stream": {**BOOLEAN, "default": False},
        "messages": _list(ref("Message"), 1),
    }
    openai: dict[str, Schema] = {
        **common,
        "model": {**STRING, "description": "A name of GET /v1/models."},
        "temperature": {
            **_within("number", openai_request.TEMPERATURE), "default": defaults.temperature,
            "description": "0: always the likeliest token.",
        },
        "seed": _within("integer", openai_request.SEED),
        "stream_options": {
            **_closed({name: {"type": ["boolean", "null"]} for name in openai_request.STREAM_OPTIONS}, ()),
            "description": "Only with stream.",
        },
        "prompt": {
            "anyOf": [
                text, token_ids, _list(text, 1, openai_request.MAX_PROMPTS),
                _list(token_ids, 1, openai_request.MAX_PROMPTS),
            ],
        },
        "max_completion_tokens": {
            **_within("integer", fields.MAX_TOKENS),
            "description": "Another name of max_tokens; both may be given where they agree.",
        },
        "input": {"anyOf": [text, _list(text, 1, fields.MAX_TEXTS)]},
        "truncate": {**BOOLEAN, "description": "Cut a text that is longer than the model reads; else it is refused."},
        "encoding_format": {**STRING, "enum": [*encoder_request.ENCODINGS], "default": "float"},
        "dimensions": {
            **_within("integer", encoder_request.DIMENSIONS),
            "description": "Only the first of each vector, which is of length 1 again where the model's are.",
        },
    }  # fmt: skip
    return {
        "Message": _message(),
        "ChatCompletionRequest": _openai(openai, openai_request.CHAT, openai_request.NEUTRAL_CHAT, "messages"),
        "CompletionRequest": _openai(openai, openai_request.COMPLETION, openai_request.NEUTRAL_COMPLETION, "prompt"),
        "EmbeddingsRequest": _openai(openai, encoder_request.EMBEDDINGS, {}, "input"),
        "ClassifyRequest": _openai(openai, encoder_request.CLASSIFY, {}, "input"),
        **_kserve_requests(common, token_ids, defaults),
    }


def _openai(known: dict[str, Schema], names: set[str], neutral: Mapping[str, tuple[object, ...]], need: str) -> Schema:
    """A body of OpenAI's: what is supported, what only may ask for nothing, and what has no effect."""
    required = ("model", need)
    properties = {name: known[name] if name in required else _or_null(known[name]) for name in sorted(names)}
    for name, values in sorted(neutral.items()):
        distinct = [value for index, value in enumerate(values) if value not in values[:index]]
        properties[name] = {
            "enum": [*distinct, None],
            "description": "Not supported: only values that ask for nothing.",
        }
    for name in sorted(openai_request.IGNORED):
        properties[name] = {"description": "Taken, and without effect."}
    return _closed(properties, required)


def _message() -> Schema:
    part = _closed({"type": {"const": "text"}, "text": STRING})
    properties: dict[str, Schema] = {
        "role": {**STRING, "enum": [*fields.ROLES]},
        "content": {"anyOf": [STRING, _list(part)]},
        "name": {"description": "Taken, and without effect."},
    }
    for name in sorted(fields.TURN_KEYS):
        properties[name] = {"enum": [None, "", [], {}, False, 0], "description": "Only empty, as clients send it back."}
    return _closed(properties, ("role", "content"))


def _kserve_requests(common: dict[str, Schema], token_ids: Schema, defaults: Defaults) -> dict[str, Schema]:
    one_stop = common["stop"]["anyOf"][0]
    sampling: dict[str, Schema] = {
        **common,
        "temperature": {**_within("number", kserve_request.TEMPERATURE), "default": defaults.temperature},
        "seed": _within("integer", kserve_request.SEED),
        "timeout_s": {"type": "number", "exclusiveMinimum": 0, "maximum": kserve_request.MAX_TIMEOUT_S},
        "prompt_token_ids": token_ids,
    }
    names = (*kserve_request.SAMPLING, *kserve_request.PROMPTS)
    scalars: dict[str, Schema] = {name: sampling[name] for name in kserve_request.SAMPLING}
    scalars |= dict.fromkeys(kserve_request.TEXTS, STRING)
    scalars |= dict.fromkeys(kserve_request.FLAGS, BOOLEAN) | {"return_logprobs": {**BOOLEAN, "enum": [False]}}
    scalars |= dict.fromkeys(kserve_request.KSERVE, SCALAR)
    scalars["timeout"] = {**_within("integer", kserve_request.TIMEOUT_US), "description": "Microseconds; 0: none."}
    own = {name: _or_null(schema) for name, schema in scalars.items()}
    own |= {name: {"description": "Taken, and without effect."} for name in kserve_request.KSERVE if name != "timeout"}
    for name in (*kserve_request.TEXTS, *kserve_request.FLAGS):
        own[name] = {"anyOf": [scalars[name], _list(scalars[name], 1, 1), NULL]}
    either = {"anyOf": [STRING, ref("SamplingParameters")], "description": "The object, or its JSON as a string."}
    own["sampling_parameters"] = {**either, "anyOf": [*either["anyOf"], _list(either, 1, 1), NULL]}
    generate = {"id": _or_null(STRING), "parameters": _or_null(_closed({**scalars, "stop": one_stop}, ())), **own}
    return {
        "SamplingParameters": _closed({name: _or_null(sampling[name]) for name in names}, ()),
        "GenerateRequest": {
            **_closed(generate, ()),
            "description": (
                "One of text_input and, in sampling_parameters, messages and prompt_token_ids. sampling_parameters "
                "beats a field of the same name, and that beats parameters."
            ),
        },
        "InferRequest": _infer_request(),
    }  # fmt: skip


def _infer_request() -> Schema:
    name = {**STRING, "minLength": 1, "maxLength": kserve_tensors.MAX_NAME}
    datatype = {**STRING, "enum": [*SIZES, "BYTES"]}
    tensor: dict[str, Schema] = {
        "name": name,
        "datatype": datatype,
        "shape": _list(COUNT, 0, MAX_DIMS),
        "parameters": _or_null({**OPEN, "properties": {"binary_data_size": COUNT}, "additionalProperties": SCALAR}),
        "data": {"type": "array", "description": "The elements in row-major order, flat or nested; none with binary."},
    }
    tensor = {field: tensor[field] for field in sorted(kserve_tensors.INPUT)}
    wanted = {"binary_data": BOOLEAN, "classification": COUNT}
    body: dict[str, Schema] = {
        "id": _or_null(STRING),
        "model_name": {"description": "Taken, and without effect: the path has the name."},
        "model_version": {"description": "Taken, and without effect: the path has the version."},
        "parameters": _or_null(
            {**OPEN, "properties": {"binary_data_output": BOOLEAN}, "additionalProperties": SCALAR}
        ),
        "inputs": _list(_closed(tensor, ("name", "datatype", "shape"))),
        "outputs": _or_null(
            _list({
                **OPEN, "required": ["name"],
                "properties": {
                    "name": name,
                    "parameters": _or_null({**OPEN, "properties": wanted, "additionalProperties": SCALAR}),
                },
            })
        ),
    }  # fmt: skip
    return _closed({field: body[field] for field in sorted(kserve_tensors.BODY)}, ("inputs",))


def _answers() -> dict[str, Schema]:
    reason: Schema = {**STRING, "enum": [*FINISH_REASONS]}
    message = _closed({"role": {"const": "assistant"}, "content": STRING, "refusal": NULL})
    model: dict[str, Schema] = {
        "id": STRING, "object": {"const": "model"}, "created": COUNT, "owned_by": STRING, "version": STRING,
        "task": {**STRING, "enum": [*TASKS]}, "chat": BOOLEAN, "max_model_len": _or_null(COUNT), "ready": BOOLEAN,
        "dimensions": _or_null(COUNT), "labels": _or_null(_list(STRING)),
    }  # fmt: skip
    delta = _closed({"role": {"const": "assistant"}, "content": STRING}, ())
    return {
        "ChatCompletion": _openai_answer("chat.completion", {"message": message}, reason),
        "ChatCompletionChunk": _openai_answer("chat.completion.chunk", {"delta": delta}, _or_null(reason), False),
        "Completion": _openai_answer("text_completion", {"text": STRING}, reason),
        "CompletionChunk": _openai_answer("text_completion", {"text": STRING}, _or_null(reason), False),
        "Embeddings": _encoded(
            {
                "object": {"const": "embedding"},
                "index": COUNT,
                "embedding": {
                    "anyOf": [_list({"type": "number"}), {**STRING, "contentEncoding": "base64"}],
                    "description": "Numbers, or in base64 little-endian float32.",
                },
            }
        ),
        "Classified": _encoded(
            {
                "index": COUNT, "label": STRING, "score": {"type": "number"},
                "scores": {**OPEN, "additionalProperties": {"type": "number"}, "description": "By label."},
            }
        ),
        "Usage": _closed({"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT}),
        "Model": _closed(model),
        "ModelList": _closed({"object": {"const": "list"}, "data": _list(ref("Model"))}),
    }


def _encoded(row: dict[str, Schema]) -> Schema:
    usage = _closed({"prompt_tokens": COUNT, "total_tokens": COUNT})
    return _closed({"object": {"const": "list"}, "data": _list(_closed(row)), "model": STRING, "usage": usage})


def _openai_answer(kind: str, content: dict[str, Schema], reason: Schema, whole: bool = True) -> Schema:
    choice = _closed({"index": COUNT, **content, "logprobs": NULL, "finish_reason": reason})
    head: dict[str, Schema] = {
        "id": STRING, "object": {"const": kind}, "created": COUNT, "model": STRING, "choices": _list(choice)
    }  # fmt: skip
    usage = ref("Usage") if whole else {"anyOf": [ref("Usage"), NULL]}
    return _closed({**head, "usage": usage}, (*head, *(["usage"] if whole else [])))


def _kserve_answers() -> dict[str, Schema]:
    head = {"model_name": STRING, "model_version": STRING, "id": STRING}
    numbers = {"num_input_tokens": COUNT, "num_output_tokens": COUNT}
    reason = {**STRING, "enum": [*FINISH_REASONS, ""], "description": "Empty before the last event of a stream."}
    tensor = {
        "name": STRING, "datatype": STRING, "shape": _list({"type": "integer"}), "data": {"type": "array"},
        "parameters": _closed({"binary_data_size": COUNT}),
    }  # fmt: skip
    described = {**OPEN, "properties": {"name": STRING, "datatype": STRING, "shape": {"type": "array"}}}
    return {
        "GenerateAnswer": _closed(
            {**head, "text_output": STRING, "finish_reason": reason, **numbers},
            ("model_name", "model_version", "text_output"),
        ),
        "InferAnswer": _closed(
            {**head, "outputs": _list(_closed(tensor, ("name", "datatype", "shape")))},
            ("model_name", "model_version", "outputs"),
        ),
        "ServerMetadata": _closed(
            {"name": STRING, "version": STRING, "extensions": _list({**STRING, "enum": [*EXTENSIONS]})}
        ),
        "ModelMetadata": {
            **OPEN,
            "required": ["name"],
            "properties": {
                "name": STRING,
                "versions": _list(STRING),
                "platform": STRING,
                "inputs": _list(described),
                "outputs": _list(described),
            },
        },
        "ModelConfig": {**OPEN, "description": "Triton's model configuration, as it is."},
        "ModelStatistics": {**OPEN, "description": "Triton's statistics, as they are."},
    }


def _states() -> dict[str, Schema]:
    states = {**OPEN, "additionalProperties": STRING, "description": "By model."}
    return {
        "Live": _closed({"live": {"const": True}}),
        "KServeReady": _closed({"ready": BOOLEAN}),
        "Ready": _closed(
            {"ready": BOOLEAN, "draining": BOOLEAN, "triton": BOOLEAN, "models": states, "breakers": states}
        ),
        "Health": {
            **OPEN,
            "description": "For people; what is in it may grow.",
            "required": [
                "ready",
                "draining",
                "uptime_s",
                "in_flight",
                "models",
                "triton",
                "tritons",
                "breakers",
                "limits",
                "redis",
            ],
            "properties": {
                "ready": BOOLEAN, "draining": BOOLEAN, "in_flight": COUNT, "models": _list(OPEN),
                "tritons": _list(_closed({
                    "url": STRING,
                    "state": {"enum": ["ready", "ejected", "draining", "down"]},
                    "outstanding": {**COUNT, "description": "Requests that it has from the worker that answers."},
                    "answered_s": {
                        "type": ["number", "null"], "description": "Seconds since it was asked what it answered last.",
                    },
                })),
            },
        },
    }


def _within(kind: str, limits: tuple[float, float]) -> Schema:
    return {"type": kind, "minimum": limits[0], "maximum": limits[1]}


def _list(items: Schema, low: int = 0, high: int | None = None) -> Schema:
    return {"type": "array", "items": items, "minItems": low, **({} if high is None else {"maxItems": high})}


def _closed(properties: dict[str, Schema], required: Iterable[str] | None = None) -> Schema:
    """An object of these properties and no others, all of them required unless it is said which."""
    needed = list(properties if required is None else required)
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}


def _or_null(schema: Schema) -> Schema:
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], NULL]}
    if "enum" in schema:
        schema = {**schema, "enum": [*schema["enum"], None]}
    return {**schema, "type": [schema["type"], "null"]}
