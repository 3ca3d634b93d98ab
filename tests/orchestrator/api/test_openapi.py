"""The OpenAPI document: whole, valid, and the same as what is served."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
import schemathesis.specs.openapi.schemas  # now, and not while threads of other tests compile, too

from orchestrator import hardening
from orchestrator.api import errors as table
from orchestrator.api.admin import CONTROL
from orchestrator.api.fields import Defaults
from orchestrator.api.middleware import OPEN
from orchestrator.api.notes import note_headers
from orchestrator.api.openapi import CONNECTION, document
from orchestrator.app import Application
from orchestrator.domain import Notes, Window
from orchestrator.hardening import Refusal

from ..conftest import serving
from ..fake_triton import FakeTriton

DOCUMENT = document(Defaults(0.7), 1 << 20, keys_needed=True)
OPERATIONS = {
    (method, path): described for path, methods in DOCUMENT["paths"].items() for method, described in methods.items()
}


def resolved(value: Any) -> Any:
    """What a reference stands for, or the value itself."""
    while isinstance(value, dict) and "$ref" in value:
        name = value["$ref"]
        value = DOCUMENT
        for step in name.removeprefix("#/").split("/"):
            value = value[step]
    return value


def references(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value
        for child in value.values():
            yield from references(child)
    elif isinstance(value, list):
        for child in value:
            yield from references(child)


async def test_it_is_served_to_everyone(fake: FakeTriton) -> None:
    """The document is there without a key, and says whether one is needed and how long a body may be."""
    async with serving(fake, auth="keys", temperature=0.3, body_limit_bytes=77_777) as stack:
        status, body, headers = await stack.get("/openapi.json")
        assert (status, headers["content-type"]) == (200, "application/json")
        assert body == json.loads(json.dumps(document(Defaults(0.3), 77_777, keys_needed=True)))
        assert "77777 bytes" in body["info"]["description"]
    without = document(Defaults(0.3), 1, keys_needed=False)
    assert {} in without["paths"]["/v1/models"]["get"]["security"]
    assert {} not in body["paths"]["/v1/models"]["get"]["security"]


async def test_every_route_and_method_is_described_and_no_other(fake: FakeTriton) -> None:
    """What the front door serves is what the document describes; what it refuses to everyone stands in its text."""
    async with serving(fake) as stack:
        application = stack.server.config.app
        assert isinstance(application, Application) and application._door is not None
        routes = application._door.routes
    served = {(method.lower(), path) for path, methods in routes.items() for method in methods if path not in CONTROL}
    assert served == set(OPERATIONS)
    for path, methods in CONTROL.items():
        assert set(routes[path]) == set(methods)
        assert f"{' '.join(methods)} {path}\n" in DOCUMENT["info"]["description"]


async def test_no_other_method_is_taken(fake: FakeTriton) -> None:
    """A path answers 405 to every method that is not described, and says which ones it takes."""
    async with serving(fake) as stack:
        for path in DOCUMENT["paths"]:
            taken = {method.upper() for method, of in OPERATIONS if of == path}
            taken |= {"HEAD"} if "GET" in taken else set()
            for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"} - taken:
                url = stack.url + path.format(model="m", version="1")
                async with stack.http.request(method, url) as response:
                    assert (response.status, set(response.headers["allow"].split(", "))) == (405, taken), (method, path)


def test_it_is_valid() -> None:
    """It is an OpenAPI 3.1 document, every reference leads somewhere, and no operation's id is there twice."""
    schemathesis.openapi.from_dict(DOCUMENT).validate()
    for reference in references(DOCUMENT):
        assert isinstance(resolved(reference), dict), reference
    ids = [described["operationId"] for described in OPERATIONS.values()]
    assert len(ids) == len(set(ids))


def test_every_error_is_described() -> None:
    """An operation that runs a model has every status of the error table; every operation has those of a connection,
    and every code stands in the words of its status."""
    statuses = {str(row.status) for row in table.TABLE.values()}
    for (method, path), described in OPERATIONS.items():
        assert {str(status) for status in CONNECTION} <= set(described["responses"]), path
        if method == "post":
            assert statuses <= set(described["responses"]), path
            assert str(table.UNSUPPORTED_CODING.status) in described["responses"], path
        assert ("401" in described["responses"]) == bool(described["security"]) == (path not in OPEN), path
        for name in (segment for segment in path.split("/") if segment.startswith("{")):
            assert f"#/components/parameters/{name[1:-1]}" in [one["$ref"] for one in described["parameters"]]
    for row in (*table.TABLE.values(), table.NOT_FOUND, table.UNSUPPORTED_CODING, table.HEADERS_TOO_LARGE):
        for edge in ("OpenAI", "KServe"):
            assert (row.code or row.type) in DOCUMENT["components"]["responses"][f"{edge}{row.status}"]["description"]


def test_what_a_connection_is_refused_with_is_described() -> None:
    """The statuses that come before there is a request are those of refusals.py, and their bodies fit."""
    refusals = [value for value in vars(hardening).values() if isinstance(value, Refusal)]
    assert {refusal.status for refusal in refusals} == set(CONNECTION)
    for refusal in refusals:
        forms = json.dumps(DOCUMENT["components"]["responses"][f"KServe{refusal.status}"]["content"])
        assert "OpenAIError" in forms
        body = json.loads(refusal.encode([]).partition(b"\r\n\r\n")[2])
        properties = DOCUMENT["components"]["schemas"]["OpenAIError"]["properties"]["error"]["properties"]
        assert set(body["error"]) == set(properties)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v2/models/{model}/generate", "/v2/models/{model}/infer"])
def test_every_header_of_an_answer_is_described(path: str) -> None:
    """Each header that notes turn into is described, on success and on every error of the table."""
    windows = tuple(Window(name, 5, 1, 2.0) for name in ("minute", "tokens_day"))
    notes = Notes(windows=windows, shadow="minute", cache="hit", fallback="text", sanitized=("control",))
    names = {name.decode() for name, _ in note_headers(notes)}
    responses = OPERATIONS["post", path]["responses"]
    for status in {200, *(row.status for row in table.TABLE.values())}:
        described = {name.lower() for name in resolved(responses[str(status)])["headers"]}
        assert names | {"x-request-id"} <= described, status
        assert ("retry-after" in described) == (status in (429, 503))
