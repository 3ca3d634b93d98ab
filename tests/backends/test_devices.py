import pytest

from backends.inflight.devices import CUDA, CUDA_PROVIDER, ON_CPU, Placement, cuda_fault, place, place_graph, translate
from backends.inflight.entry import EntryError
from backends.inflight.errors import DeviceLost, OutOfMemory

ON_CUDA = Placement(CUDA, CUDA, 0, ())


def absent(device_id: int) -> str:
    return "there is none"


def present(device_id: int) -> None:
    return None


@pytest.mark.parametrize(
    ("device", "kv_dtype", "fault", "expected"),
    [
        ("auto", "float16", present, "cuda"), ("auto", "bfloat16", present, "cuda"), ("auto", "float16", absent, "cpu"),
        ("auto", "float32", present, "cpu"), ("cpu", "float16", present, "cpu"), ("cuda", "float16", present, "cuda"),
    ],
)  # fmt: skip
def test_a_device_is_chosen_by_what_was_asked_and_what_there_is(device, kv_dtype, fault, expected):
    """auto takes CUDA where a device answers and the graph has kernels there, else the CPU; who asks is obeyed."""
    assert place(device, kv_dtype, fault=fault).device == expected


@pytest.mark.parametrize(
    ("kv_dtype", "fault", "said"), [("float16", absent, "there is none"), ("float32", present, "fp16")]
)
def test_cuda_that_cannot_be_had_is_an_error_that_says_why(kv_dtype, fault, said):
    """Asked for by name, CUDA is not replaced in silence: the error has the reason and the way out."""
    with pytest.raises(EntryError, match=f"parameter device is cuda, but .*{said}.* cpu"):
        place("cuda", kv_dtype, fault=fault)


@pytest.mark.parametrize(
    ("device", "fault", "expected"),
    [("auto", present, "cuda"), ("auto", absent, "cpu"), ("cpu", present, "cpu"), ("cuda", present, "cuda")],
)
def test_a_graph_without_slots_needs_no_half_precision(device, fault, expected):
    """An encoder runs on CUDA in whatever it was exported in."""
    assert place_graph(device, fault=fault).device == expected


def test_the_cuda_provider_gets_its_options_and_the_cpu_stands_behind_it():
    """Arena, device and memory limit are set; nodes without a CUDA kernel have the CPU provider."""
    placement = place("cuda", "float16", 3, 2048, present)
    (name, options), *rest = placement.providers
    assert (name, tuple(rest), placement.memory, placement.device_id) == (CUDA_PROVIDER, ON_CPU.providers, "cuda", 3)
    assert options["arena_extend_strategy"] == "kSameAsRequested" and options["device_id"] == "3"
    assert options["gpu_mem_limit"] == str(2 << 30)
    assert "gpu_mem_limit" not in dict(place("cuda", "float16", fault=present).providers)[CUDA_PROVIDER]


def test_what_is_missing_for_cuda_is_named():
    """The package, the driver or the device that is missing is named; where all is there, no reason is given."""
    why = cuda_fault(0)
    assert why is None or "onnxruntime-gpu" in why


@pytest.mark.parametrize(
    "text",
    [
        "BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 8388608000",
        "BFCArena::AllocateRawInternal Available memory of 0 is smaller than requested bytes of 1024",
        "CUDA failure 2: out of memory ; GPU=0 ; hostname=x ; expr=cudaMalloc((void**)&p, size);",
        "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0", "std::bad_alloc",
    ],
)  # fmt: skip
def test_a_shortage_of_memory_is_recognised_on_every_device(text):
    """In each of ONNX Runtime's wordings, and whatever else the message says of the device."""
    assert isinstance(translate(RuntimeError(text), ON_CUDA), OutOfMemory)
    assert isinstance(translate(RuntimeError(text), ON_CPU), OutOfMemory)
    assert isinstance(translate(MemoryError(), ON_CPU), OutOfMemory)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; expr=cudaStreamSynchronize(stream_);",
        "CUDNN failure 5000: CUDNN_STATUS_EXECUTION_FAILED ; GPU=0",
        "CUBLAS failure 13: CUBLAS_STATUS_EXECUTION_FAILED ; GPU=0 ; hostname=x",
        "CUDA error executing cudaMemcpy(dst_data, src_data, bytes, cudaMemcpyDeviceToHost)",
    ],
)
def test_a_failed_device_is_recognised_where_there_is_one(text):
    """A failure of CUDA or its libraries is the device's on CUDA, and nothing of the kind on the CPU."""
    assert isinstance(translate(RuntimeError(text), ON_CUDA), DeviceLost)
    assert translate(RuntimeError(text), ON_CPU) is None


NO_KERNEL = (
    "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find an implementation for Rope(1), CUDAExecutionProvider",
    "Failed to find kernel for MatMulNBits(1) (node:'x' ep:'CUDAExecutionProvider'). Op with name (x)",
)


def test_other_errors_are_not_taken_for_either():
    """An error in the graph or its inputs moves no model to the CPU."""
    for text in (
        "Got invalid dimensions for input: input_ids",
        "NOT_IMPLEMENTED : no kernel for MatMul(13)",
        *NO_KERNEL,
    ):
        assert translate(RuntimeError(text), ON_CUDA) is None
