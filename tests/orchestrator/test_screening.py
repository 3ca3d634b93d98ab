"""Whole requests pass the sanitising rules: prompts, conversations, token lists, texts to embed and text tensors."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.domain import EncodeRequest, InferRequest, Tensor
from orchestrator.errors import UnsafeInput
from orchestrator.inspection import Inspector
from orchestrator.sanitize import Rules
from orchestrator.screening import Screen

from .conftest import serving
from .fake_triton import FakeTriton
from .fleets import fleet_of

DIRTY = "Hola <script>alert(1)</script>mundo"
PATH = "/v1/completions"


async def test_clean_removes_says_so_and_asks_with_the_rest(fake: FakeTriton) -> None:
    """In clean mode the model gets the cleaned text, and a header and the record name what was removed."""
    async with serving(fake, sanitize="clean") as stack:
        status, _, headers = await stack.post(PATH, {"model": "m", "prompt": DIRTY})
        assert (status, headers["x-truthgpt-sanitized"]) == (200, "script")
        assert fake.requests[0]["text_input"] == "Hola mundo"
        assert stack.records[0].sanitized == ("script",)
        chat = [{"role": "system", "content": "x"}, {"role": "user", "content": DIRTY}]
        await stack.post("/v1/chat/completions", {"model": "m", "messages": chat})
        sent = json.loads(fake.requests[1]["sampling_parameters"])["messages"]
        assert sent == [{"role": "system", "content": "x"}, {"role": "user", "content": "Hola mundo"}]


async def test_a_body_that_comes_again_is_treated_as_before(fake: FakeTriton) -> None:
    """Clean or not, three times the same: the same answer, the same headers, the same prompt at the model."""
    async with serving(fake, sanitize="clean") as stack:
        for prompt, changes in ((DIRTY, "script"), ("Hola", None)):
            for _ in range(3):
                status, _, headers = await stack.post(PATH, {"model": "m", "prompt": prompt})
                assert (status, headers.get("x-truthgpt-sanitized")) == (200, changes)
        assert [sent["text_input"] for sent in fake.requests] == ["Hola mundo"] * 3 + ["Hola"] * 3


@pytest.mark.parametrize("language", ["en", "es"])
async def test_reject_refuses_with_a_reason(fake: FakeTriton, language: str) -> None:
    """In reject mode it is 400 with its own code, the field's name and a sentence in the caller's language."""
    async with serving(fake, sanitize="reject") as stack:
        status, body, _ = await stack.post(PATH, {"model": "m", "prompt": DIRTY}, **{"accept-language": language})
        assert (status, body["error"]["code"], body["error"]["param"]) == (400, "unsafe_input", "prompt")
        assert not fake.requests
        ok = await stack.post(PATH, {"model": "m", "prompt": "¿Cómo estás, JavaScript: The Good Parts?"})
        assert ok[0] == 200
        assert fake.requests[0]["text_input"] == "¿Cómo estás, JavaScript: The Good Parts?"


async def test_off_changes_nothing(fake: FakeTriton) -> None:
    """Switched off, a prompt passes byte for byte."""
    async with serving(fake, sanitize="off") as stack:
        assert (await stack.post(PATH, {"model": "m", "prompt": DIRTY + "  \u202e"}))[0] == 200
        assert fake.requests[0]["text_input"] == DIRTY + "  \u202e"


async def test_token_lists_are_read_as_text_and_kept_where_nothing_changes(fake: FakeTriton) -> None:
    """Harmless token ids reach the model as they are; ids that spell something dangerous become clean text."""
    fake.words = {7: "javascript:alert(1)"}
    async with serving(fake, sanitize="clean") as stack:
        await stack.post(PATH, {"model": "m", "prompt": [1, 2]})
        assert json.loads(fake.requests[0]["sampling_parameters"])["prompt_token_ids"] == [1, 2]
        _, _, headers = await stack.post(PATH, {"model": "m", "prompt": [1, 7, 2]})
        assert headers["x-truthgpt-sanitized"] == "uri"
        assert "javascript" not in fake.requests[1]["text_input"]
        assert "w1" in fake.requests[1]["text_input"]
    async with serving(fake, sanitize="reject") as stack:
        assert (await stack.post(PATH, {"model": "m", "prompt": [1, 7, 2]}))[0] == 400


async def test_tensors_of_text_pass_the_same_rules(fake: FakeTriton) -> None:
    """BYTES elements are cleaned or refused by their tensor's name; binary ones and numbers pass as they are."""
    fleet = fleet_of(fake.url)
    inspect = Inspector(fleet)
    try:
        numbers = Tensor("n", "FP32", (1,), data=b"\0\0\0\0")
        binary = Tensor("b", "BYTES", (1,), elements=(b"\xff<script>",))
        mixed = Tensor("t", "BYTES", (2,), elements=(b"\xff", DIRTY.encode()))
        dirty = Tensor("t", "BYTES", (2,), elements=(DIRTY.encode(), "¿ñ?".encode()))
        request = InferRequest(id="r", model="m", accepted_at=0.0, inputs=(numbers, binary, dirty))
        cleaned, changes = Screen(Rules("clean", 10_000), inspect).infer(request)
        assert changes == ("script",)
        assert cleaned.inputs[:2] == (numbers, binary)
        assert cleaned.inputs[2].elements == (b"Hola mundo", "¿ñ?".encode())
        assert Screen(Rules("off", 10_000), inspect).infer(request) == (request, ())
        with pytest.raises(UnsafeInput) as refused:
            Screen(Rules("reject", 10_000), inspect).infer(request)
        assert refused.value.param == "t"
        hidden = replace(request, inputs=(mixed,))
        assert Screen(Rules("clean", 100), inspect).infer(hidden)[0].inputs[0].elements == (b"\xff", b"Hola mundo")
        long = Tensor("a", "BYTES", (2,), elements=(b"x" * 60, b"y" * 60))
        with pytest.raises(UnsafeInput, match="120 characters; the limit is 100"):
            Screen(Rules("reject", 100), inspect).infer(replace(request, inputs=(long,)))
        embed = EncodeRequest(id="r", model="m", accepted_at=0.0, texts=(DIRTY, "b"))
        assert (await Screen(Rules("clean", 10_000), inspect).encode(embed))[0].texts == ("Hola mundo", "b")
        many = replace(embed, texts=("x" * 60,) * 2000)  # each within the limit, which all together are not
        assert await Screen(Rules("reject", 100), inspect).encode(many) == (many, ())
    finally:
        await fleet.close()


@pytest.mark.parametrize("prompt", [" ", "\u202e", "<script></script>"])
async def test_a_prompt_of_nothing_is_refused(fake: FakeTriton, prompt: Any) -> None:
    """What is empty, or is once it is cleaned, is 400."""
    async with serving(fake, sanitize="clean") as stack:
        assert (await stack.post(PATH, {"model": "m", "prompt": prompt}))[0] == 400
        assert not fake.requests
