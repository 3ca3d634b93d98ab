"""The runner over a real ONNX Runtime session, on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from backends.inflight.devices import CUDA, CUDA_PROVIDER, ON_CPU, Placement
from backends.inflight.entry import EntryError
from backends.inflight.errors import DeviceLost, OutOfMemory
from backends.inflight.mover import DeviceMover, identities
from backends.inflight.runner import Runner
from backends.inflight.slots import CacheInput, Slots
from backends.inflight.trt import PROVIDER, TENSORRT

from .decoder import LAYERS, MAX_LEN, VOCAB, write_decoder

SEEN = [3, 1, 4, 1, 5, 9, 2, 6]
ELEMENTS = [
    pytest.param(TensorProto.FLOAT, 1e-4, id="float32"),
    pytest.param(TensorProto.FLOAT16, 5e-2, id="float16"),
]


def runner_of(folder: Path, element: int = TensorProto.FLOAT, slots: int = 4) -> Runner:
    return Runner(write_decoder(folder / "model.onnx", element), slots, 1, ON_CPU)


def alone(runner: Runner, slot: int, tokens: list[int]) -> NDArray[np.float32]:
    """The logits behind some tokens, read in one go."""
    return runner.prefill(slot, tokens, 0).copy()[0]


@pytest.mark.parametrize("as_on_device", [False, True])
@pytest.mark.parametrize(("element", "tolerance"), ELEMENTS)
def test_chunks_decoding_and_moves_compute_what_one_prefill_does(
    tmp_path: Path, element: int, tolerance: float, as_on_device: bool
) -> None:
    """Caches of two shapes in the graph's own type: a prompt in chunks, decode steps among neighbours and a move to
    another slot give the logits of the whole in one go; so they do with what a device needs, run here on the CPU.
    """
    runner = runner_of(tmp_path, element)
    if as_on_device:
        runner._rebinds, runner._mover = True, DeviceMover(list(runner._cache.values()), ON_CPU)
    other = [7, 7, 8]
    runner.prefill(0, other, 0)
    runner.prefill(1, SEEN[:3], 0)
    runner.prefill(1, SEEN[3:5], 3)
    for place in (5, 6):
        both = runner.decode([other[0], SEEN[place]], [len(other) + place - 5, place]).copy()
    assert both.shape == (2, VOCAB) and both.dtype == np.float32
    assert np.abs(both[1] - alone(runner, 2, SEEN[:7])).max() < tolerance
    runner.move(1, 0, 7)
    moved = runner.decode([SEEN[7]], [7]).copy()[0]
    assert np.abs(moved - alone(runner, 2, SEEN)).max() < tolerance
    assert np.abs(moved - both[1]).max() > 10 * tolerance  # the comparison can fail


def test_half_precision_slots_take_half_the_memory(tmp_path: Path) -> None:
    """A float16 graph's slots are float16, those of float32 float32, each layer's of its own shape."""
    for element, dtype in ((TensorProto.FLOAT16, np.float16), (TensorProto.FLOAT, np.float32)):
        cache = runner_of(tmp_path, element)._cache
        assert [(c.array.shape, c.array.dtype) for c in cache.values()] == [
            ((4, heads, MAX_LEN, size), np.dtype(dtype)) for heads, size in LAYERS for _ in ("key", "value")
        ]


def test_a_graph_that_the_cpu_cannot_run_is_refused_with_what_can(tmp_path: Path) -> None:
    """bfloat16 has no CPU kernels: the error says that it needs CUDA and what runs anywhere."""
    with pytest.raises(EntryError, match=r"cannot run on cpu.*needs a CUDA device"):
        runner_of(tmp_path, TensorProto.BFLOAT16)


@pytest.mark.parametrize("fault", ["type", "shape", "logits"])
def test_a_graph_of_another_form_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    """Caches of a type or shape that slots cannot have, and logits that are not float32, are named."""
    path = write_decoder(tmp_path / "model.onnx")
    model = onnx.load(path)
    if fault == "logits":
        model.graph.node[-1].attribute[0].i = TensorProto.FLOAT16
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    else:
        kind = onnx.TypeProto()
        kind.CopyFrom(model.graph.input[5].type)
        if fault == "type":
            kind.tensor_type.elem_type = TensorProto.DOUBLE
        else:
            kind.tensor_type.shape.dim[2].dim_param = "any"
        model.graph.input.append(onnx.ValueInfoProto(name="past_more_0", type=kind))
    onnx.save(model, path)
    with pytest.raises(EntryError, match="logits" if fault == "logits" else "past_more_0"):
        Runner(path, 2, 1, ON_CPU)


@pytest.mark.parametrize("element", [(1, np.float32), (10, np.float16), (16, np.uint16)], ids=lambda e: e[1].__name__)
def test_the_device_mover_copies_one_slot_and_nothing_else(element) -> None:
    """The graph that moves slots on a device, run here on the CPU: every byte of one slot, in every cache, in each of
    the types.
    """
    random = np.random.default_rng(1)
    caches = [
        Slots(CacheInput(f"past_{i}", shape, *element), 3, ON_CPU) for i, shape in enumerate(((2, 5, 4), (1, 300, 7)))
    ]
    for cache in caches:
        cache.array[:] = random.integers(0, 100, cache.array.shape)
    before = [cache.array.copy() for cache in caches]
    mover = DeviceMover(caches, ON_CPU)
    mover.move(2, 0)
    for cache, old in zip(caches, before, strict=True):
        assert (cache.array[0] == old[2]).all() and (cache.array[1:] == old[1:]).all() and (old[0] != old[2]).any()


def test_the_mover_leaves_tensorrt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copying slots is CUDA's work: TensorRT would build an engine for it by the decoder's profiles."""
    asked: list[list[str]] = []
    real = onnxruntime.InferenceSession

    def session(model: bytes, options: object, providers: list[tuple[str, object]]) -> object:
        asked.append([name for name, _ in providers])
        return real(model, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    given = ((PROVIDER, {"trt_profile_min_shapes": "input_ids:1x1"}), (CUDA_PROVIDER, {}), *ON_CPU.providers)
    DeviceMover([Slots(CacheInput("past", (2, 5, 8), 1, np.float32), 1, ON_CPU)], Placement(TENSORRT, CUDA, 0, given))
    assert asked == [[CUDA_PROVIDER, "CPUExecutionProvider"]]


def test_the_movers_graph_is_one_that_onnx_accepts() -> None:
    """The bytes are a ModelProto that the checker passes, with a node for each cache and its fixed shape."""
    caches = [Slots(CacheInput(f"past_{i}", (2, 5, 128 + i), 10, np.float16), 1, ON_CPU) for i in range(150)]
    model = onnx.load_from_string(identities(caches))
    onnx.checker.check_model(model, full_check=True)
    assert len(model.graph.node) == 150
    assert [d.dim_value for d in model.graph.output[149].type.tensor_type.shape.dim] == [1, 2, 5, 277]


def test_what_the_session_raises_comes_out_as_ours(tmp_path: Path) -> None:
    """A shortage and a failed device are told apart at the runner's seam, everything else stays as it is, and the
    call that failed may be made again.
    """
    runner = runner_of(tmp_path)
    runner._placement = Placement(CUDA, CUDA, 0, ())
    real, message = runner._session, [""]

    class Session:
        io_binding = real.io_binding

        def run_with_iobinding(self, binding: object) -> None:
            if message[0]:
                raise RuntimeError(message[0])
            real.run_with_iobinding(binding)

    runner._session = Session()
    good = runner.prefill(0, SEEN, 0).copy()
    for text, expected in (
        ("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 939524096", OutOfMemory),
        ("CUDA failure 700: an illegal memory access was encountered ; GPU=0", DeviceLost),
        ("Non-zero status code: the batch is 3 and should be 4", RuntimeError),
    ):
        message[0] = text
        with pytest.raises(expected):
            runner.prefill(0, SEEN, 0)
    message[0] = ""
    assert (runner.prefill(0, SEEN, 0) == good).all()


def test_a_provider_that_did_not_start_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    """ONNX Runtime goes on without a provider that it cannot have; the runner does not."""
    placement = Placement(CUDA, CUDA, 0, ((CUDA_PROVIDER, {}), *ON_CPU.providers))
    with pytest.warns(UserWarning, match="CUDAExecutionProvider"), pytest.raises(DeviceLost, match=CUDA_PROVIDER):
        Runner(write_decoder(tmp_path / "model.onnx"), 2, 1, placement)


def test_positions_are_verified_as_decoding_them_one_by_one_computes_them(tmp_path: Path) -> None:
    """Four drafted tokens fed at once give a row of logits each, those of four decode steps, and leave their caches."""
    runner = runner_of(tmp_path)
    runner.prefill(0, SEEN[:4], 0)
    steps = [runner.decode([token], [4 + i]).copy()[0] for i, token in enumerate(SEEN[4:])]
    runner.prefill(1, SEEN[:4], 0)
    assert runner.can_verify
    rows = runner.verify(1, SEEN[4:], 4).copy()
    assert rows.shape == (4, VOCAB)
    assert np.abs(rows - steps).max() < 1e-5
    after = runner.prefill(1, [7], 8).copy()
    assert np.abs(after - alone(runner, 2, [*SEEN, 7])).max() < 1e-5


def test_fresh_prompts_of_several_lengths_go_in_one_call(tmp_path: Path) -> None:
    """Prompts padded into one call, from any slot on, have the logits and the caches that each has alone."""
    runner = runner_of(tmp_path)
    prompts = [SEEN, SEEN[2:5], [7]]
    together = runner.prefill_fresh(1, prompts).copy()
    assert together.shape == (3, VOCAB)
    for row, prompt in enumerate(prompts):
        assert np.abs(together[row] - alone(runner, 0, prompt)).max() < 1e-5
        ahead = runner.prefill(1 + row, [9, 9], len(prompt)).copy()
        assert np.abs(ahead - alone(runner, 0, [*prompt, 9, 9])).max() < 1e-5


@pytest.mark.parametrize(("element", "tolerance"), ELEMENTS)
def test_a_saved_block_is_loaded_into_another_slot(tmp_path: Path, element: int, tolerance: float) -> None:
    """Positions saved from one slot and loaded into another stand for the tokens that they came from, also once the
    first slot holds something else.
    """
    runner = runner_of(tmp_path, element)
    assert runner.can_save
    whole = alone(runner, 0, SEEN)
    blocks = [runner.save(0, 0, 3), runner.save(0, 3, 6)]
    assert blocks[0].nbytes == sum(2 * heads * 3 * size for heads, size in LAYERS) * runner._cache[
        "past_key_0"
    ].array.itemsize
    alone(runner, 0, [7] * 8)
    alone(runner, 2, [5] * 8)
    for start, block in zip((0, 3), blocks, strict=True):
        runner.load(2, start, block)
    assert np.abs(runner.prefill(2, SEEN[6:], 6)[0] - whole).max() < tolerance
