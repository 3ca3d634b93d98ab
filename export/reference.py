"""What transformers itself says: greedy continuations and the logits they came from, in fp32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache, PreTrainedModel

from export.errors import SourceError


@dataclass(frozen=True)
class Reference:
    """A prompt, the ``steps`` tokens that transformers continues it with, and logits [steps + 1, vocab].

    ``logits[0]`` belongs to the prompt's last position and ``logits[k]`` to the position of ``tokens[k - 1]``.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logits: npt.NDArray[np.float32]


def prompt_lengths(max_len: int, chunk: int, steps: int) -> tuple[int, ...]:
    """Prompt lengths worth checking: tiny ones, both sides of chunk boundaries, and one that ends at ``max_len``."""
    wanted = (1, 2, 3, 5, 7, 11, chunk - 1, chunk, chunk + 1, 2 * chunk + 3, max_len - steps)
    return tuple(sorted({length for length in wanted if 1 <= length <= max_len - steps}))


def make_prompts(lengths: Sequence[int], vocab_size: int, text: Sequence[int], seed: int = 0) -> list[tuple[int, ...]]:
    """One prompt for each length: every second one is real text (``text`` repeated), the others random tokens."""
    generator = np.random.default_rng(seed)
    prompts = []
    for index, length in enumerate(lengths):
        if index % 2 and text:
            start = int(generator.integers(len(text)))
            prompts.append(tuple(text[(start + offset) % len(text)] for offset in range(length)))
        else:
            prompts.append(tuple(int(token) for token in generator.integers(0, vocab_size, length)))
    return prompts


def run_reference(
    model: PreTrainedModel,
    prompts: Sequence[tuple[int, ...]],
    steps: int,
    progress: Callable[[float], None] = lambda fraction: None,
) -> list[Reference]:
    """Continue every prompt greedily with transformers' own forward and cache.

    Raises:
        SourceError: the checkpoint itself computes NaN or infinity.
    """
    references = []
    for index, prompt in enumerate(prompts):
        cache = DynamicCache(config=model.config)
        ids = torch.tensor([prompt])
        rows: list[npt.NDArray[np.float32]] = []
        tokens: list[int] = []
        for _ in range(steps + 1):
            position = torch.arange(cache.get_seq_length(), cache.get_seq_length() + ids.shape[1])[None]
            with torch.no_grad():
                output = model(input_ids=ids, position_ids=position, past_key_values=cache, logits_to_keep=1)
            rows.append(output.logits[0, -1].float().numpy().copy())
            tokens.append(int(rows[-1].argmax()))
            # The oldest families keep no cache: they read everything again.
            ids = torch.tensor([[tokens[-1]] if cache.get_seq_length() else [*prompt, *tokens]])
        logits = np.stack(rows)
        if not np.isfinite(logits).all():
            raise SourceError(
                "The checkpoint itself computes NaN or infinite logits.", "Its weights are damaged: fetch it again."
            )
        references.append(Reference(prompt, tuple(tokens[:steps]), logits))
        progress((index + 1) / len(prompts))
    return references
