"""Encoders' entries: a good one is found good, and each fault in it is named. Generation models' are in test_doctor."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from orchestrator import encoding, models
from orchestrator.ops import entrycheck
from orchestrator.triton.client import ENCODERS
from tests.encoding import CLASSIFIES, EMBEDS, write_encoder


def entry(repository: Path, name: str, parameters: dict[str, str], *changes: tuple[str, str]) -> models.Entry:
    """One as the exporter writes it, after these changes of its config.pbtxt."""
    folder = write_encoder(repository, name, parameters)
    (folder / "1" / "model.py").unlink()
    for file in entrycheck.REQUIRED_FILES:
        (folder / "1" / file).write_text(file)
    files = {file: {"sha256": hashlib.sha256(file.encode()).hexdigest()} for file in entrycheck.REQUIRED_FILES}
    manifest = {"format": 1, "name": name, "version": "1", "task": parameters["task"], "files": files}
    (folder / "1" / "manifest.json").write_text(json.dumps(manifest))
    config = (folder / "config.pbtxt").read_text()
    for old, new in (('backend: "python"', 'backend: "encoder"'), *changes):
        assert old in config
        config = config.replace(old, new)
    (folder / "config.pbtxt").write_text(config)
    return models.get(repository, name)


@pytest.mark.parametrize("parameters", [EMBEDS, CLASSIFIES])
def test_a_good_entry(tmp_path: Path, parameters: dict[str, str]) -> None:
    """Nothing is wrong with it."""
    assert entrycheck.problems(entry(tmp_path, "e", parameters)) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("max_batch_size: 64", "max_batch_size: 0", "max_batch_size is 0 and must be at least 1"),
        ('name: "e"', 'name: "f"', "name is 'f' and must be 'e'"),
        ('string_value: "embeddings"', 'string_value: "translation"', "must be embeddings or sentiment_analysis"),
        ('name: "embedding"', 'name: "vector"', "output embedding must be TYPE_FP32"),
        ("TYPE_UINT32", "TYPE_INT64", "output num_input_tokens must be TYPE_UINT32"),
        ('name: "heartbeat"', 'name: "pulse"', "output pulse is not known"),
        ("max_batch_size: 64", "max_batch_size: 64 model_transaction_policy { decoupled: true }", "must not say"),
    ],
)
def test_a_fault(tmp_path: Path, old: str, new: str, said: str) -> None:
    """It is named."""
    assert any(said in problem for problem in entrycheck.problems(entry(tmp_path, "e", EMBEDS, (old, new))))


def test_the_contract_is_one() -> None:
    """What is checked here is what the gateway knows an encoder by, and what it asks it for."""
    assert {*entrycheck.ENCODER_OUTPUTS} == {*ENCODERS}
    for task, (operation, output) in ENCODERS.items():
        assert output in encoding.OUTPUTS[operation]
        assert {*entrycheck.ENCODER_OUTPUTS[task]} == {*encoding.OUTPUTS[operation], "heartbeat"}
