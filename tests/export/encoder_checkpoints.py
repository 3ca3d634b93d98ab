"""Tiny encoder checkpoints with random weights and a real WordPiece tokenizer, in the Hugging Face format."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.export.checkpoints import _CORPUS as CORPUS

VOCAB_SIZE = 320
PAD = 1  # not 0: a graph that takes the wrong id for padding shall be found out


@dataclass(frozen=True)
class Family:
    """An encoder of transformers: configuration fields that it names differently or has beside the common ones, and
    what docs/encoders.md says about it.
    """

    note: str
    fields: dict[str, Any] = field(default_factory=dict)


_BEHIND_PADDING = {"max_position_embeddings": 66, "type_vocab_size": 1}
_RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}

# tests/export/test_encoder.py exports each with both kinds of head; docs/encoders.md is made from it.
FAMILIES: dict[str, Family] = {
    "bert": Family("learned positions, segments; also through Triton, with the weights of all-MiniLM-L6-v2"),
    "distilbert": Family("no segments", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}),
    "roberta": Family("positions are numbered from behind the padding token's", _BEHIND_PADDING),
    "xlm-roberta": Family("positions like RoBERTa's", _BEHIND_PADDING),
    "camembert": Family("positions like RoBERTa's", _BEHIND_PADDING),
    "ernie": Family("BERT's layers; no task ids"),
    "mpnet": Family("relative position bias, positions like RoBERTa's", {"max_position_embeddings": 66}),
    "electra": Family("embeddings narrower than the layers", {"embedding_size": 16}),
    "albert": Family("one layer's weights used by all, narrow embeddings", {"embedding_size": 16}),
    "deberta": Family("disentangled relative attention", _RELATIVE),
    "deberta-v2": Family(
        "v2 and v3: relative attention in logarithmic buckets, keys shared with positions",
        {**_RELATIVE, "position_buckets": 16, "norm_rel_ebd": "layer_norm", "share_att_key": True},
    ),
    "nomic_bert": Family("rotary positions, gated layers"),
    "eurobert": Family("rotary positions, RMS norms: a decoder's layers that see both directions"),
    "modernbert": Family(
        "rotary positions, layers with a sliding window between those that see everything",
        {"local_attention": 16, "global_attn_every_n_layers": 2, "cls_token_id": 2, "sep_token_id": 3},
    ),
}
SENTENCE = "ForSentences"


def write_encoder(folder: Path, family: str = "bert", head: str = SENTENCE, seed: int = 0, **overrides: Any) -> Path:
    """Save a tiny random encoder of a family; ``head`` is a class suffix (ForSequenceClassification) or `SENTENCE`.

    ``overrides`` are configuration fields. Returns the folder, which is made if it does not exist.
    """
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    folder.mkdir(parents=True, exist_ok=True)
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "initializer_range": 0.3,
        **FAMILIES[family].fields,
    }
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        config = AutoConfig.for_model(family, **(sizes | overrides))
        auto = AutoModel if head == SENTENCE else AutoModelForSequenceClassification
        auto.from_config(config).save_pretrained(folder)
    finally:
        torch.random.set_rng_state(state)
    write_wordpiece(folder)
    return folder


def write_wordpiece(folder: Path, **options: Any) -> None:
    """Train a WordPiece tokenizer on a few sentences and save it into the folder."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["[UNK]", "[PAD]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token=specials[0]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=VOCAB_SIZE, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    frame = [(token, tokenizer.token_to_id(token)) for token in specials[2:]]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=frame)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=specials[0],
        pad_token=specials[1],
        cls_token=specials[2],
        sep_token=specials[3],
        model_max_length=64,
        **options,
    ).save_pretrained(folder)


def write_sentence_modules(
    folder: Path,
    pooling: str | list[str] = "mean",
    modules: tuple[str, ...] = ("Normalize",),
    width: int = 32,
    settings: dict[str, Any] | None = None,
    prompts: dict[str, Any] | None = None,
    **pooling_options: Any,
) -> Path:
    """Make a checkpoint one of sentence-transformers: modules.json and the folders of its modules."""
    import torch
    from safetensors.torch import save_file

    listed = [("", "Transformer"), ("1_Pooling", "Pooling")]
    listed += [(f"{index}_{kind}", kind) for index, kind in enumerate(modules, 2)]
    entries = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(listed)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings or {"max_seq_length": 48}))
    document = {"__version__": {}, **(prompts or {})}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(document))
    count = 1 if isinstance(pooling, str) else len(pooling)
    for path, kind in listed[1:]:
        (folder / path).mkdir(exist_ok=True)
        config: dict[str, Any] = {}
        if kind == "Pooling":
            config = {"word_embedding_dimension": width, "pooling_mode": pooling, **pooling_options}
        if kind == "Dense":
            activation = "torch.nn.modules.activation.Tanh"
            config = {"in_features": width * count, "out_features": 8, "bias": True, "activation_function": activation}
            generator = torch.Generator().manual_seed(1)
            weights = {
                "linear.weight": torch.randn(8, width * count, generator=generator),
                "linear.bias": torch.ones(8),
            }
            save_file(weights, folder / path / "model.safetensors")
        (folder / path / "config.json").write_text(json.dumps(config))
    return folder
