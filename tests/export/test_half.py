"""fp16 and bf16 graphs: which parts are half, and that what they compute is right."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnxscript import ir

from export.errors import UnsupportedModel
from export.half import DTYPES, to_half
from export.optimize import layer_of, save
from tests.export.drafts import Draft
from tests.export.strict import strict


@pytest.fixture(params=["gpt2", "llama"])
def tiny(request: pytest.FixtureRequest, gpt2_draft: Draft, llama_draft: Draft) -> Draft:
    """Either of them: tied and untied embeddings, LayerNorm and RMSNorm, learnt positions and rotary ones."""
    return gpt2_draft if request.param == "gpt2" else llama_draft


def _half(tiny: Draft, precision: str, keep: frozenset[str] = frozenset()) -> ir.Model:
    graph = tiny.graph.clone()
    to_half(graph, precision, keep)
    return graph


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_products_and_caches_are_half_and_norms_are_not(tiny: Draft, precision: str) -> None:
    """Matrices, attention and caches are half; powers, means, roots and position arithmetic are fp32; logits too."""
    graph, half = _half(tiny, precision).graph, DTYPES[precision]
    for node in graph:
        if node.op_type in ("MatMul", "GroupQueryAttention"):
            assert {output.dtype for output in node.outputs} == {half}
        if node.op_type in ("Pow", "ReduceMean", "Sqrt", "Reciprocal", "Cos", "Sin"):
            assert node.outputs[0].dtype == ir.DataType.FLOAT
    assert all(value.dtype == half for value in graph.inputs if str(value.name).startswith("past_"))
    assert {value.name: value.dtype for value in graph.outputs}["logits"] == ir.DataType.FLOAT
    matrices = [value for value in graph.initializers.values() if value.shape is not None and len(value.shape) == 2]
    assert matrices and all(value.dtype == half for value in matrices)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_every_type_fits_its_operator(tiny: Draft, precision: str, tmp_path: Path) -> None:
    """ONNX's own checker and strict type inference find no operator that mixes half and fp32."""
    save(_half(tiny, precision), tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)


@pytest.mark.parametrize(("precision", "bound"), [("fp16", 0.003), ("bf16", 0.02)])
def test_drift_with_every_value_rounded(tiny: Draft, precision: str, bound: float, tmp_path: Path) -> None:
    """Also where each half value is really rounded, as on a GPU, the logits stay within the bound of the precision."""
    comparison = tiny.drift(strict(_half(tiny, precision), DTYPES[precision]), tmp_path)
    assert comparison.nonfinite == 0
    assert 1e-5 < comparison.rms_over_std <= bound


def test_fp16_runs_here(tiny: Draft, tmp_path: Path) -> None:
    """ONNX Runtime's CPU opens the fp16 graph itself and computes the right logits from fp16 caches."""
    assert tiny.drift(_half(tiny, "fp16"), tmp_path).rms_over_std <= 0.003


def test_kept_nodes_compute_in_fp32(llama_draft: Draft, tmp_path: Path) -> None:
    """A layer that is kept has fp32 matrices and an fp32 cache of its own beside the half ones of the others."""
    modules = layer_of(llama_draft.graph)
    layer = {str(node.outputs[0].name) for node, module in modules.items() if module == "model.layers.1"}
    graph = _half(llama_draft, "fp16", frozenset(layer))
    caches = {value.name: value.dtype for value in graph.graph.inputs}
    assert caches["past_key_0"] == ir.DataType.FLOAT16 and caches["past_key_1"] == ir.DataType.FLOAT
    assert llama_draft.drift(graph, tmp_path).rms_over_std <= 0.003


def test_layers_are_known_by_their_names(gpt2_draft: Draft, llama_draft: Draft) -> None:
    """Every node that computes belongs to a layer, or to a module outside of the layers, as the checkpoint names it."""
    for given, layers in ((gpt2_draft, "transformer.h"), (llama_draft, "model.layers")):
        modules = layer_of(given.graph)
        products = [modules[node] for node in given.graph.graph if node.op_type == "MatMul"]
        assert set(products) == {f"{layers}.0", f"{layers}.1", "lm_head"}
        attention = [modules[node] for node in given.graph.graph if node.op_type == "GroupQueryAttention"]
        assert attention == [f"{layers}.0", f"{layers}.1"]


def test_control_flow_is_refused(gpt2_draft: Draft) -> None:
    """A graph whose nodes hold graphs is refused by the operator's name, not converted half."""
    graph = gpt2_draft.graph.clone()
    first = next(iter(graph.graph))
    body = ir.Graph([], [], nodes=[], opset_imports={"": 21})
    first.attributes["then_branch"] = ir.AttrGraph("then_branch", body)
    with pytest.raises(UnsupportedModel, match=first.op_type):
        to_half(graph, "fp16")
