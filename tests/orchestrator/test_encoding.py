"""An encoder's request in parts, its answer put together, and the text that the cache keeps of it."""

from __future__ import annotations

import asyncio
import json
import math
import struct

import pytest

from orchestrator.cache import Answer, decode, encode, encode_ticket
from orchestrator.domain import CachePolicy, Caller, Chunk, EncodeRequest, InferResult, Model, Tensor, changed
from orchestrator.encoding import encoded, parts, placed, require_finite, together
from orchestrator.errors import InvalidRequest, Text, UpstreamError
from orchestrator.operations import mismatch

MODEL = Model("e", "1", 0, True, task="embeddings", digest="d", operation="embed", seen=True, dim=2, max_batch=2)
REQUEST = EncodeRequest(id="r", model="e", accepted_at=0.0, texts=("a", "b", "ñ"))


def result(*rows: tuple[float, float]) -> InferResult:
    embedding = Tensor("embedding", "FP32", (len(rows), 2), b"".join(struct.pack("<2f", *row) for row in rows))
    counts = Tensor("num_input_tokens", "UINT32", (len(rows), 1), struct.pack("<I", 3) * len(rows))
    return InferResult("e", "1", (counts, embedding))


async def test_parts_and_together() -> None:
    """Three texts go two and one; the whole answer has their rows in order, and survives as text bit for bit."""
    first, second = parts(changed(REQUEST, truncate=True), 2)
    assert [part.inputs[0].elements for part in (first, second)] == [(b"a", b"b"), ("ñ".encode(),)]
    assert first.inputs[0].shape == (2, 1)
    assert (first.parameters, list(first.outputs)) == ({"truncate": True}, ["embedding", "num_input_tokens"])
    chunk = await together(REQUEST, MODEL, [result((0.1, 0.2), (-0.0, 1e-40)), result((3.0, 4.0))])
    assert (chunk.prompt_tokens, chunk.tokens, chunk.finish_reason, chunk.version) == (9, 0, "stop", "1")
    assert await encoded(MODEL, chunk) is chunk.encoded
    kept = decode(b"TG1 p 0000000000001 embeddings e\n" + encode(_answer(chunk), "e", "embeddings").partition(b"\n")[2])
    assert kept is not None
    answer = await encoded(MODEL, kept.chunk())
    assert answer == chunk.encoded
    assert answer.outputs["embedding"].data == struct.pack("<6f", 0.1, 0.2, -0.0, 1e-40, 3.0, 4.0)
    assert (answer.outputs["embedding"].shape, answer.tokens) == ((3, 2), 9)


def _answer(chunk: Chunk) -> Answer:
    return Answer(chunk.text, chunk.finish_reason or "", chunk.prompt_tokens, chunk.tokens)


def test_vectors_are_not_compressed() -> None:
    """What hardly gets smaller costs no time; text of the same length does get smaller."""
    answer = Answer("x" * 5000, "stop", 1, 0)
    assert encode(answer, "e", "embeddings").startswith(b"TG1 p ")
    assert encode(answer, "e", "sentiment_analysis").startswith(b"TG1 z ")


@pytest.mark.parametrize(
    "results",
    [
        [result((1, 0), (1, 0))],
        [result((1, 0), (1, 0)), InferResult("e", "1", ())],
        [result((1, 0), (1, 0)), InferResult("e", "1", (Tensor("embedding", "FP32", (2,), b"\0" * 8),))],
    ],
)
async def test_answers_that_make_no_sense(results: list[InferResult]) -> None:
    """Too few rows, and missing or misshapen outputs are the model's fault."""
    with pytest.raises(UpstreamError):
        await together(REQUEST, MODEL, results)


@pytest.mark.parametrize("row", [(math.nan, 0), (math.inf, -math.inf)])
@pytest.mark.parametrize("at", [0, 40_000, 65_536])
async def test_numbers_that_are_none(row: tuple[float, float], at: int) -> None:
    """NaN and infinities are the model's fault, in whichever piece of a large part they stand."""
    rows = [(1.0, 2.0)] * 70_000
    await require_finite(result(*rows))
    rows[at] = row
    with pytest.raises(UpstreamError, match="not finite"):
        await require_finite(result(*rows))


async def test_a_large_answer_holds_nobody_up() -> None:
    """2048 vectors of 1024 numbers are looked through, put together and read in pieces: others get their turns."""
    row, model = (0.5,) * 1024, changed(MODEL, dim=1024)
    data = struct.pack("<1024f", *row) * 64
    part = InferResult("e", "1", (
        Tensor("embedding", "FP32", (64, 1024), data), Tensor("num_input_tokens", "UINT32", (64, 1), bytes(256)),
    ))  # fmt: skip
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    chunk = await together(changed(REQUEST, texts=("a",) * 2048), model, [part] * 32)
    written, turns = turns, 0
    answer = await encoded(model, Chunk(chunk.text, prompt_tokens=0))
    task.cancel()
    assert written >= 31 and turns >= 31
    assert answer.outputs["embedding"].data == data * 32


FACTS = '{"version":"1","labels":["a","b"],"normalized":true}\n'


@pytest.mark.parametrize(
    "text",
    [
        "", "[]x", "3", "{}", '[["embedding","FP32",[1,2],"AAAA"]]', FACTS + '[["embedding","FP32",[1,2],"AAAA"]]',
        FACTS + '[["e"]]', FACTS + "3", FACTS + '[["a","b",1,2]]', FACTS + '[["scores","FP32",[1,1],"AAAAAA=="]]',
        FACTS + '[["scores","FP32",[1,2],"AAAAAAAAAAA="]]',
        FACTS + '[["scores","FP32",[1,2],"AAAAAAAAAAA="],["label","BYTES",[1,1],"AQAAAHg="]]',
    ],
)  # fmt: skip
async def test_a_kept_answer_that_is_none(text: str) -> None:
    """It is refused, never half read."""
    with pytest.raises(UpstreamError):
        await encoded(MODEL, Chunk(text))


async def test_an_answer_brings_the_facts_of_its_version() -> None:
    """Who reads it knows its labels, whatever has been loaded since."""
    old = changed(MODEL, version="1", labels=("no", "yes"), operation="classify", dim=None, normalized=False)
    tensors = (
        Tensor("scores", "FP32", (1, 2), struct.pack("<2f", 0.25, 0.75)),
        Tensor("label", "BYTES", (1, 1), elements=(b"yes",)),
        Tensor("num_input_tokens", "UINT32", (1, 1), struct.pack("<I", 3)),
    )
    request = changed(REQUEST, operation="classify", texts=("a",))
    text = (await together(request, old, [InferResult("e", "1", tensors)])).text
    answer = await encoded(changed(old, version="2", labels=("a", "b", "c"), normalized=True), Chunk(text))
    assert (answer.model.version, answer.model.labels, answer.model.normalized) == ("1", ("no", "yes"), False)
    assert answer.outputs["label"].elements == (b"yes",)


def test_where_a_text_stands() -> None:
    """What a model says of a part's text names its place in the request, in both languages."""
    said = "text_input[3] has 812 tokens; the model reads at most 512 (set truncate to cut)"
    error = placed(InvalidRequest(Text(said, said)), 64)
    assert error.param == "text_input[67]"
    assert "text_input[67] has 812 tokens; the model reads at most 512" in error.text.en
    assert "text_input[67] tiene 812 tokens; el modelo lee 512" in error.text.es
    other = placed(InvalidRequest(Text("text_input[0] is odd", "x")), 2)
    assert (other.param, other.text.en) == ("text_input[2]", "text_input[2] is odd")
    plain = InvalidRequest(Text("no", "no"), "x")
    assert placed(plain, 5) is plain


def test_half_a_surrogate_is_refused() -> None:
    """Text that has no UTF-8 is no text of another kind to the model."""
    with pytest.raises(InvalidRequest) as refused:
        parts(changed(REQUEST, texts=("a", "b", "\ud800")), 2)
    assert refused.value.param == "text_input[2]"


def test_what_shares_an_answer() -> None:
    """Tenant, model, what is loaded, operation, texts and truncate make the key; form, time-out and policy do not."""
    caller = Caller("c", "t")
    key = encode_ticket(caller, MODEL, REQUEST).key
    same = changed(REQUEST, id="x", dimensions=1, timeout_s=1.0, cache=CachePolicy(lookup=False))
    assert encode_ticket(Caller("other", "t"), MODEL, same).key == key
    others = [
        encode_ticket(Caller("c", "u"), MODEL, REQUEST),
        encode_ticket(caller, changed(MODEL, digest="e"), REQUEST),
        encode_ticket(caller, changed(MODEL, name="f"), REQUEST),
        encode_ticket(caller, MODEL, changed(REQUEST, truncate=True)),
        encode_ticket(caller, MODEL, changed(REQUEST, operation="classify")),
        encode_ticket(caller, MODEL, changed(REQUEST, task="sentiment_analysis")),
        encode_ticket(caller, MODEL, changed(REQUEST, texts=("a", "b"))),
        encode_ticket(caller, MODEL, changed(REQUEST, texts=(json.dumps(["a", "b", "ñ"]),))),
    ]
    assert len({key, *(ticket.key for ticket in others)}) == len(others) + 1


def test_who_would_do() -> None:
    """The sentence lists ten models at most."""
    many = [changed(MODEL, name=f"e{index:02}") for index in range(12)]
    asked = Model("m", "1", 0, True, seen=True)
    text = mismatch(asked, "embed", [asked, *many]).text
    assert "Models that do: e00, e01, e02, e03, e04, e05, e06, e07, e08, e09 …." in text.en
    assert "Lo hacen: e00" in text.es
