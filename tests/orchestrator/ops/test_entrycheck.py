"""Encoders' entries: a good one is found good, and each fault in it is named. Generation models' are in test_doctor."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from orchestrator import encoding, models
from orchestrator.ops import entrycheck
from orchestrator.triton.client import ENCODERS
from tests import counting
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


def test_entries_with_and_without_the_count_of_cached_tokens(tmp_path: Path) -> None:
    """An older generation entry is as good as one that declares the pair; half of it, or of another type, is named."""
    flag, count = entrycheck.CACHED
    written = counting.CONFIG.format(name="c").splitlines()
    older = "\n".join(line for line in written if flag not in line and count not in line).replace("},\n]", "}\n]")
    half = f'{older}\noutput [{{ name: "{count}" data_type: TYPE_UINT32 dims: [1] }}]\n'
    whole = f'{half}input [{{ name: "{flag}" data_type: TYPE_BOOL dims: [1] optional: true }}]\n'
    for config, said in (
        (whole, []),
        (older, []),
        (half, ["must be there both or neither"]),
        (whole.replace(f'"{count}" data_type: TYPE_UINT32', f'"{count}" data_type: TYPE_INT64'), [f"output {count}"]),
    ):
        counting.write_entry(tmp_path, "c")
        (tmp_path / "c" / "config.pbtxt").write_text(config)
        found = entrycheck.of_config(models.get(tmp_path, "c"), {})
        assert len(found) == len(said) and all(word in one for word, one in zip(said, found, strict=True)), found
        shutil.rmtree(tmp_path / "c")
