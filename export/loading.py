"""Reading a checkpoint's weights into torch, in fp32, and nothing invented where some are missing."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from export.errors import DAMAGED, SourceError, UnsupportedModel
from export.source import Source

# How a configuration calls the length of its sequences; the last two are those of ALiBi models (MPT, Bloom).
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_LARGE = 250_000  # elements, 1 MB


def load_model(source: Source, auto: Any = AutoModelForCausalLM, unused: str = "") -> PreTrainedModel:
    """The model in evaluation mode, float32, with transformers' plainest attention, loaded by one of its Auto classes.

    Weights whose names begin with ``unused`` (if given) may be missing: nothing that is exported reads them.

    Raises:
        SourceError: weights are missing, damaged, NaN or infinite, or of other shapes than the configuration says.
    """
    try:
        model, report = auto.from_pretrained(
            source.path,
            dtype=torch.float32,
            attn_implementation="eager",
            trust_remote_code=source.trust.code,
            use_safetensors=not source.pickled,
            weights_only=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise SourceError(f"{source.id} cannot be loaded: {_summary(error)}", DAMAGED) from error
    for key, what in (("missing_keys", "lacks the weight"), ("mismatched_keys", "has another shape for the weight")):
        names = sorted(str(name) for name in report.get(key) or ())
        names = [name for name in names if not (unused and name.startswith(unused))]
        if names:
            raise SourceError(f"{source.id} {what} {names[0]} ({len(names)} in all).", DAMAGED)
    model.eval()
    require_finite(model, source.id)
    share_identical(model)
    loaded: PreTrainedModel = model
    return loaded


def require_finite(model: torch.nn.Module, name: str) -> None:
    """Raise `SourceError` naming the first parameter that holds NaN or infinity."""
    for key, weight in model.named_parameters():
        # One pass without a temporary: both ends are NaN where anything is.
        if weight.numel() and not all(bool(torch.isfinite(end)) for end in torch.aminmax(weight.detach())):
            raise SourceError(f"{name} has NaN or infinite values in the weight {key}.", DAMAGED)


def share_identical(model: torch.nn.Module) -> None:
    """Make large parameters with the same content one, in place, so that they are traced and stored once.

    Checkpoints that were saved untied often hold the embeddings twice.
    """
    seen: dict[tuple[torch.Size, bytes], list[torch.nn.Parameter]] = {}
    for module in model.modules():
        for key, weight in list(module.named_parameters(recurse=False)):
            if weight.numel() < _LARGE:
                continue
            flat = weight.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 64)].numpy().tobytes()
            alike = seen.setdefault((weight.shape, sample), [])
            known = next((other for other in alike if other is weight or torch.equal(other, weight)), None)
            if known is None:
                alike.append(weight)
            elif known is not weight:
                setattr(module, key, known)


def limit(source: Source, max_len: int | None) -> int:
    """How many tokens a sequence may hold: ``max_len``, or the model's positions up to 2048.

    Raises:
        UnsupportedModel: ``max_len`` is beyond the model's positions, or the configuration states none.
        SourceError: the configuration contradicts itself.
    """
    try:
        config = AutoConfig.from_pretrained(source.path, trust_remote_code=source.trust.code, local_files_only=True)
    except Exception as error:
        raise SourceError(f"The configuration of {source.id} cannot be used: {_summary(error)}", DAMAGED) from error
    text = config.get_text_config()
    positions = next((getattr(text, name) for name in _POSITIONS if getattr(text, name, None)), None)
    if not isinstance(positions, int) or positions < 1:
        if max_len is None:
            raise UnsupportedModel(f"{source.id} does not say how long its sequences may be.", "Give --max-len.")
        return max_len
    if max_len is not None and max_len > positions:
        raise UnsupportedModel(
            f"--max-len {max_len} is beyond the {positions} positions of {source.id}.", f"Give at most {positions}."
        )
    return min(positions, 2048) if max_len is None else max_len


def _summary(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
