"""CTranslate2's Generator: whole batches, greedy. Settings: `weights`, its compute type (int8, bfloat16, float32, …).

It has no continuous batching for generators, so it is asked with batches only.
"""

from __future__ import annotations

import json
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ctranslate2

from benchmarks.peers import serving


def load(asked: dict[str, Any]) -> serving.Batches:
    folder = converted(Path(asked["checkpoint"]), Path(asked["converted"]), asked["weights"])
    generator = ctranslate2.Generator(
        str(folder), device="cpu", compute_type=asked["weights"], intra_threads=asked["threads"], inter_threads=1
    )
    words = _words(Path(asked["checkpoint"]))

    def generate(prompts: list[list[int]], new: int) -> tuple[list[list[int]], list[float]]:
        given = [[words[token] for token in prompt] for prompt in prompts]
        moments = [0.0] * new

        def stamp(step: Any) -> bool:
            moments[step.step] = time.perf_counter()
            return False

        results = generator.generate_batch(
            given, max_length=new, min_length=new, sampling_topk=1, beam_size=1, include_prompt_in_result=False,
            callback=stamp,
        )  # fmt: skip
        return [result.sequences_ids[0] for result in results], moments

    about = {"version": version("ctranslate2"), "weights": asked["weights"], "compute_type": generator.compute_type}
    return serving.Batches(generate, about)


def _words(checkpoint: Path) -> list[str]:
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).get_vocab()
    return sorted(vocabulary, key=lambda token: vocabulary[token])


def converted(checkpoint: Path, folder: Path, weights: str) -> Path:
    """The checkpoint in CTranslate2's format, made once."""
    target = folder / f"ctranslate2-{version('ctranslate2')}-{weights}"
    if target.exists():
        return target
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    converter = ctranslate2.converters.TransformersConverter(str(checkpoint))
    converter.convert(str(partial), quantization=weights)
    _name_special_tokens(partial / "config.json", _words(checkpoint)[0])
    partial.rename(target)
    return target


def _name_special_tokens(path: Path, token: str) -> None:
    """It does not load a model without them. The checkpoint has none, so they are a token that is never likely."""
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **{name: token for name in ("bos_token", "eos_token", "unk_token")}}))


if __name__ == "__main__":
    serving.serve(load)
