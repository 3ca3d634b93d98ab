"""Traced fp32 graphs of tiny checkpoints with what transformers says to them: what the conversions work on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onnxscript import ir
from torch import nn
from transformers import PreTrainedModel

from export.decoder import trace
from export.loading import load_model
from export.optimize import optimize, save
from export.probe import probe
from export.reference import Reference, make_prompts, prompt_lengths, run_reference
from export.runtime import SlotRuntime
from export.source import resolve
from export.verify import BATCH, Comparison, exercise, fresh_batch, interleaved
from tests.export.checkpoints import VOCAB_SIZE

MAX_LEN = 64
CHUNK = 16


@dataclass(frozen=True)
class Draft:
    """A graph and its references."""

    graph: ir.Model
    references: list[Reference]

    def exercise(self, runtime: SlotRuntime) -> None:
        """Run every length and batch size."""
        exercise(runtime, self.references, CHUNK)

    def drift(self, graph: ir.Model, folder: Path) -> Comparison:
        """How far a graph's logits are from the references'."""
        folder.mkdir(parents=True, exist_ok=True)
        save(graph, folder)
        comparison = Comparison()
        runtime = SlotRuntime(folder / "model.onnx", BATCH)
        interleaved(runtime, self.references, CHUNK, comparison)
        fresh_batch(runtime, [given for given in self.references if len(given.prompt) <= CHUNK][:BATCH], comparison)
        return comparison


def load(checkpoint: Path) -> PreTrainedModel:
    """The checkpoint's model, to be changed before it is drafted."""
    return load_model(resolve(str(checkpoint)))


def draft(model: PreTrainedModel) -> Draft:
    """Trace a model and ask it for its references."""
    layout = probe(model, MAX_LEN)
    prompts = make_prompts(prompt_lengths(MAX_LEN, CHUNK, 4), VOCAB_SIZE, [])
    references = run_reference(model, prompts, 4)
    graph = trace(model, layout, MAX_LEN)
    optimize(graph)
    return Draft(graph, references)


def scale(linear: nn.Module, factor: float) -> None:
    """Multiply a linear module's weight."""
    linear.weight.data.mul_(factor)
