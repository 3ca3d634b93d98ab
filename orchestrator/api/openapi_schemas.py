"""The bodies in the OpenAPI document: JSON Schema 2020-12, made of the tables and limits that the edges check by.

Where a table has a name that nothing here describes, building the document raises KeyError.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from orchestrator.api import encoder_request, fields, kserve_request, kserve_tensors, openai_request
from orchestrator.api import errors as table
from orchestrator.api.controls import LOGPROBS
from orchestrator.api.fields import Defaults
from orchestrator.api.kserve import EXTENSIONS
from orchestrator.api.openapi_parts import (
    BOOLEAN,
    COUNT,
    NULL,
    OPEN,
    SCALAR,
    STRING,
    Schema,
    closed,
    each,
    listed,
    or_null,
    ref,
    within,
)
from orchestrator.api.openapi_sampling import logprobs, sampling
from orchestrator.domain import FINISH_REASONS, TASKS
from orchestrator.tensors import MAX_DIMS, SIZES


def schemas(defaults: Defaults) -> dict[str, Schema]:
    """Every named schema of the document."""
    return {
        **_requests(defaults),
        **_answers(),
        **_kserve_answers(),
        **_states(),
        "OpenAIError": openai_error(),
        "KServeError": closed({"error": STRING}),
    }


def openai_error(rows: Iterable[table.Row] = ()) -> Schema:
    """OpenAI's error object, with the types and codes of these rows, or with any."""
    rows = tuple(rows)
    types, codes = sorted({row.type for row in rows}), {row.code for row in rows}
    known = {
        "type": {**STRING, "enum": types},
        "code": {"enum": sorted(codes - {None}, key=str) + [None] * (None in codes)},
    }
    error = {"message": STRING, "type": STRING, "param": or_null(STRING), "code": or_null(STRING)}
    return closed({"error": closed(error | (known if rows else {}))})


def _requests(defaults: Defaults) -> dict[str, Schema]:
    text: Schema = {**STRING, "minLength": 1}
    token_ids = listed(within("integer", fields.TOKEN_ID), 1)
    one_stop = {**STRING, "minLength": 1, "maxLength": fields.MAX_STOP_CHARS}
    common: dict[str, Schema] = {
        "max_tokens": {**within("integer", fields.MAX_TOKENS), "description": "Tokens to generate at most."},
        "top_p": {**within("number", fields.TOP_P), "default": 1},
        "top_k": {**within("integer", fields.TOP_K), "description": "0 and -1: off."},
        "stop": {
            "anyOf": [one_stop, listed(one_stop, 0, fields.MAX_STOPS)],
            "description": "The answer ends before the first of these texts.",
        },
        "stream": {**BOOLEAN, "default": False},
        "messages": listed(ref("Message"), 1),
        **sampling(),
    }
    openai: dict[str, Schema] = {
        **common,
        "model": {**STRING, "description": "A name of GET /v1/models."},
        "temperature": {
            **within("number", openai_request.TEMPERATURE), "default": defaults.temperature,
            "description": "0: always the likeliest token.",
        },
        "seed": within("integer", openai_request.SEED),
        "stream_options": {
            **closed({name: {"type": ["boolean", "null"]} for name in openai_request.STREAM_OPTIONS}, ()),
            "description": "Only with stream.",
        },
        "prompt": {
            "anyOf": [
                text, token_ids, listed(text, 1, openai_request.MAX_PROMPTS),
                listed(token_ids, 1, openai_request.MAX_PROMPTS),
            ],
        },
        "max_completion_tokens": {
            **within("integer", fields.MAX_TOKENS),
            "description": "Another name of max_tokens; both may be given where they agree.",
        },
        "echo": {**BOOLEAN, "description": "Begin each choice with the prompt's text; not together with logprobs."},
        "top_logprobs": {**within("integer", LOGPROBS), "description": "Only with logprobs."},
        "input": {"anyOf": [text, listed(text, 1, fields.MAX_TEXTS)]},
        "truncate": {**BOOLEAN, "description": "Cut a text that is longer than the model reads; else it is refused."},
        "encoding_format": {**STRING, "enum": [*encoder_request.ENCODINGS], "default": "float"},
        "dimensions": {
            **within("integer", encoder_request.DIMENSIONS),
            "description": "Only the first of each vector, which is of length 1 again where the model's are.",
        },
    }  # fmt: skip
    return {
        "Message": _message(),
        "ChatCompletionRequest": _openai(
            openai | {"logprobs": BOOLEAN}, openai_request.CHAT, openai_request.NEUTRAL_CHAT, "messages"
        ),
        "CompletionRequest": _openai(openai, openai_request.COMPLETION, openai_request.NEUTRAL_COMPLETION, "prompt"),
        "EmbeddingsRequest": _openai(openai, encoder_request.EMBEDDINGS, {}, "input"),
        "ClassifyRequest": _openai(openai, encoder_request.CLASSIFY, {}, "input"),
        **_kserve_requests(common, token_ids, defaults),
    }


def _openai(known: dict[str, Schema], names: set[str], neutral: Mapping[str, tuple[object, ...]], need: str) -> Schema:
    """A body of OpenAI's: what is supported, what only may ask for nothing, and what has no effect."""
    required = ("model", need)
    properties = {name: known[name] if name in required else or_null(known[name]) for name in sorted(names)}
    for name, values in sorted(neutral.items()):
        distinct = [value for index, value in enumerate(values) if value not in values[:index]]
        properties[name] = {
            "enum": [*distinct, None],
            "description": "Not supported: only values that ask for nothing.",
        }
    for name in sorted(openai_request.IGNORED):
        properties[name] = {"description": "Taken, and without effect."}
    return closed(properties, required)


def _message() -> Schema:
    part = closed({"type": {"const": "text"}, "text": STRING})
    properties: dict[str, Schema] = {
        "role": {**STRING, "enum": [*fields.ROLES]},
        "content": {"anyOf": [STRING, listed(part)]},
        "name": {"description": "Taken, and without effect."},
    }
    for name in sorted(fields.TURN_KEYS):
        properties[name] = {"enum": [None, "", [], {}, False, 0], "description": "Only empty, as clients send it back."}
    return closed(properties, ("role", "content"))


def _kserve_requests(common: dict[str, Schema], token_ids: Schema, defaults: Defaults) -> dict[str, Schema]:
    one_stop = common["stop"]["anyOf"][0]
    known: dict[str, Schema] = {
        **common,
        "temperature": {**within("number", kserve_request.TEMPERATURE), "default": defaults.temperature},
        "seed": within("integer", kserve_request.SEED),
        "timeout_s": {"type": "number", "exclusiveMinimum": 0, "maximum": kserve_request.MAX_TIMEOUT_S},
        "prompt_token_ids": token_ids,
    }
    names = (*kserve_request.SAMPLING, *kserve_request.APART)
    scalars: dict[str, Schema] = {name: known[name] for name in kserve_request.SAMPLING}
    scalars |= dict.fromkeys(kserve_request.TEXTS, STRING)
    scalars |= dict.fromkeys(kserve_request.FLAGS, BOOLEAN)
    scalars |= dict.fromkeys(kserve_request.KSERVE, SCALAR)
    scalars["timeout"] = {**within("integer", kserve_request.TIMEOUT_US), "description": "Microseconds; 0: none."}
    own = {name: or_null(schema) for name, schema in scalars.items()}
    own |= {name: {"description": "Taken, and without effect."} for name in kserve_request.KSERVE if name != "timeout"}
    for name in (*kserve_request.TEXTS, *kserve_request.FLAGS):
        own[name] = {"anyOf": [scalars[name], listed(scalars[name], 1, 1), NULL]}
    either = {"anyOf": [STRING, ref("SamplingParameters")], "description": "The object, or its JSON as a string."}
    own["sampling_parameters"] = {**either, "anyOf": [*either["anyOf"], listed(either, 1, 1), NULL]}
    parameters = {name: schema for name, schema in scalars.items() if schema.get("type") not in ("array", "object")}
    parameters["stop"] = one_stop
    generate = {"id": or_null(STRING), "parameters": or_null(closed(parameters, ())), **own}
    return {
        "SamplingParameters": closed({name: or_null(known[name]) for name in names}, ()),
        "GenerateRequest": {
            **closed(generate, ()),
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
        "shape": listed(COUNT, 0, MAX_DIMS),
        "parameters": or_null({**OPEN, "properties": {"binary_data_size": COUNT}, "additionalProperties": SCALAR}),
        "data": {"type": "array", "description": "The elements in row-major order, flat or nested; none with binary."},
    }
    tensor = {field: tensor[field] for field in sorted(kserve_tensors.INPUT)}
    wanted = {"binary_data": BOOLEAN, "classification": COUNT}
    body: dict[str, Schema] = {
        "id": or_null(STRING),
        "model_name": {"description": "Taken, and without effect: the path has the name."},
        "model_version": {"description": "Taken, and without effect: the path has the version."},
        "parameters": or_null(
            {**OPEN, "properties": {"binary_data_output": BOOLEAN}, "additionalProperties": SCALAR}
        ),
        "inputs": listed(closed(tensor, ("name", "datatype", "shape"))),
        "outputs": or_null(
            listed({
                **OPEN, "required": ["name"],
                "properties": {
                    "name": name,
                    "parameters": or_null({**OPEN, "properties": wanted, "additionalProperties": SCALAR}),
                },
            })
        ),
    }  # fmt: skip
    return closed({field: body[field] for field in sorted(kserve_tensors.BODY)}, ("inputs",))


def _answers() -> dict[str, Schema]:
    reason: Schema = {**STRING, "enum": [*FINISH_REASONS]}
    message = closed({"role": {"const": "assistant"}, "content": STRING, "refusal": NULL})
    model: dict[str, Schema] = {
        "id": STRING, "object": {"const": "model"}, "created": COUNT, "owned_by": STRING, "version": STRING,
        "task": {**STRING, "enum": [*TASKS]}, "chat": BOOLEAN, "max_model_len": or_null(COUNT), "ready": BOOLEAN,
        "dimensions": or_null(COUNT), "labels": or_null(listed(STRING)),
    }  # fmt: skip
    delta = closed({"role": {"const": "assistant"}, "content": STRING}, ())
    chat, text, maybe = or_null(ref("ChatLogprobs")), or_null(ref("CompletionLogprobs")), or_null(reason)
    return {
        "ChatCompletion": _openai_answer("chat.completion", {"message": message, "logprobs": chat}, reason),
        "ChatCompletionChunk": _openai_answer(
            "chat.completion.chunk", {"delta": delta, "logprobs": chat}, maybe, False
        ),
        "Completion": _openai_answer("text_completion", {"text": STRING, "logprobs": text}, reason),
        "CompletionChunk": _openai_answer("text_completion", {"text": STRING, "logprobs": text}, maybe, False),
        **logprobs(),
        "Embeddings": _encoded(
            {
                "object": {"const": "embedding"},
                "index": COUNT,
                "embedding": {
                    "anyOf": [listed({"type": "number"}), {**STRING, "contentEncoding": "base64"}],
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
        "Usage": closed(
            {
                "prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT,
                "prompt_tokens_details": {
                    **closed({"cached_tokens": COUNT}),
                    "description": "Of the prompt's tokens those that the engine had read before; where it says so.",
                },
            },
            ("prompt_tokens", "completion_tokens", "total_tokens"),
        ),
        "Model": closed(model),
        "ModelList": closed({"object": {"const": "list"}, "data": listed(ref("Model"))}),
    }


def _encoded(row: dict[str, Schema]) -> Schema:
    usage = closed({"prompt_tokens": COUNT, "total_tokens": COUNT})
    return closed({"object": {"const": "list"}, "data": listed(closed(row)), "model": STRING, "usage": usage})


def _openai_answer(kind: str, content: dict[str, Schema], reason: Schema, whole: bool = True) -> Schema:
    choice = closed({"index": COUNT, **content, "finish_reason": reason})
    head: dict[str, Schema] = {
        "id": STRING, "object": {"const": kind}, "created": COUNT, "model": STRING, "choices": listed(choice)
    }  # fmt: skip
    usage = ref("Usage") if whole else {"anyOf": [ref("Usage"), NULL]}
    return closed({**head, "usage": usage}, (*head, *(["usage"] if whole else [])))


def _kserve_answers() -> dict[str, Schema]:
    head = {"model_name": STRING, "model_version": STRING, "id": STRING}
    numbers = {"num_input_tokens": COUNT, "num_output_tokens": each(COUNT), "num_cached_tokens": COUNT}
    reason = {**STRING, "enum": [*FINISH_REASONS, ""], "description": "Empty before the last event of an answer."}
    text = each({**STRING, "description": "A list of one for each answer where n is more than 1, as the others."})
    tensor = {
        "name": STRING, "datatype": STRING, "shape": listed({"type": "integer"}), "data": {"type": "array"},
        "parameters": closed({"binary_data_size": COUNT}),
    }  # fmt: skip
    described = {**OPEN, "properties": {"name": STRING, "datatype": STRING, "shape": {"type": "array"}}}
    return {
        "GenerateAnswer": closed(
            {**head, "text_output": text, "finish_reason": each(reason), "logprobs": each(STRING), **numbers},
            ("model_name", "model_version", "text_output"),
        ),
        "InferAnswer": closed(
            {**head, "outputs": listed(closed(tensor, ("name", "datatype", "shape")))},
            ("model_name", "model_version", "outputs"),
        ),
        "ServerMetadata": closed(
            {"name": STRING, "version": STRING, "extensions": listed({**STRING, "enum": [*EXTENSIONS]})}
        ),
        "ModelMetadata": {
            **OPEN,
            "required": ["name"],
            "properties": {
                "name": STRING,
                "versions": listed(STRING),
                "platform": STRING,
                "inputs": listed(described),
                "outputs": listed(described),
            },
        },
        "ModelConfig": {**OPEN, "description": "Triton's model configuration, as it is."},
        "ModelStatistics": {**OPEN, "description": "Triton's statistics, as they are."},
    }


def _states() -> dict[str, Schema]:
    states = {**OPEN, "additionalProperties": STRING, "description": "By model."}
    return {
        "Live": closed({"live": {"const": True}}),
        "KServeReady": closed({"ready": BOOLEAN}),
        "Ready": closed(
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
                "ready": BOOLEAN, "draining": BOOLEAN, "in_flight": COUNT, "models": listed(OPEN),
                "tritons": listed(closed({
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
