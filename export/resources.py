"""What an export takes of memory and disk: asked for before weights are read, given back when done with."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from transformers import AutoConfig

from export.errors import ExportError
from export.precision import HALVES, TABLE
from export.source import Source

# Python, torch, transformers and ONNX Runtime with nothing loaded: 440 MB, and what tracing adds.
_BASE = 600_000_000
_KV_ROWS = 8
# What an element of the embeddings takes beside its share of the weights.
_EMBEDDING_BYTES = {"int8": 5, "int4": 3.2}


@dataclass(frozen=True)
class Needs:
    """Bytes of memory (at the peak) and of disk (in the repository) that an export takes."""

    memory: int
    disk: int


def needs(
    source: Source,
    precision: str,
    max_len: int,
    calibrated: bool = False,
    pairs: int | None = None,
    int8_cache: bool = False,
) -> Needs:
    """An upper estimate. Weights count as loaded, in fp32, whatever the checkpoint stores them as.

    ``pairs``: pairs of tokens in the largest run of an encoder's artefact, which attends to all at once and has no
    cache; None for a decoder.

    In memory it is the larger of two moments: the checkpoint with its longest reference run or its converted matrices
    beside it, and the artefact in ONNX Runtime, which packs every matrix once more. Halves are run beside the
    checkpoint to see what overflows, what gets int8 slots to see how large keys and values are, and a calibration text
    is read by the fp32 graph, which is on disk then. Looked-up embeddings keep 4 bytes an element in int8 and 2 in
    int4, and tied ones are stored a second time. Experts stay fp32 in both.
    """
    loaded = 4 * source.parameters()
    largest = 4 * max((tensor.elements for tensor in source.tensors), default=0)
    config = text_config(source)
    heads, width = number(config, "num_attention_heads"), number(config, "hidden_size")
    layers, embedding = number(config, "num_hidden_layers"), number(config, "vocab_size") * width
    attention = 4 * 4 * heads * max_len**2  # fp32 scores of one layer, a few times over
    served = 4 * 4 * heads * pairs if pairs is not None else 0
    cache = 0 if pairs is not None else 2 * 4 * layers * width * min(max_len * 2, max_len * _KV_ROWS)
    if precision == "fp32":
        artefact = working = loaded
        packed = loaded + 2 * largest
    else:
        whole = 0 if precision in HALVES else 4 * sum(tensor.elements for tensor in source.stacked)
        weights = whole + int(TABLE[precision].weight_bytes / 4 * (loaded - whole))
        artefact = weights + int(_EMBEDDING_BYTES.get(precision, 0) * embedding)
        working = loaded + artefact + loaded // 12 + 3 * largest
        packed = artefact + (loaded if precision in HALVES else weights)  # halves are computed in fp32
        if precision in HALVES or int8_cache:
            working += packed + cache
    if calibrated:
        working = max(working, 2 * loaded + 2 * largest + cache)
    memory = _BASE + max(loaded + attention, working, packed + cache + served)
    return Needs(int(1.05 * memory), int(1.1 * max(artefact, loaded if calibrated else 0)) + 32_000_000)


def text_config(source: Source) -> object:
    """The configuration of what reads text, by transformers' names; as it is written where transformers knows it not.

    Families call their sizes differently (``n_embd``, ``d_model``), and some keep them in ``text_config``.
    """
    try:
        config = AutoConfig.from_pretrained(source.path, trust_remote_code=source.trust.code, local_files_only=True)
        return config.get_text_config()
    except Exception:  # told of in its place, when the model is loaded
        return SimpleNamespace(**source.config)


def number(config: object, name: str) -> int:
    """A size that the configuration states, 0 where it does not."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else 0


def require_memory(needed: int, available: int) -> None:
    """Raise `ExportError` if the export would not fit."""
    if available < needed:
        raise ExportError(
            f"The export needs {size(needed)} of memory at its peak, but only {size(available)} are available.",
            "Close other programs, raise the container's memory limit, add swap, or use a larger machine.",
        )


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may still take: free or reclaimable memory plus swap, within its control group's limit.

    Source: https://docs.kernel.org/filesystems/proc.html and https://docs.kernel.org/admin-guide/cgroup-v2.html.
    """
    facts = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines() if ":" in line)
    free = 1024 * sum(int(facts.get(key, "0 kB").split()[0]) for key in ("MemAvailable", "SwapFree"))
    return min([free, *_group_limits(proc, cgroups)])


def release() -> None:
    """Give the memory of dropped objects back to the kernel: models are full of cycles, and glibc keeps freed pages."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return  # another C library: it has its own mind about freed memory


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _group_limits(proc: Path, cgroups: Path) -> list[int]:
    """What each control group above this process leaves, in bytes; version 2, then version 1 as containers mount it."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    own = next((line[3:] for line in lines if line.startswith("0::")), "/").strip("/")
    folders = [cgroups / own, *(cgroups / own).parents] if own else [cgroups]
    left = []
    for folder in folders:
        if folder != cgroups and cgroups not in folder.parents:
            break
        left += _left(folder, "memory.max", "memory.current", "inactive_file")
    return left + _left(cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _left(folder: Path, limit: str, usage: str, cached: str) -> list[int]:
    try:
        maximum = int((folder / limit).read_text())
        used = int((folder / usage).read_text())
        lines = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or "max"
        return []
    return [max(0, maximum - used + int(lines.get(cached, 0)))]
