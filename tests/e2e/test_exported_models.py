"""Exported models through the real Triton: the same tokens as transformers, whatever else is in the batch."""

from __future__ import annotations

import concurrent.futures
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.export.checkpoints import greedy_texts, write_checkpoint

from .stack import Stack

PROMPTS = [[random.Random(i).randrange(1, 250) for _ in range(1 + 7 * i % 90)] for i in range(12)]
NEW = 20


# Every weight in a file of its own beside the graph, as large models have theirs.
BESIDE = "import export.optimize as o, export.cli as c; o.EXTERNAL_DATA_BYTES = 0; c.export_command()"


@pytest.fixture(
    scope="module",
    params=["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "llama for tensorrt"))],
)
def exported(request: pytest.FixtureRequest) -> Iterator[tuple[Stack, Path]]:
    """A running stack that serves a tiny random checkpoint in fp32, exported by `truthgpt export`."""
    folder = Path(tempfile.mkdtemp(prefix="truthgpt-e2e-"))
    family, *target = request.param.split(" for ")
    checkpoint, name = folder / "checkpoint", f"tiny-{family}"
    write_checkpoint(checkpoint, family)
    beside = request.param == "llama"
    run = ["-c", BESIDE] if beside else ["-m", "export"]
    argv = [sys.executable, *run, str(checkpoint), "--name", name, "--prefill-chunk", "16", "--slots", "4"]
    argv += [f"--target={given}" for given in target]
    done = subprocess.run(
        [*argv, "--repository", str(folder / "repository"), "--json"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (Path(answer["path"]) / "model.onnx.data").exists() == beside
    assert answer["parity"]["greedy_agreement"] == 1.0 and answer["parity"]["max_abs_logit_diff"] <= 1e-4
    # random tokens are no text that could be cleaned
    stack = Stack(folder / "home", folder / "repository", name, extra={"TRUTHGPT_SANITIZE": "off"})
    try:
        stack.start()
        yield stack, checkpoint
    finally:
        stack.stop()
        assert stack.leftovers() == []
        shutil.rmtree(folder)


def ask(stack: Stack, prompt: list[int], **sampling: object) -> str:
    body = {"model": stack.model, "prompt": prompt, "max_tokens": NEW, "temperature": 0, **sampling}
    status, _, answer = stack.request("POST", "/v1/completions", body, timeout=60)
    assert status == 200, answer
    return str(json.loads(answer)["choices"][0]["text"])


def test_greedy_answers_are_those_of_transformers(exported):
    """Through the gateway, Triton and the backend, with chunked prefill: the text that transformers generates."""
    stack, checkpoint = exported
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert list(pool.map(lambda p: ask(stack, p), PROMPTS)) == greedy_texts(checkpoint, PROMPTS, NEW)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 11, "top_p": 0.95}], ids=["greedy", "seeded"])
def test_an_answer_does_not_depend_on_its_company(exported, sampling):
    """In fp32 a greedy or a seeded request gives the same text alone and among eleven others on four slots."""
    stack, _ = exported
    alone = [ask(stack, p, **sampling) for p in PROMPTS]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert list(pool.map(lambda p: ask(stack, p, **sampling), PROMPTS)) == alone


@pytest.fixture(params=["fp16", "int4"])
def narrow(request: pytest.FixtureRequest) -> Iterator[tuple[Stack, Path]]:
    """A running stack that serves the tiny GPT-2 in a narrow precision on the processor, and the entry's folder."""
    folder = Path(tempfile.mkdtemp(prefix="truthgpt-e2e-"))
    checkpoint, repository = folder / "checkpoint", folder / "repository"
    write_checkpoint(checkpoint, "gpt2")
    argv = [sys.executable, "-m", "export", str(checkpoint), "--name", "narrow", "--precision", request.param]
    argv += ["--prefill-chunk", "16", "--slots", "4", "--device", "cpu", "--repository", str(repository), "--json"]
    argv += ["--allow-drift", "0.7"] if request.param == "int4" else []
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    stack = Stack(folder / "home", repository, "narrow", extra={"TRUTHGPT_SANITIZE": "off"})
    try:
        stack.start()
        yield stack, repository / "narrow" / "1"
    finally:
        stack.stop()
        assert stack.leftovers() == []
        shutil.rmtree(folder)


@pytest.mark.slow
def test_narrow_entries_are_served_as_they_were_verified(narrow):
    """Through Triton, four at a time, an fp16 or int4 entry gives the text that its own graph gives one at a time."""
    stack, entry = narrow
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert list(pool.map(lambda p: ask(stack, p), PROMPTS)) == alone(entry)


def alone(entry: Path) -> list[str]:
    """The greedy answers of an entry's graph in the exporter's runtime, one prompt in one piece at a time."""
    from tokenizers import Tokenizer

    from export.runtime import SlotRuntime

    tokenizer, eos = Tokenizer.from_file(str(entry / "tokenizer.json")), 0
    runtime = SlotRuntime(entry / "model.onnx", 1)
    texts = []
    for prompt in PROMPTS:
        tokens = [int(runtime.prefill(0, prompt, 0).argmax())]
        while len(tokens) < NEW and tokens[-1] != eos:
            tokens.append(int(runtime.decode([tokens[-1]], [len(prompt) + len(tokens) - 1])[0].argmax()))
        texts.append(tokenizer.decode([token for token in tokens if token != eos], skip_special_tokens=True))
    return texts
