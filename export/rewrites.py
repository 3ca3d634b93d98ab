"""The same arithmetic in a form that the tracer or the quantisers can take; done to the model before it is traced."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from export.errors import UnsupportedModel

GATHERED_BYTES = 1 << 30
# How configurations call the number of experts that a token chooses.
_CHOSEN = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")
# Rotary embeddings whose frequencies follow the longest sequence of the call.
_GROWING = ("dynamic", "longrope")


def rewrite(model: PreTrainedModel) -> None:
    """Do all of it, in place."""
    linear_instead_of_conv1d(model)
    _experts_by_gathering(model)
    _fixed_rotary(model)
    _concatenated_latent_keys(model)


def linear_instead_of_conv1d(model: PreTrainedModel) -> None:
    """Replace GPT-2's ``Conv1D`` by the ``nn.Linear`` it is, in place, sharing the weights.

    Conv1D flattens its input and calls addmm, which exports as Gemm between two reshapes; the quantisers want MatMul.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape, device="meta")
            linear.weight = nn.Parameter(module.weight.detach().t(), requires_grad=False)
            linear.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
            model.set_submodule(name, linear)


def _experts_by_gathering(model: PreTrainedModel) -> None:
    # The other ways to run a mixture of experts sort or loop by how many tokens each expert got: no fixed graph.
    if type(model)._can_set_experts_implementation():
        for config in (model.config, model.config.get_text_config()):
            config._experts_implementation = "batched_mm"


def prefill_chunk(model: PreTrainedModel, wanted: int) -> int:
    """Tokens to prefill in one step: ``wanted``, or fewer where gathering their experts would take over 1 GiB."""
    per_token = max((_expert_bytes(module) for module in model.modules()), default=0)
    text = model.config.get_text_config()
    chosen = next((getattr(text, name) for name in _CHOSEN if getattr(text, name, None)), 1)
    if not per_token:
        return wanted
    return max(1, min(wanted, GATHERED_BYTES // (per_token * int(chosen))))


def _expert_bytes(module: nn.Module) -> int:
    """Bytes of one expert's float32 weights, in a module that holds those of all experts; 0 in another."""
    weights = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim == 3]
    if not type(module).__name__.endswith("Experts") or not weights:
        return 0
    return 4 * sum(int(weight[0].numel()) for weight in weights)


def require_fixed_rotary(model: PreTrainedModel, max_len: int) -> None:
    """Raise `UnsupportedModel` if rotary frequencies would change within ``max_len`` tokens.

    Such frequencies change when a sequence outgrows the length of the pre-training: keys that are cached by then have
    the old ones, and neighbours in the batch would get the new ones.
    """
    for module, kinds in _growing(model):
        original = _pretrained_length(module)
        if max_len > original:
            kind = next(kind for kind in kinds.values() if kind in _GROWING)
            raise UnsupportedModel(
                f"{model.config.model_type} changes its rotary positions ({kind}) beyond {original} tokens, so rows of "
                "one batch would need different ones.",
                f"Give --max-len {original} or less.",
            )


def _fixed_rotary(model: PreTrainedModel) -> None:
    # Within the length of the pre-training they are constant, and the tracer need not see how they would grow.
    for module, kinds in _growing(model):
        fixed = {name: "default" if kind in _GROWING else kind for name, kind in kinds.items()}
        module.rope_type = fixed if isinstance(module.rope_type, dict) else fixed[""]


def _growing(model: PreTrainedModel) -> Iterator[tuple[nn.Module, dict[str, str]]]:
    """Rotary embeddings that grow, with the kind of each type of layer ("" where there is but one)."""
    for module in model.modules():
        kind = getattr(module, "rope_type", "")
        kinds: dict[str, str] = kind if isinstance(kind, dict) else {"": kind}
        if any(kind in _GROWING for kind in kinds.values()):
            yield module, kinds


def _pretrained_length(module: nn.Module) -> int:
    parameters = getattr(module.config, "rope_parameters", None) or {}
    nested = [part for part in parameters.values() if isinstance(part, dict)] or [parameters]
    lengths = [
        part["original_max_position_embeddings"] for part in nested if "original_max_position_embeddings" in part
    ]
    return int(min(lengths, default=getattr(module, "original_max_seq_len", module.config.max_position_embeddings)))


def _concatenated_latent_keys(model: PreTrainedModel) -> None:
    # Latent attention (DeepSeek) fills a new tensor part by part, which the converter to ONNX gets wrong.
    for module in model.modules():
        if hasattr(module, "expand_kv") and hasattr(module, "kv_b_proj"):
            module.expand_kv = _expand_kv(module)


def _expand_kv(module: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    def expand_kv(latent: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, _, seq, _ = latent.shape
        widths = [module.qk_nope_head_dim, module.v_head_dim]
        expanded = module.kv_b_proj(latent).view(rows, seq, -1, sum(widths)).transpose(1, 2)
        key, value = torch.split(expanded, widths, dim=-1)
        return torch.cat([key, rotated.expand(-1, key.shape[1], -1, -1)], dim=-1), value

    return expand_kv
