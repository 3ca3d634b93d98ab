"""Every decoder family through the real Triton: exported, served, and compared with transformers' generate."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import logging
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from export.manifest import Serving
from export.pipeline import ExportOptions, export_model
from tests.export.checkpoints import greedy_texts, write_family
from tests.export.families import FAMILIES, VARIANTS, Family

from .stack import Stack

# torch's structured trace sends thousands of empty debug records to whoever listens, and pytest does.
logging.getLogger("torch.__trace").propagate = False
# On both sides of a chunk, of the tiny windows (16), and near the end of the 128 positions.
LENGTHS = (1, 5, 17, 40, 104)
NEW = 16


CASES = [(family.name, family) for family in FAMILIES] + [*VARIANTS.items()]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """A running stack that serves a tiny GPT-2, and to whose Triton further models are loaded."""
    folder = Path(tempfile.mkdtemp(prefix="truthgpt-families-"))
    checkpoint = write_family(folder / "checkpoint", FAMILIES[0])
    export_model(ExportOptions(str(checkpoint), folder / "repository", "tiny"))
    stack = Stack(folder / "home", folder / "repository", "tiny")
    try:
        stack.start()
        yield stack
    finally:
        stack.stop()
        shutil.rmtree(folder)


def triton(stack: Stack, path: str, body: dict[str, Any]) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", stack.ports["TRITON_HTTP"], timeout=60)
    try:
        connection.request("POST", f"/v2/{path}", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        assert answer.status == 200, text
        return dict(json.loads(text or b"{}"))
    finally:
        connection.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", [pytest.param(family, id=name.replace(" ", "-")) for name, family in CASES])
def test_a_family_generates_what_transformers_generates(stack: Stack, tmp_path: Path, family: Family) -> None:
    """Exported, verified and served in flight, its greedy answers to prompts of many lengths are `generate`'s."""
    checkpoint = write_family(tmp_path / "checkpoint", family)
    options = ExportOptions(
        str(checkpoint),
        stack.repository,
        "family",
        max_len=128,
        serving=Serving(slots=3, prefill_chunk=16, max_queue=16),
    )
    shutil.rmtree(stack.repository / "family", ignore_errors=True)
    parity = export_model(options).parity
    assert parity["max_abs_logit_diff"] <= 5e-5 and parity["rms_over_std"] <= 1e-5
    assert parity["greedy_agreement"] == 1.0
    numbers = random.Random(1)
    prompts = [[numbers.randrange(1, 250) for _ in range(length)] for length in LENGTHS]
    triton(stack, "repository/models/family/load", {})
    try:
        with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(lambda prompt: answer(stack, prompt), prompts))
    finally:
        triton(stack, "repository/models/family/unload", {})
    # How many replacement characters bytes that are no text become depends on where a stream is cut.
    assert [text.replace("\ufffd", "") for text in answers] == [
        text.replace("\ufffd", "") for text in greedy_texts(checkpoint, prompts, NEW, attn_implementation="eager")
    ]


def answer(stack: Stack, prompt: list[int]) -> str:
    sampling = json.dumps({"prompt_token_ids": prompt, "max_tokens": NEW, "temperature": 0})
    body = {"text_input": "", "sampling_parameters": sampling}
    return str(triton(stack, "models/family/generate", body)["text_output"])
