"""What a request may use in tokens, and what can never fit."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from orchestrator.domain import GenerateRequest, Limits, Message, Model
from orchestrator.errors import InvalidRequest
from orchestrator.inspection import Inspector
from orchestrator.tokens import Tokens
from orchestrator.triton import Deadlines
from tests.clock import awake

from .fake_triton import FakeTriton
from .fleets import fleet_of, running

MODEL = Model("m", "1", 0, ready=True, chat=True, max_len=64)
COUNTED = Limits(tokens_per_minute=1000)


@asynccontextmanager
async def counting(fake: FakeTriton) -> AsyncIterator[Tokens]:
    """Tokens over the real parts below it."""
    async with running(fleet_of(fake.url, deadlines=Deadlines(connect_s=0.2, heartbeat_s=0.3))) as fleet:
        yield Tokens(Inspector(fleet), default_max_tokens=20)


@pytest.fixture
async def tokens(fake: FakeTriton) -> AsyncIterator[Tokens]:
    async with counting(fake) as made:
        yield made


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
        ({"max_tokens": 5, "n": 3}, 3 + 3 * 5),
        ({"max_tokens": 5, "n": 2, "best_of": 4}, 3 + 4 * 5),
        ({"token_ids": (1,) * 60, "max_tokens": 30, "n": 2}, 64 + 30),
    ],
)
async def test_the_most_that_a_request_can_use(tokens: Tokens, changes: dict[str, Any], most: int) -> None:
    """Prompt, as the model's tokenizer counts it, and each answer that is made, the first never more than the model's
    context; what is known without asking it is never less.
    """
    asked = request(**changes)
    assert await tokens.exact(MODEL, asked) == most <= tokens.fit(MODEL, asked, COUNTED)


async def test_the_tokenizer_is_asked_only_where_it_matters(tokens: Tokens, fake: FakeTriton) -> None:
    """To know a bound costs no question, and without token limits there is none."""
    assert tokens.fit(MODEL, request(), Limits(per_minute=1)) == 0
    assert tokens.fit(MODEL, request(), COUNTED) > 0
    assert fake.inspected == 0
    await tokens.exact(MODEL, request())
    assert fake.inspected == 1


@pytest.mark.parametrize("fault", ["dead", "stopped"])
async def test_a_model_that_is_away_is_estimated_from_above(fake: FakeTriton, fault: str) -> None:
    """The request may still be answered from the cache: bytes bound the tokens, and so does the context; and it is
    found out as soon as the model's health says so.
    """
    async with counting(fake) as tokens:
        if fault == "dead":
            await fake.stop()
        else:
            fake.stopped = True
        began = awake()
        most = await tokens.exact(MODEL, request(text="¿ñ?"))
        assert awake() - began < 1.5
        assert 5 + 20 <= most <= 64
        assert await tokens.exact(MODEL, request(text="a" * 500)) == 64
        if fault == "dead":
            await fake.start()


@pytest.mark.parametrize(
    ("changes", "param"),
    [({"max_tokens": 64}, "max_tokens"), ({"token_ids": (1,) * 64}, "prompt")],
)
async def test_what_can_never_fit_is_refused(tokens: Tokens, changes: dict[str, Any], param: str) -> None:
    """The refusal names the field, what was given and the model's context."""
    with pytest.raises(InvalidRequest, match="64") as refused:
        tokens.fit(MODEL, request(**changes), Limits())
    assert refused.value.param == param


async def test_a_model_without_a_template_takes_no_conversation(tokens: Tokens) -> None:
    """The refusal says what to do instead."""
    model = Model("m", "1", 0, ready=True, chat=False)
    with pytest.raises(InvalidRequest, match="chat template"):
        tokens.fit(model, request(messages=(Message("user", "x"),)), Limits())
