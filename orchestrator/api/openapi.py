"""The OpenAPI 3.1 document of the public edge, made of the same tables that the edges answer by, and served."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from orchestrator import errors
from orchestrator.api import errors as table
from orchestrator.api.admin import CONTROL
from orchestrator.api.bodies import CODINGS
from orchestrator.api.fields import Defaults
from orchestrator.api.http import Exchange
from orchestrator.api.middleware import OPEN, Routes
from orchestrator.api.openapi_parts import COUNT, STRING, Schema, ref
from orchestrator.api.openapi_schemas import openai_error, schemas
from orchestrator.domain import TASKS
from orchestrator.errors import TruthGPTError

JSON, BINARY, EVENTS = "application/json", "application/octet-stream", "text/event-stream"
CONNECTION = (400, 408, 414, 431, 503)  # answered before the path is known, always in OpenAI's form
_UNREAD = {408: "The request took too long to arrive.", 414: "The URL is too long."}

_OF_LIMIT: dict[str, tuple[str, Schema]] = {
    "limit": ("The limit nearest to exhaustion", COUNT),
    "remaining": ("What is left of it", COUNT),
    "reset": ("Until it is free again, such as 6m0s", STRING),
}
_NOTES = (
    "X-Cache", "X-TruthGPT-Fallback", "X-TruthGPT-Sanitized", "X-TruthGPT-Limit-Shadow", "RateLimit-Policy",
    "RateLimit", *(f"x-ratelimit-{what}-{unit}" for unit in ("requests", "tokens") for what in _OF_LIMIT),
)  # fmt: skip
_ALWAYS = {401: ("WWW-Authenticate",), 415: ("Accept-Encoding",), 429: ("Retry-After",), 503: ("Retry-After",)}

_READ = (errors.InternalError, TruthGPTError)  # what any handler may end with
_KEYED = (errors.Unauthenticated, errors.KeysUnavailable)
_TRITON = (errors.ModelNotFound, errors.UpstreamUnavailable, errors.UpstreamError, errors.DeadlineExceeded)


@dataclass(frozen=True)
class _Operation:
    """One method of one path. `answers` by status: media type -> schema; no media type is an empty body."""

    id: str
    method: str
    path: str
    summary: str
    answers: dict[int, dict[str, Schema]]
    errors: tuple[type[TruthGPTError], ...] = _READ
    body: dict[str, Schema] | None = None
    generates: bool = False  # it runs a model: what it is asked in headers counts, and what became of it is told

    @property
    def tag(self) -> str:
        return "OpenAI" if self.path.startswith("/v1") else "KServe v2" if self.path.startswith("/v2") else "Health"


def _operations() -> Iterator[_Operation]:
    every = tuple(table.TABLE)
    yield _Operation("live", "get", "/health/live", "Whether the process answers", {200: {JSON: ref("Live")}})
    ready = {200: {JSON: ref("Ready")}, 503: {JSON: ref("Ready")}}
    yield _Operation("ready", "get", "/health/ready", "Whether a request sent now could be answered", ready)
    yield _Operation("health", "get", "/health", "The state of everything, for people", {200: {JSON: ref("Health")}})
    yield _Operation("openapi", "get", "/openapi.json", "This document", {200: {JSON: {"type": "object"}}})

    yield _Operation(
        "createChatCompletion", "post", "/v1/chat/completions", "Answer a conversation",
        {200: {JSON: ref("ChatCompletion"), EVENTS: _events("ChatCompletionChunk", done=True)}}, every,
        {JSON: ref("ChatCompletionRequest")}, True,
    )  # fmt: skip
    yield _Operation(
        "createCompletion", "post", "/v1/completions", "Continue one text or several",
        {200: {JSON: ref("Completion"), EVENTS: _events("CompletionChunk", done=True)}}, every,
        {JSON: ref("CompletionRequest")}, True,
    )  # fmt: skip
    yield _Operation(
        "createEmbeddings", "post", "/v1/embeddings", "Turn texts into vectors",
        {200: {JSON: ref("Embeddings")}}, every, {JSON: ref("EmbeddingsRequest")}, True,
    )  # fmt: skip
    yield _Operation(
        "classify", "post", "/v1/classify", "Score texts by a model's labels",
        {200: {JSON: ref("Classified")}}, every, {JSON: ref("ClassifyRequest")}, True,
    )  # fmt: skip
    yield _Operation("listModels", "get", "/v1/models", "The models", {200: {JSON: ref("ModelList")}}, _READ + _KEYED)
    yield _Operation(
        "getModel", "get", "/v1/models/{model}", "One model", {200: {JSON: ref("Model")}},
        (*_READ, *_KEYED, errors.ModelNotFound),
    )  # fmt: skip

    yield _Operation("kserveLive", "get", "/v2/health/live", "Whether it answers", {200: {JSON: ref("Live")}})
    ready = {status: {JSON: ref("KServeReady")} for status in (200, 503)}
    yield _Operation("kserveReady", "get", "/v2/health/ready", "Whether a request could be answered", ready)
    yield _Operation(
        "serverMetadata", "get", "/v2", "Name, version and extensions", {200: {JSON: ref("ServerMetadata")}},
        _READ + _KEYED,
    )  # fmt: skip
    yield _Operation(
        "allStatistics", "get", "/v2/models/stats", "Statistics of every model",
        {200: {JSON: ref("ModelStatistics")}}, _READ + _KEYED + _TRITON,
    )  # fmt: skip
    for suffix, path in (("", "/v2/models/{model}"), ("OfVersion", "/v2/models/{model}/versions/{version}")):
        for id, end, summary, schema in (
            ("modelMetadata", "", "Inputs, outputs and versions of a model", "ModelMetadata"),
            ("modelConfig", "/config", "Its configuration", "ModelConfig"),
            ("modelStatistics", "/stats", "Its statistics", "ModelStatistics"),
        ):
            answers = {200: {JSON: ref(schema)}}
            yield _Operation(id + suffix, "get", path + end, summary, answers, _READ + _KEYED + _TRITON)
        unready = {200: {}, 400: {JSON: ref("KServeError")}}
        yield _Operation(
            f"modelReady{suffix}", "get", f"{path}/ready", "200 while the model answers, else 400", unready,
            _READ + _KEYED,
        )  # fmt: skip
        yield _Operation(
            f"infer{suffix}", "post", f"{path}/infer", "Run a model on tensors",
            {200: {JSON: ref("InferAnswer"), BINARY: {}}}, every, {JSON: ref("InferRequest"), BINARY: {}}, True,
        )  # fmt: skip
        yield _Operation(
            f"generate{suffix}", "post", f"{path}/generate", "Generate a text",
            {200: {JSON: ref("GenerateAnswer")}}, every, {JSON: ref("GenerateRequest")}, True,
        )  # fmt: skip
        yield _Operation(
            f"generateStream{suffix}", "post", f"{path}/generate_stream", "Generate a text, streamed",
            {200: {EVENTS: _events("GenerateAnswer", done=False)}}, every, {JSON: ref("GenerateRequest")}, True,
        )  # fmt: skip


def document(defaults: Defaults, body_limit_bytes: int, keys_needed: bool) -> dict[str, Any]:
    """The document. `keys_needed` says whether a request without a credential is refused."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in _operations():
        paths.setdefault(operation.path, {})[operation.method] = _described(operation, keys_needed)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "TruthGPT",
            "version": importlib.metadata.version("truthgpt"),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "description": _description(body_limit_bytes),
        },
        "paths": paths,
        "components": {
            "schemas": schemas(defaults),
            "parameters": _parameters(),
            "headers": _headers(),
            "responses": _errors(),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


class Description:
    """Serves the document, which is written once."""

    def __init__(self, defaults: Defaults, body_limit_bytes: int, keys_needed: bool) -> None:
        self._body = json.dumps(document(defaults, body_limit_bytes, keys_needed)).encode()

    @property
    def routes(self) -> Routes:
        return {"/openapi.json": {"GET": self.serve}}

    async def serve(self, exchange: Exchange) -> None:
        await exchange.reply(200, self._body)


def _description(body_limit_bytes: int) -> str:
    refused = "\n".join(f"- {' '.join(methods)} {path}" for path, methods in CONTROL.items())
    return (
        "OpenAI's API and KServe v2 (Triton's HTTP) in front of Triton. Every GET path answers HEAD, too. Messages "
        "of errors are in English or Spanish, by Accept-Language. A body may have "
        f"{body_limit_bytes} bytes, also when it was sent with Content-Encoding {' or '.join(CODINGS)}.\n\n"
        "A stream is a sequence of server-sent events whose first one fixes the status. An error after that is the "
        "last event, and an OpenAI stream that ends so has no [DONE].\n\n"
        "A connection that is refused before its request is read is answered with "
        f"{', '.join(map(str, CONNECTION))} in OpenAI's form, without X-Request-Id.\n\n"
        f"These paths are refused here with {table.TABLE[errors.PermissionDenied].status} and offered on the admin "
        f"port only:\n\n{refused}\n"
    )


def _described(operation: _Operation, keys_needed: bool) -> dict[str, Any]:
    names = [segment[1:-1] for segment in operation.path.split("/") if segment.startswith("{")]
    names += ["Accept-Language", "X-Request-Id", "traceparent"]
    if operation.generates:
        names += ["Cache-Control", "X-TruthGPT-Task"]
    if BINARY in (operation.body or {}):
        names.append("Inference-Header-Content-Length")
    described: dict[str, Any] = {
        "operationId": operation.id,
        "tags": [operation.tag],
        "summary": operation.summary,
        "parameters": [{"$ref": f"#/components/parameters/{name}"} for name in names],
        "security": _security(operation, keys_needed),
        "responses": _responses(operation),
    }
    if operation.body is not None:
        content = {kind: {"schema": schema} if schema else {} for kind, schema in operation.body.items()}
        described["requestBody"] = {"required": True, "content": content}
    return described


def _security(operation: _Operation, keys_needed: bool) -> list[dict[str, list[str]]]:
    if operation.path in OPEN:
        return []
    return [*([] if keys_needed else [{}]), {"bearer": []}, {"apiKey": []}]


def _responses(operation: _Operation) -> dict[str, Any]:
    """By status: the operation's own answers, and its errors by the table and by what the edge itself refuses."""
    rows = [table.TABLE[error] for error in operation.errors]
    if "{" in operation.path:
        rows.append(table.NOT_FOUND)  # a segment that is no text, or . and ..
    if operation.body is not None:
        rows.append(table.UNSUPPORTED_CODING)
    edge = "KServe" if operation.path.startswith("/v2") else "OpenAI"
    statuses = {*CONNECTION, *(row.status for row in rows)}
    responses = {str(status): {"$ref": f"#/components/responses/{edge}{status}"} for status in statuses}
    for status, content in operation.answers.items():
        names = ["X-Request-Id", *(_NOTES if operation.generates else ())]
        if BINARY in content:
            names.append("Inference-Header-Content-Length")
        if str(status) in responses:  # the same status has another body, too
            names += _ALWAYS.get(status, ())
            content = {JSON: {"anyOf": [content[JSON], *_forms(edge, status)]}}
        responses[str(status)] = _response("The answer." if status == 200 else "Not ready.", names, content)
    return dict(sorted(responses.items()))


def _errors() -> dict[str, Any]:
    """What both edges answer with each status that is no success."""
    rows = [*table.TABLE.values(), table.NOT_FOUND, table.UNSUPPORTED_CODING, table.HEADERS_TOO_LARGE]
    responses = {}
    for status in sorted({*CONNECTION, *(row.status for row in rows)}):
        codes = sorted({row.code or row.type for row in rows if row.status == status})
        words = _UNREAD.get(status) or f"{', '.join(codes)}."
        names = [] if status in _UNREAD else ["X-Request-Id", *_NOTES, *_ALWAYS.get(status, ())]
        for edge in ("OpenAI", "KServe"):
            forms = _forms(edge, status, (row for row in rows if row.status == status))
            schema = forms[0] if len(forms) == 1 else {"anyOf": forms}
            responses[f"{edge}{status}"] = _response(words, names, {JSON: schema})
    return responses


def _forms(edge: str, status: int, rows: Iterable[table.Row] = ()) -> list[Schema]:
    """The bodies of an error: the edge's, and OpenAI's of a connection that is refused before its path is known."""
    if edge == "OpenAI":
        return [ref("OpenAIError") if status in CONNECTION else openai_error(rows)]
    return [
        *([] if status in _UNREAD else [ref("KServeError")]),
        *([ref("OpenAIError")] if status in CONNECTION else []),
    ]


def _response(words: str, headers: Iterable[str], content: dict[str, Schema]) -> dict[str, Any]:
    described: dict[str, Any] = {
        "description": words,
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in headers},
    }
    if content:
        described["content"] = {kind: {"schema": schema} if schema else {} for kind, schema in content.items()}
    return described


def _parameters() -> dict[str, Any]:
    def header(name: str, description: str, schema: Schema = STRING) -> dict[str, Any]:
        return {"name": name, "in": "header", "required": False, "schema": schema, "description": description}

    def segment(name: str) -> dict[str, Any]:
        return {"name": name, "in": "path", "required": True, "schema": {**STRING, "minLength": 1}}

    headers = [
        header("Accept-Language", "en or es: the language of error messages."),
        header("X-Request-Id", "Echoed where it is 1 to 128 letters, digits and ._:/+=@-; else another is made."),
        header("traceparent", "W3C Trace Context, handed on to the model."),
        header("Cache-Control", "no-cache, no-store and max-age (RFC 9111); anything else says nothing."),
        header("X-TruthGPT-Task", "The task, where the model has several.", {**STRING, "enum": [*TASKS]}),
        header("Inference-Header-Content-Length", "Bytes of the JSON in front of the binary data.", COUNT),
    ]
    return {one["name"]: one for one in (*headers, segment("model"), segment("version"))}


def _headers() -> dict[str, Any]:
    def header(description: str, schema: Schema = STRING, required: bool = False) -> dict[str, Any]:
        return {"description": description, "required": required, "schema": schema}

    by_unit = {
        f"x-ratelimit-{what}-{unit}": header(f"{words}, in {unit}.", schema)
        for unit in ("requests", "tokens")
        for what, (words, schema) in _OF_LIMIT.items()
    }
    return {
        "X-Request-Id": header("The request's id.", required=True),
        "X-Cache": header("Where the answer comes from.", {**STRING, "enum": ["hit", "miss", "bypass"]}),
        "X-TruthGPT-Fallback": header("text, or model=NAME: the answer is not the model's that was asked for."),
        "X-TruthGPT-Sanitized": header("What was changed in the input."),
        "X-TruthGPT-Limit-Shadow": header("The limit that would have refused the request, were it enforced."),
        "RateLimit-Policy": header("The limits (IETF draft)."),
        "RateLimit": header("The state of the limit nearest to exhaustion (IETF draft)."),
        **by_unit,
        "Retry-After": header("Seconds.", {"type": "integer", "minimum": 1}, required=True),
        "WWW-Authenticate": header("Bearer.", required=True),
        "Accept-Encoding": header("The codings that are taken.", required=True),
        "Inference-Header-Content-Length": header("Bytes of the JSON in front of the binary data.", COUNT),
    }


def _events(chunk: str, done: bool) -> Schema:
    """One event of a stream; OpenAPI 3.1 has no word for the whole of it."""
    error = ref("OpenAIError" if done else "KServeError")
    content = {"contentMediaType": JSON, "contentSchema": {"anyOf": [ref(chunk), error]}}
    data = {"anyOf": [{"const": "[DONE]"}, {**STRING, **content}]} if done else {**STRING, **content}
    return {"type": "object", "description": "One event.", "required": ["data"], "properties": {"data": data}}
