"""Checkpoints and entries that several tests look at; they are made once a run and must not be changed."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from export.manifest import Serving
from export.pipeline import Exported, ExportOptions, export_model
from tests.export.checkpoints import write_gpt2, write_llama
from tests.export.drafts import Draft, draft, load
from tests.once import once

# The models here are tiny: a second thread would only wait for the first.
torch.set_num_threads(1)
# torch's structured trace sends thousands of empty debug records to whoever listens, and pytest does.
logging.getLogger("torch.__trace").propagate = False


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 checkpoint without a chat template."""
    return once(tmp_path_factory, "gpt2", lambda folder: write_gpt2(folder / "tiny-gpt2"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama checkpoint with a chat template and grouped key/value heads."""
    return once(tmp_path_factory, "llama", lambda folder: write_llama(folder / "tiny-llama"))


@pytest.fixture(scope="session")
def gpt2_draft(gpt2: Path) -> Draft:
    """The tiny GPT-2, traced in fp32; clone its graph before changing it."""
    return draft(load(gpt2))


@pytest.fixture(scope="session")
def llama_draft(llama: Path) -> Draft:
    """The tiny Llama, traced in fp32; clone its graph before changing it."""
    return draft(load(llama))


@pytest.fixture(scope="session")
def published(gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The tiny GPT-2, exported in fp32."""
    return once(
        tmp_path_factory, "published", lambda folder: export_model(ExportOptions(str(gpt2), folder / "repository"))
    )


@pytest.fixture(scope="session")
def published_llama(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The tiny Llama, exported in int8 with serving options of its own."""

    def make(folder: Path) -> Exported:
        options = ExportOptions(
            str(llama),
            folder / "repository",
            name="llama-int8",
            precision="int8",
            max_len=96,
            serving=Serving(slots=4, prefill_chunk=16, max_queue=7),
        )
        return export_model(options)

    return once(tmp_path_factory, "published-llama", make)


@pytest.fixture(scope="session")
def published_tensorrt(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The tiny Llama for the target tensorrt, 64 tokens long."""

    def make(folder: Path) -> Exported:
        root = folder / "repository"
        return export_model(ExportOptions(str(llama), root, "engine", "fp16", max_len=64, target="tensorrt"))

    return once(tmp_path_factory, "published-tensorrt", make)
