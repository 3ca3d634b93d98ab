"""A model that does not generate, in Triton's own Python backend."""

from __future__ import annotations

from pathlib import Path

CONFIG = """name: "addsub"
backend: "python"
max_batch_size: 0
input [
  { name: "A" data_type: TYPE_INT32 dims: [-1] },
  { name: "B" data_type: TYPE_INT32 dims: [-1] },
  { name: "TEXT" data_type: TYPE_STRING dims: [-1] optional: true }
]
output [
  { name: "SUM" data_type: TYPE_INT32 dims: [-1] },
  { name: "DIFF" data_type: TYPE_INT32 dims: [-1] },
  { name: "ECHO" data_type: TYPE_STRING dims: [-1] }
]
instance_group [{ kind: KIND_CPU count: 1 }]
"""
CODE = '''
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Adds and subtracts, and gives a text back."""

    def execute(self, requests):
        return [self._one(request) for request in requests]

    def _one(self, request):
        a, b, text = (pb_utils.get_input_tensor_by_name(request, name) for name in ("A", "B", "TEXT"))
        a, b = a.as_numpy(), b.as_numpy()
        if a.shape != b.shape:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError("A and B differ in shape"))
        text = np.array([b"none"], dtype=object) if text is None else text.as_numpy()
        values = {"SUM": a + b, "DIFF": a - b, "ECHO": text}
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in values.items()])
'''


def write_addsub(repository: Path) -> None:
    """Write its entry, `addsub`."""
    folder = repository / "addsub"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(CONFIG)
    (folder / "1/model.py").write_text(CODE)
