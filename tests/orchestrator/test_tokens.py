"""What a request may use in tokens, and what can never fit."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from orchestrator.domain import GenerateRequest, Limits, Message, Model
from orchestrator.errors import InvalidRequest
from orchestrator.tokens import Tokens
from orchestrator.triton import Deadlines, Triton

from .fake_triton import FakeTriton

MODEL = Model("m", "1", 0, ready=True, chat=True, max_len=64)
COUNTED = Limits(tokens_per_minute=1000)


@pytest.fixture
async def tokens(fake: FakeTriton) -> AsyncIterator[Tokens]:
    triton = Triton(fake.url, Deadlines())
    yield Tokens(triton, default_max_tokens=20)
    await triton.close()


def request(**changes: Any) -> GenerateRequest:
    given = (
        {"text": None, **changes} if "token_ids" in changes or "messages" in changes else {"text": "a b c", **changes}
    )
    return GenerateRequest(**{"id": "r", "model": "m", "accepted_at": time.monotonic(), **given})


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({}, 3 + 20),
        ({"max_tokens": 5}, 3 + 5),
        ({"token_ids": (1, 2, 3, 4)}, 4 + 20),
        ({"messages": (Message("user", "a b"), Message("assistant", "c"))}, 3 + 20),
        ({"token_ids": (1,) * 60, "max_tokens": 30}, 64),
    ],
)
async def test_the_most_that_a_request_can_use(tokens: Tokens, changes: dict[str, Any], most: int) -> None:
    """Prompt, as the model's tokenizer counts it, and answer, never more than the model's context."""
    assert await tokens.fit(MODEL, request(**changes), COUNTED) == most


async def test_the_tokenizer_is_asked_only_where_it_matters(tokens: Tokens, fake: FakeTriton) -> None:
    """A caller without token limits costs no question."""
    assert await tokens.fit(MODEL, request(), Limits(per_minute=1)) == 0
    assert fake.calls == []


async def test_a_model_that_is_away_is_estimated_from_above(fake: FakeTriton) -> None:
    """The request may still be answered from the cache: bytes bound the tokens, and so does the context."""
    triton = Triton(fake.url, Deadlines(connect_s=0.2))
    await fake.stop()
    try:
        most = await Tokens(triton, 20).fit(MODEL, request(text="¿ñ?"), COUNTED)
        assert 5 + 20 <= most <= 64
        assert await Tokens(triton, 20).fit(MODEL, request(text="a" * 500), COUNTED) == 64
    finally:
        await triton.close()
        await fake.start()


@pytest.mark.parametrize(
    ("changes", "param"),
    [({"max_tokens": 64}, "max_tokens"), ({"token_ids": (1,) * 64}, "prompt")],
)
async def test_what_can_never_fit_is_refused(tokens: Tokens, changes: dict[str, Any], param: str) -> None:
    """The refusal names the field, what was given and the model's context."""
    with pytest.raises(InvalidRequest, match="64") as refused:
        await tokens.fit(MODEL, request(**changes), Limits())
    assert refused.value.param == param


async def test_a_model_without_a_template_takes_no_conversation(tokens: Tokens) -> None:
    """The refusal says what to do instead."""
    model = Model("m", "1", 0, ready=True, chat=False)
    with pytest.raises(InvalidRequest, match="chat template"):
        await tokens.fit(model, request(messages=(Message("user", "x"),)), Limits())
