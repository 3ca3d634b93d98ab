"""Encoders, exported whole: what the graph computes is what transformers and sentence-transformers compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from export.encoder import input_names, pool
from export.encoder_config import EncoderServing, engine_pbtxt
from export.encoder_source import POOLING
from export.encoder_verify import most_pairs
from export.errors import ExportError, SourceError, UnsupportedModel
from export.pipeline import Exported, ExportOptions, export_model
from export.resources import needs
from export.source import Source, Trust, resolve
from tests.export.checkpoints import edit_config
from tests.export.encoder_checkpoints import FAMILIES, PAD, write_encoder, write_sentence_modules
from tests.export.test_cli import _refused, _run

TEXTS = ["Hola, ¿cómo estás?", "", "The weather in the city \U0001f600", "río " * 60, "  Tabs\tand\nlines  ", "COFFEE"]
pytestmark = pytest.mark.timeout(300)  # tracing on a busy machine
DEFAULT = ("bert",)  # the others take as long each and run with the slow tests


def families(kinds: tuple[str, ...] = DEFAULT) -> list[Any]:
    return [name if name in kinds else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


def manifest(exported: Exported) -> dict[str, Any]:
    return dict(json.loads((exported.path / "manifest.json").read_text()))


def run_texts(exported: Exported, texts: list[str]) -> np.ndarray:
    """The published files on texts, as a server would: one padded batch, cut at max_len."""
    from tokenizers import Tokenizer

    facts = manifest(exported)
    tokenizer = Tokenizer.from_file(str(exported.path / "tokenizer.json"))
    tokenizer.enable_truncation(facts["limits"]["max_len"])
    encoded = tokenizer.encode_batch([facts["text"]["prompt"] + text for text in texts])
    longest = max(len(encoding.ids) for encoding in encoded)
    ids = np.full((len(texts), longest), facts["tokens"]["pad"], np.int64)
    mask = np.zeros_like(ids)
    for row, encoding in enumerate(encoded):
        ids[row, : len(encoding.ids)], mask[row, : len(encoding.ids)] = encoding.ids, 1
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    session = onnxruntime.InferenceSession(str(exported.path / "model.onnx"))
    rows: np.ndarray = session.run(None, {name: given[name] for name in facts["graph"]["inputs"]})[0]
    return rows


def sentence_transformers(folder: Path, texts: list[str]) -> np.ndarray:
    """What sentence-transformers makes of them, one by one."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    return np.stack([model.encode(text, show_progress_bar=False) for text in texts])


def classifier(folder: Path, texts: list[str], max_len: int = 64) -> np.ndarray:
    """What transformers' classifier makes of them, one by one."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in texts:
        with torch.no_grad():
            ids = tokenizer(text, truncation=True, max_length=max_len, return_tensors="pt")["input_ids"]
            rows.append(model(input_ids=ids).logits[0].numpy())
    return np.stack(rows)


@pytest.mark.parametrize("family", families())
def test_embeddings_are_those_of_sentence_transformers(tmp_path: Path, family: str) -> None:
    """A family's embeddings, texts of all lengths in one padded batch, against sentence-transformers: 1e-5."""
    folder = write_sentence_modules(write_encoder(tmp_path / "model", family))
    exported = export_model(ExportOptions(str(folder), tmp_path / "repository", "tiny"))
    facts = manifest(exported)
    assert exported.task == "embeddings" == facts["task"] and facts["limits"]["max_len"] == 48
    assert facts["embedding"] == {"pooling": ["mean"], "head": ["normalize"], "normalized": True}
    assert (facts["device"], facts["parity"]["device"]) == ("auto", "cpu")
    rows = run_texts(exported, TEXTS)
    assert np.abs(rows - sentence_transformers(folder, TEXTS)).max() <= 1e-5
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("family", families(()))  # tests/e2e/test_encoder.py has BERT's
def test_logits_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    """A family's classifier, texts of all lengths in one padded batch, against transformers: 1e-4."""
    labels = {"id2label": {0: "bad", 1: "so-so", 2: "¡bien!"}, "label2id": {"bad": 0, "so-so": 1, "¡bien!": 2}}
    folder = write_encoder(tmp_path / "model", family, "ForSequenceClassification", **labels)
    exported = export_model(ExportOptions(str(folder), tmp_path / "repository", "tiny"))
    facts = manifest(exported)
    assert exported.task == "sentiment_analysis" == facts["task"]
    assert facts["classes"] == {"labels": ["bad", "so-so", "¡bien!"], "problem": "single_label"}
    assert np.abs(run_texts(exported, TEXTS) - classifier(folder, TEXTS)).max() <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("pooling", [*POOLING, ["cls", "max"]], ids=str)
def test_poolings_and_dense_layers_through_the_whole_export(tmp_path: Path, pooling: Any) -> None:
    """Every pooling and a concatenation of two, behind them a dense layer: sentence-transformers' numbers."""
    folder = write_sentence_modules(write_encoder(tmp_path / "model"), pooling, ("Dense",))
    rows = run_texts(export_model(ExportOptions(str(folder), tmp_path / "repository", "tiny")), TEXTS)
    assert rows.shape == (len(TEXTS), 8)
    assert np.abs(rows - sentence_transformers(folder, TEXTS)).max() <= 1e-5


@pytest.mark.parametrize("mode", POOLING)
def test_a_pooling_is_that_of_sentence_transformers(mode: str) -> None:
    """Each mode on padded random states, against sentence-transformers' own module."""
    from sentence_transformers.sentence_transformer.modules.pooling import Pooling

    states = torch.randn(4, 7, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * count + [0] * (7 - count) for count in (7, 1, 4, 6)])
    theirs = Pooling(16, mode)({"token_embeddings": states, "attention_mask": mask})["sentence_embedding"]
    assert torch.allclose(pool(mode, states, mask), theirs, atol=1e-6)


@pytest.mark.slow
def test_int8_is_measured_and_smaller(tmp_path: Path) -> None:
    """An int8 export says its drift, which is within 6 %, and its matrices are int8."""
    folder = write_sentence_modules(write_encoder(tmp_path / "model", initializer_range=0.1))
    exported = export_model(ExportOptions(str(folder), tmp_path / "repository", "tiny", precision="int8"))
    assert manifest(exported)["device"] == "cpu"
    assert 'key: "device" value: { string_value: "cpu" }' in (exported.path.parent / "config.pbtxt").read_text()
    assert 0 < exported.parity["rms_over_std"] <= 0.06
    kinds = [node.op_type for node in onnx.load(exported.path / "model.onnx").graph.node]
    assert kinds.count("MatMulInteger") >= 12


@pytest.mark.slow
def test_settings_of_the_checkpoint_reach_the_texts(tmp_path: Path) -> None:
    """Lower-casing, the default prompt and max_seq_length are those that sentence-transformers applies."""
    settings = {"max_seq_length": 20, "do_lower_case": True}
    prompts = {"prompts": {"query": "consulta: ", "other": "x"}, "default_prompt_name": "query"}
    folder = write_sentence_modules(write_encoder(tmp_path / "model"), settings=settings, prompts=prompts)
    exported = export_model(ExportOptions(str(folder), tmp_path / "repository", "tiny"))
    facts = manifest(exported)
    assert facts["text"] == {"prompt": "consulta: ", "prompts": prompts["prompts"]} and facts["limits"]["max_len"] == 20
    assert np.abs(run_texts(exported, TEXTS) - sentence_transformers(folder, TEXTS)).max() <= 1e-5


@pytest.mark.slow
def test_a_plain_encoder_is_exported_only_when_asked(tmp_path: Path) -> None:
    """BertModel without modules.json is refused with the way out; asked for, it is mean pooling as it is."""
    folder = write_encoder(tmp_path / "model")
    options = ExportOptions(str(folder), tmp_path / "repository", "tiny")
    with pytest.raises(UnsupportedModel, match="BertModel") as refused:
        export_model(options)
    assert "--task embeddings" in str(refused.value.hint)
    assert not (tmp_path / "repository").exists()
    asked = ExportOptions(str(folder), tmp_path / "repository", "tiny", task="embeddings", serve_with="native")
    exported = export_model(asked)
    facts = manifest(exported)
    assert facts["embedding"] == {"pooling": ["mean"], "head": [], "normalized": False}
    assert facts["tokens"]["pad"] == PAD and not (exported.path / "model.onnx").exists()
    engine = tmp_path / "repository" / "tiny--engine"
    assert facts["served_by"]["name"] == "tiny--engine" and (engine / "1" / "model.onnx").exists()
    assert 'backend: "onnxruntime"' in (engine / "config.pbtxt").read_text()
    assert (
        'key: "engine" value: { string_value: "tiny--engine" }' in (exported.path.parent / "config.pbtxt").read_text()
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"modules": ("LSTM",)}, "the module LSTM"),
        ({"pooling": "median"}, "pools by 'median'"),
        ({"settings": {"transformer_task": "fill-mask"}}, "for fill-mask"),
        (
            {"prompts": {"prompts": {"q": "x"}, "default_prompt_name": "q"}, "include_prompt": False},
            "leaves its prompt out",
        ),
    ],
)
def test_what_the_graph_cannot_express_is_refused_by_name(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    """Unknown modules, poolings and options are named, before anything is traced."""
    folder = write_sentence_modules(write_encoder(tmp_path / "model"), **change)
    with pytest.raises(UnsupportedModel, match=said):
        export_model(ExportOptions(str(folder), tmp_path / "repository", "tiny"))


@pytest.mark.parametrize(
    ("task", "changes", "said"),
    [
        ("sentiment_analysis", {}, "no classification head"),
        ("embeddings", {"model_type": "t5", "is_encoder_decoder": True}, "sequence-to-sequence"),
        ("embeddings", {"model_type": "mystery"}, "mystery"),
        ("embeddings", {"model_type": "mystery", "auto_map": {"AutoModel": "x.Y"}}, "code of its own"),
        ("embeddings", {"quantization_config": {"quant_method": "gptq"}}, "quantised already"),
        ("text_generation", {}, "not a causal language model"),
    ],
)
def test_a_task_that_the_checkpoint_cannot_do_is_refused(
    tmp_path: Path, task: str, changes: dict[str, Any], said: str
) -> None:
    """By the configuration alone: nothing is loaded."""
    folder = write_encoder(tmp_path / "model")
    edit_config(folder, **changes)
    with pytest.raises(UnsupportedModel, match=said):
        export_model(ExportOptions(str(folder), tmp_path / "repository", "tiny", task=task))


@pytest.mark.parametrize("code", [False, True])
def test_code_of_an_unknown_family_is_no_way_out(tmp_path: Path, code: bool) -> None:
    """--trust-remote-code does not help an encoder, and the refusal says so and what would."""
    folder = write_encoder(tmp_path / "model")
    edit_config(folder, model_type="mystery", auto_map={"AutoModel": "x.Y"})
    options = ExportOptions(str(folder), tmp_path / "repository", "tiny", task="embeddings", trust=Trust(code=code))
    with pytest.raises(UnsupportedModel, match="not run for encoders, trusted or not") as refused:
        export_model(options)
    assert "docs/encoders.md" in str(refused.value.hint)


def test_a_wrong_weight_file_is_found_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is not the Hub's is refused before it is loaded, as a decoder's is."""
    folder = write_sentence_modules(write_encoder(tmp_path / "model"))
    blob, stages = tmp_path / ("0" * 64), list[str]()
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    source = Source("org/model", folder, "c" * 40)
    monkeypatch.setattr("export.pipeline.resolve", lambda *_: source)
    with pytest.raises(SourceError, match="is not the Hub's"):
        export_model(ExportOptions("org/model", tmp_path / "repository", "tiny"), lambda stage, _: stages.append(stage))
    assert set(stages) == {"load"} and not list((tmp_path / "repository").glob("*"))


def test_a_model_without_a_mask_is_refused() -> None:
    """FNet mixes all tokens, padding too: refused by name, before anything is traced."""
    from transformers import FNetConfig, FNetModel

    sizes = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
    with pytest.raises(UnsupportedModel, match="fnet takes no attention mask"):
        input_names(FNetModel(FNetConfig(**sizes)), ["input_ids", "attention_mask"])


def test_damage_and_limits_are_said(tmp_path: Path) -> None:
    """A dense layer without safetensors, unreadable modules.json, and --max-len beyond the positions."""
    folder = write_sentence_modules(write_encoder(tmp_path / "model", "roberta"), modules=("Dense",))
    with pytest.raises(UnsupportedModel, match="beyond the 64 positions"):  # 66 less RoBERTa's offset of 2
        export_model(ExportOptions(str(folder), tmp_path / "repository", "tiny", max_len=65))
    (folder / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"2_Dense has no model\.safetensors"):
        export_model(ExportOptions(str(folder), tmp_path / "repository", "tiny"))
    (folder / "modules.json").write_text("[{]")
    with pytest.raises(SourceError, match=r"modules\.json cannot be read"):
        export_model(ExportOptions(str(folder), tmp_path / "repository", "tiny"))
    assert not list((tmp_path / "repository").glob("*"))


@pytest.mark.parametrize(
    ("settings", "asked", "expected"),
    [(None, None, 48), (None, 20, 20), ({}, None, 64), ({}, 10_000, 66), ({"max_seq_length": 512}, None, 66)],
)
def test_memory_is_asked_for_the_longest_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, int] | None, asked: int | None, expected: int
) -> None:
    """What is needed follows from max_seq_length, the positions, the tokenizer and --max-len, whichever binds."""
    folder = write_sentence_modules(write_encoder(tmp_path / "model", "roberta"))
    if settings is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps(settings))

    def needs(source: Any, precision: str, max_len: int, pairs: int) -> None:
        assert (max_len, pairs) == (expected, most_pairs(expected))
        raise ZeroDivisionError

    monkeypatch.setattr("export.encoder_pipeline.needs", needs)
    with pytest.raises(ZeroDivisionError):
        export_model(ExportOptions(str(folder), tmp_path / "repository", "tiny", max_len=asked))


def test_an_encoder_asks_for_its_largest_batch(tmp_path: Path) -> None:
    """Scores of all heads over the pairs of tokens in a batch count, and no cache, which encoders have not."""
    source = resolve(str(write_encoder(tmp_path / "model")), task="embeddings")
    alone, batch = (needs(source, "fp32", 4096, pairs=rows * 4096**2).memory for rows in (1, 2))
    assert batch - alone == pytest.approx(1.05 * 16 * 4 * 4096**2, rel=1e-3)
    assert needs(source, "fp32", 4096, pairs=0).memory < needs(source, "fp32", 4096).memory + 1


@pytest.mark.parametrize(
    ("options", "said", "hint"),
    [
        ({"precision": "int8", "device": "cuda"}, "int8 runs on a CPU", "--precision fp32"),
        ({"precision": "int4"}, "no int4", "fp32 or int8"),
        ({"chat_template": Path("chat.jinja")}, "--chat-template is for text generation", "Leave it out"),
        ({"given": ("slots",)}, "--slots is for text generation", "Leave it out"),
        ({"given": ("prefill_chunk",)}, "--prefill-chunk is for text generation", "Leave it out"),
        ({"target": "tensorrt", "serve_with": "native", "device": "cpu"}, "on an NVIDIA GPU only", "--target onnx"),
    ],
)
def test_options_that_encoders_have_not_are_refused(
    tmp_path: Path, options: dict[str, Any], said: str, hint: str
) -> None:
    """By name and with the way out, rather than left unused: devices, precisions and what is a decoder's."""
    folder = write_sentence_modules(write_encoder(tmp_path / "model"))
    with pytest.raises(ExportError, match=said) as refused:
        export_model(ExportOptions(str(folder), tmp_path / "repository", "tiny", **options))
    assert hint in str(refused.value.hint) and not (tmp_path / "repository").exists()


def test_the_command_tells_what_was_given_from_defaults(tmp_path: Path) -> None:
    """A default number of slots is no decision about an encoder; the same number by hand is refused."""
    folder = write_sentence_modules(write_encoder(tmp_path / "model"), modules=("LSTM",))
    assert "the module LSTM" in _refused(_run(folder, "--repository", tmp_path / "r"))
    assert "--slots" in _refused(_run(folder, "--slots", 16, "--repository", tmp_path / "r"))


@pytest.mark.parametrize(
    ("device", "kind"), [("auto", "{ count: 1 }"), ("cpu", "kind: KIND_CPU }"), ("cuda", "kind: KIND_GPU }")]
)
def test_a_native_graph_runs_where_it_is_for(device: str, kind: str) -> None:
    """--device reaches Triton's own backend as the kind of the instance."""
    assert kind in engine_pbtxt("m", "onnxruntime", ("input_ids",), "embedding", 8, EncoderServing(), device)


def test_serving_options_reach_the_configuration(tmp_path: Path) -> None:
    """The queue's bound and the token budget stand in config.pbtxt, beside preferred sizes, delay and warm-up."""
    from export.encoder_config import encoder_pbtxt

    text = encoder_pbtxt("m", "embeddings", 8, {"max_tokens_per_batch": "99"}, EncoderServing(7, 99))
    for line in ("max_queue_size: 7", "preferred_batch_size: [ 8, 16, 32, 64 ]", "timeout_action: REJECT",
                 "max_queue_delay_microseconds: 100", "model_warmup [", 'string_value: "99"'):  # fmt: skip
        assert line in text
