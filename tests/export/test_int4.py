"""int4 entries: what is stored how, what they drift, and that they ask before drifting far."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from export.cli import export_command
from export.errors import UnsupportedModel, VerificationError
from export.int4 import BLOCK, quantize_int4
from export.optimize import save
from export.pipeline import ExportOptions, export_model
from export.verify import judge
from tests.export.drafts import Draft

GOOD = {"max_abs_logit_diff": 1.0, "rms_over_std": 0.05, "greedy_agreement": 0.9, "nonfinite": 0}


def test_every_matrix_is_in_blocks(gpt2_draft: Draft, tmp_path: Path) -> None:
    """Every product takes 4 bits, the output embeddings 8, the looked-up embeddings fp16; no fp32 matrix is left."""
    graph = gpt2_draft.graph.clone()
    assert quantize_int4(graph) == 2 * 4 + 1
    save(graph, tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model)
    products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    attributes = [{given.name: given.i for given in node.attribute} for node in products]
    assert [given["bits"] for given in attributes] == [4] * 8 + [8]
    assert {given["block_size"] for given in attributes} == {BLOCK}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    matrices = [tensor for name, tensor in weights.items() if len(tensor.dims) > 1 and not name.endswith("scale")]
    assert {tensor.data_type for tensor in matrices} == {onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT16}
    looked_up = [weights[node.input[0]] for node in model.graph.node if node.op_type == "Gather"]
    assert len(looked_up) == 2 and {tensor.data_type for tensor in looked_up} == {onnx.TensorProto.FLOAT16}


def test_a_row_does_not_depend_on_its_neighbours(gpt2_draft: Draft, tmp_path: Path) -> None:
    """Activations have scales of their own in every row, so an int4 row's logits are the same alone and in a batch."""
    from export.runtime import SlotRuntime
    from export.verify import verify

    graph = gpt2_draft.graph.clone()
    quantize_int4(graph)
    save(graph, tmp_path)
    parity = verify(SlotRuntime(tmp_path / "model.onnx", 8), gpt2_draft.references, "int4", 16, allow_drift=1.0)
    assert parity["batch_effect"] == 0.0
    assert 0.01 < parity["rms_over_std"] < 0.6


def test_a_graph_without_matrices_is_refused(gpt2_draft: Draft) -> None:
    """There is nothing to quantise twice."""
    graph = gpt2_draft.graph.clone()
    quantize_int4(graph)
    with pytest.raises(UnsupportedModel, match="no weight matrix for int4"):
        quantize_int4(graph)


@pytest.mark.parametrize(
    ("drift", "allowed", "passes"),
    [(0.1, None, True), (0.101, None, False), (0.29, 0.3, True), (0.31, 0.3, False), (0.09, 0.05, True)],
)
def test_the_bound_of_int4(drift: float, allowed: float | None, passes: bool) -> None:
    """int4 passes up to 10 %, and further only up to what --allow-drift says, which never lowers the bound."""
    figures = GOOD | {"rms_over_std": drift}
    if passes:
        judge(figures, "int4", allowed)
    else:
        with pytest.raises(VerificationError, match=f"int4 moves .* by {drift:.1%}"):
            judge(figures, "int4", allowed)


def test_the_hint_is_enough() -> None:
    """The refusal names the measured drift, and the flag as its hint prints it lets the same figures pass."""
    figures = GOOD | {"rms_over_std": 0.2541}
    with pytest.raises(VerificationError, match=r"25\.4%") as caught:
        judge(figures, "int4")
    assert "--allow-drift 0.26" in str(caught.value.hint) and "--calibrate" in str(caught.value.hint)
    for drift in (1.31, float("inf"), float("nan")):  # the option takes no more than 1
        with pytest.raises(VerificationError) as caught:
            judge(figures | {"rms_over_std": drift}, "int4")
        assert "--allow-drift" not in str(caught.value.hint) and "--calibrate" in str(caught.value.hint)
    judge(figures, "int4", 0.26)


@pytest.mark.slow
def test_int4_by_the_command(gpt2: Path, tmp_path: Path) -> None:
    """The command refuses a large drift with its figure and the flag, publishes with the flag, and says the drift."""
    arguments = [str(gpt2), "--name", "tiny", "--precision", "int4", "--repository", str(tmp_path), "--max-len", "48"]
    refused = CliRunner().invoke(export_command, arguments)
    assert refused.exit_code == 1
    assert "error: int4 moves this model's logits by" in refused.stderr and "--allow-drift 0." in refused.stderr
    assert list(tmp_path.iterdir()) == []
    done = CliRunner().invoke(export_command, [*arguments, "--allow-drift", "0.7"])
    assert done.exit_code == 0, done.stderr
    manifest = json.loads((tmp_path / "tiny" / "1" / "manifest.json").read_text())
    drift = manifest["parity"]["rms_over_std"]
    assert drift > 0.1 and f"int4 moves the logits by {drift:.1%} of their spread" in done.stdout
    assert manifest["precision"] == "int4"
    expected = {"bits": 4, "block_size": 32, "head_bits": 8, "calibration": None, "allowed_drift": 0.7}
    assert manifest["quantization"] == expected


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--precision", "int8", "--allow-drift", "0.3"), "--allow-drift is for int4"),
        (("--precision", "fp16", "--calibrate", __file__), "--calibrate is for int8 and int4"),
        (("--precision", "bf16"), "bf16 needs an NVIDIA GPU of compute capability 8.0 or newer with onnxruntime-gpu"),
        (("--precision", "int8", "--device", "cuda"), "int8 runs on a CPU"),
    ],
)
def test_options_that_do_not_go_together(gpt2: Path, tmp_path: Path, arguments: tuple[str, ...], reason: str) -> None:
    """Before anything is loaded, what the device or the precision has no use for is refused with a next step."""
    done = CliRunner().invoke(export_command, [str(gpt2), "--repository", str(tmp_path / "r"), *arguments])
    assert done.exit_code == 1 and f"error: {reason}" in done.stderr and "hint: " in done.stderr
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_odd_widths(tmp_path: Path) -> None:
    """Matrices whose inputs are no multiple of the block are padded by the operator and compute what they should."""
    from tests.export.checkpoints import write_llama

    checkpoint = write_llama(tmp_path / "odd", hidden_size=80, num_attention_heads=5, num_key_value_heads=5)
    exported = export_model(ExportOptions(str(checkpoint), tmp_path / "r", precision="int4", allow_drift=0.6))
    assert exported.parity["nonfinite"] == 0 and exported.parity["rms_over_std"] < 0.6
