"""transformers' `generate` in fp32: one static batch, its cache on, two threads. The reference for speed and tokens."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from benchmarks.peers import serving


class Stamp(StoppingCriteria):
    """Is asked after each token, and never stops."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.moments.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)


def load(asked: dict[str, Any]) -> serving.Batches:
    torch.set_num_threads(asked["threads"])
    model = AutoModelForCausalLM.from_pretrained(asked["checkpoint"], dtype=torch.float32).eval()

    def generate(prompts: list[list[int]], new: int) -> tuple[list[list[int]], list[float]]:
        ids, stamp = torch.tensor(prompts), Stamp()
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True, pad_token_id=0,
                max_new_tokens=new, min_new_tokens=new, stopping_criteria=StoppingCriteriaList([stamp]),
            )  # fmt: skip
        return out[:, ids.shape[1] :].tolist(), stamp.moments

    about = {"version": version("transformers"), "torch": torch.__version__}
    return serving.Batches(generate, about)


if __name__ == "__main__":
    serving.serve(load)
