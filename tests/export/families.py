"""Every decoder family of transformers that is exported, as a tiny configuration.

`tests/e2e/test_families.py` exports each, serves it through Triton and compares with transformers' generate;
`tests/export/test_decoder.py` proves that the others are refused by name. docs/models.md is made from both tables.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VOCAB_SIZE = 384
_LATENT = {
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
# Fields that many families have, made small; each is set where the family has it.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.1,
    "head_dim": 16,
    "sliding_window": 16,
    "query_pre_attn_scalar": 16,
    "word_embed_proj_dim": 64,
    "ffn_dim": 128,
    "n_inner": 128,
    "is_decoder": True,
    "max_window_layers": 1,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
}
# Set whether or not the family's configuration names them.
_ALWAYS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "bos_token_id", "eos_token_id")


@dataclass(frozen=True)
class Family:
    """A ``model_type``, what is particular about it, and the fields of its tiny configuration that differ."""

    name: str
    note: str = ""
    overrides: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()

    def config(self) -> Any:
        """The tiny configuration."""
        from transformers import AutoConfig

        default = AutoConfig.for_model(self.name).get_text_config()
        sizes = {
            key: value
            for key, value in _SIZES.items()
            if key not in self.without and (key in _ALWAYS or hasattr(default, key))
        }
        return AutoConfig.for_model(self.name, **(sizes | self.overrides))


FAMILIES = (
    Family("gpt2", "also DialoGPT", without=("n_inner",)),
    Family("llama", "grouped key/value heads; also Llama 2 and 3, TinyLlama, SmolLM"),
    Family("mistral", "sliding window"),
    Family("qwen2", "window in the upper layers", {"use_sliding_window": True}),
    Family("qwen3", "normalised queries and keys"),
    Family("phi3", "fused projections, window", {"pad_token_id": 0}),
    Family("gemma2", "soft-capped scores and logits, window in every other layer, scaled embeddings",
           {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    Family("gemma3_text", "window in most layers, two rotary bases"),
    Family("smollm3", "layers without positions", {"no_rope_layers": [1, 0]}),
    Family("olmo2", "normalised after the block"),
    Family("granite", "scaled embeddings, residuals and logits",
           {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5,
            "attention_multiplier": 0.1}),
    Family("gpt_neox", "parallel attention, partial rotary; also Pythia"),
    Family("opt", "learnt positions with an offset"),
    Family("starcoder2", "window"),
    Family("stablelm", "partial rotary, parallel attention", {"use_parallel_residual": True}),
    Family("afmoe", "mixture of experts, window in most layers"),
    Family("apertus"),
    Family("arcee"),
    Family("axk1", "latent attention, mixture of experts", _LATENT),
    Family("beam", "window in every other layer"),
    Family("bert", "as a decoder (is_decoder)"),
    Family("bert-generation"),
    Family("biogpt"),
    Family("bitnet", "in float, its ternary weights unpacked"),
    Family("bloom", "ALiBi"),
    Family("codegen", "parallel attention, partial rotary, own attention", {"rotary_dim": 8}),
    Family("cohere", "parallel attention, scaled logits; also Command R"),
    Family("cohere2", "window, layers without positions"),
    Family("cohere2_moe", "mixture of experts"),
    Family("ctrl"),
    Family("cwm", "window in most layers"),
    Family("deepseek_v3", "latent attention, mixture of experts; also R1", _LATENT),
    Family("dots1", "mixture of experts"),
    Family("ernie4_5"),
    Family("ernie4_5_moe", "mixture of experts"),
    Family("exaone4", "window, layers without positions"),
    Family("exaone_moe", "mixture of experts, window"),
    Family("falcon", "parallel attention, grouped heads, own attention",
           {"num_kv_heads": 2, "new_decoder_architecture": True}, ("head_dim", "num_key_value_heads")),
    Family("flex_olmo", "mixture of experts"),
    Family("flint", "attention sinks"),
    Family("fuyu", "its text model"),
    Family("gemma", "scaled embeddings, wide heads", {"head_dim": 40}),
    Family("glm", "partial rotary"),
    Family("glm4", "partial rotary"),
    Family("glm4_moe", "mixture of experts"),
    Family("glm4_moe_lite", "latent attention, mixture of experts", _LATENT),
    Family("gpt_bigcode", "one key/value head; also StarCoder"),
    Family("gpt_neo", "window in every other layer, unscaled scores, own attention",
           {"attention_types": [[["global", "local"], 1]], "window_size": 16}, ("num_key_value_heads",)),
    Family("gpt_oss", "attention sinks, mixture of experts, window in every other layer"),
    Family("gptj", "parallel attention, partial rotary, own attention", {"rotary_dim": 8}),
    Family("granite_swa", "attention sinks, window"),
    Family("granitemoe", "mixture of experts"),
    Family("granitemoe_swa", "mixture of experts, attention sinks, window"),
    Family("granitemoeshared", "mixture of experts"),
    Family("helium"),
    Family("hunyuan_v1_dense"),
    Family("hunyuan_v1_moe", "mixture of experts"),
    Family("hy_v3", "mixture of experts"),
    Family("hyperclovax", "scaled embeddings and logits"),
    Family("jais2"),
    Family("jetmoe", "mixture of experts, of attention heads too"),
    Family("kolibri1"),
    Family("laguna", "mixture of experts"),
    Family("mellum", "mixture of experts, window"),
    Family("mimo_v2_flash", "caches of different shapes, sinks, mixture of experts, window"),
    Family("minicpm3", "latent attention", _LATENT),
    Family("minimax_m2", "mixture of experts"),
    Family("ministral", "window in every other layer"),
    Family("ministral3"),
    Family("mixtral", "mixture of experts"),
    Family("modernbert-decoder", "window in most layers", {"local_attention": 16}),
    Family("mpt", "ALiBi, own attention"),
    Family("nanochat", "soft-capped logits"),
    Family("nemotron", "partial rotary"),
    Family("olmo", "norms without weights"),
    Family("olmo3", "window in most layers"),
    Family("olmoe", "mixture of experts"),
    Family("openai-gpt", "the first GPT; own attention"),
    Family("persimmon", "partial rotary"),
    Family("phi", "parallel attention, partial rotary"),
    Family("qwen2_moe", "mixture of experts"),
    Family("qwen3_moe", "mixture of experts"),
    Family("seed_oss"),
    Family("solar_open", "mixture of experts"),
    Family("vaultgemma", "soft-capped scores and logits"),
    Family("xglm", "own attention"),
    Family("youtu", "latent attention", _LATENT),
)  # fmt: skip

# What is particular about a checkpoint, whatever its family.
VARIANTS = {
    "odd heads": Family("llama", "", {"hidden_size": 48, "head_dim": 12}),
    "tied embeddings": Family("llama", "", {"tie_word_embeddings": True}),
    "scaled rotary": Family(
        "llama",
        "",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "ALiBi on six heads": Family("bloom", "", {"n_head": 6, "num_attention_heads": 6, "hidden_size": 96}),
    "one key/value head": Family("falcon", "", {"multi_query": True}, ("head_dim", "num_key_value_heads")),
}


@dataclass(frozen=True)
class Refusal:
    """A configuration that is not exported, what the error says (a pattern), and why, for docs/models.md."""

    family: Family
    message: str
    why: str


# Refused before anything is traced.
REFUSED: dict[str, Refusal] = {
    "Mamba, RWKV, xLSTM": Refusal(Family("falcon_mamba"), "position_ids", "recurrent: there is no attention to cache"),
    "LFM2, Falcon H1, Jamba, Zamba, Qwen3-Next, Granite 4 and other hybrids": Refusal(
        Family("lfm2", "", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64}),
        "layers but 1 calls|mixes tokens",
        "some layers are recurrent or convolve: their state has no place in the cache",
    ),
    "DeepSeek V2, Llama 4": Refusal(
        Family("deepseek_v2", "", _LATENT), "complex numbers", "rotary positions in complex numbers, which ONNX lacks"
    ),
    "DeepSeek V3.2, GLM 5": Refusal(
        Family("deepseek_v32", "", _LATENT | {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 8}),
        "'indices'",
        "sparse attention: an indexer chooses the positions",
    ),
    "Doge": Refusal(Family("doge"), "bias or mask of its own", "learns a mask over the values"),
    "DiffLlama": Refusal(Family("diffllama"), "2 layers but 4 calls", "two attentions in a layer"),
    "Falcon with ALiBi (Falcon-RW)": Refusal(
        Family("falcon", "", {"alibi": True}, ("head_dim", "num_key_value_heads")),
        "bfloat16",
        "rounds its position biases to bfloat16",
    ),
    "Aria, LongCat, PhiMoE": Refusal(Family("phimoe"), "by experts", "sort their tokens by experts"),
    "RoFormer, RemBERT, GPT-NeoX Japanese": Refusal(
        Family("gpt_neox_japanese"), "attention interface", "attention outside transformers' interface"
    ),
    "BART, Marian, Whisper and other decoders with an encoder": Refusal(
        Family("bart"), "position_ids", "count their positions themselves, from the cache that they do not get here"
    ),
    "BERT and its kin without `is_decoder`": Refusal(
        Family("bert", "", {"is_decoder": False}), "not causal|neither", "attend in both directions"
    ),
    "dynamic or long rotary positions beyond the length of the pre-training": Refusal(
        Family("llama", "", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0,
                                                 "original_max_position_embeddings": 64}}),
        "rotary positions",
        "they change with the longest sequence of a batch; with a `--max-len` up to that length they are exported",
    ),
}  # fmt: skip


def random_model(family: Family, seed: int = 0) -> Any:
    """The tiny model with random weights, float32, every parameter random: norms and biases too."""
    import torch
    from transformers import AutoModelForCausalLM

    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(family.config()).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    finally:
        torch.random.set_rng_state(state)
    return model
