"""The real Triton, alone, with encoder entries: for tests of the backend through Triton's own protocol."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as httpclient

from orchestrator.local import tritonserver
from orchestrator.settings import Settings

from .stack import free_ports, wait_until

# Stands for Triton's ONNX Runtime backend, which the server here does not carry: runs <version>/model.onnx. What it was
# asked for is written down, one line a batch, so that a test can see how Triton batched.
ONNXRUNTIME = """
import json
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.folder = Path(args["model_repository"]) / args["model_version"]
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.outputs = [tensor["name"] for tensor in config["output"]]
        self.session = onnxruntime.InferenceSession(str(self.folder / "model.onnx"))

    def execute(self, requests):
        parts = [[pb_utils.get_input_tensor_by_name(r, name).as_numpy() for name in self.inputs] for r in requests]
        given = {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(self.inputs)}
        rows = self.session.run(self.outputs, given)[0]
        with (self.folder.parent.parent / "batches.log").open("a") as log:
            log.write(json.dumps([len(requests), *given[self.inputs[0]].shape]) + "\\n")
        answers, at = [], 0
        for part in parts:
            end = at + len(part[0])
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor(self.outputs[0], rows[at:end])]))
            at = end
        return answers
"""


class Refused(Exception):
    """What Triton answered instead of tensors."""


class Server:
    """One running server. ``repository`` is its model repository, ``url`` where it answers HTTP."""

    def __init__(self, home: Path, repository: Path, models: Sequence[str]) -> None:
        self.home, self.repository = home, repository
        http, grpc, metrics = free_ports(3)
        settings = Settings.load(
            {
                "home": home,
                "model_repository": repository,
                "triton_http_port": http,
                "triton_grpc_port": grpc,
                "triton_metrics_port": metrics,
            }
        )
        installation = tritonserver.find()
        argv = tritonserver.command(installation, settings, models)
        stand_in = home / "triton" / "backends" / "onnxruntime"
        stand_in.mkdir()
        (stand_in / "model.py").write_text(ONNXRUNTIME)
        self.log = home / "triton.log"
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                argv, env=tritonserver.environment(installation), stdout=output, stderr=output, start_new_session=True
            )
        self.url = f"127.0.0.1:{http}"
        self.metrics_port = metrics

    def wait(self, models: Sequence[str]) -> None:
        """Until every model is ready."""
        with self.client() as client:

            def ready() -> bool:
                log = self.log.read_text()
                assert self._process.poll() is None and "UNAVAILABLE" not in log, log[-5000:]
                try:
                    return all(client.is_model_ready(model) for model in models)
                except OSError:
                    return False

            wait_until(ready, 60, f"{models} are ready: {self.log.read_text()[-3000:]}")

    @contextmanager
    def client(self) -> Iterator[httpclient.InferenceServerClient]:
        client = httpclient.InferenceServerClient(self.url, concurrency=1, network_timeout=60, connection_timeout=10)
        try:
            yield client
        finally:
            client.close()

    def ask(self, model: str, texts: Sequence[str | bytes], **parameters: Any) -> dict[str, np.ndarray]:
        """Every output of one request of ``texts``; raises `Refused` with Triton's message."""
        raw = [text.encode() if isinstance(text, str) else text for text in texts]
        tensor = httpclient.InferInput("text_input", [len(raw), 1], "BYTES")
        tensor.set_data_from_numpy(np.array(raw, dtype=object).reshape(-1, 1))
        return self.infer(model, tensor, **parameters)

    def infer(self, model: str, tensor: httpclient.InferInput, **parameters: Any) -> dict[str, np.ndarray]:
        """The same of a tensor that the caller made."""
        with self.client() as client:
            try:
                result = client.infer(model, [tensor], parameters=parameters or None)
            except httpclient.InferenceServerException as error:
                raise Refused(error.message()) from error
            return {output["name"]: result.as_numpy(output["name"]) for output in result.get_response()["outputs"]}

    def heartbeat(self, model: str) -> dict[str, Any]:
        return dict(json.loads(self.ask(model, [""], heartbeat=True)["heartbeat"][0, 0]))

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        tritonserver.sweep(tritonserver.shm_prefix(self.home), kill=True)


@contextmanager
def served(repository: Path, models: Sequence[str]) -> Iterator[Server]:
    """A server with these models of a repository, ready; nothing is left of it."""
    home = Path(tempfile.mkdtemp(prefix="truthgpt-enc-"))
    server = Server(home, repository, models)
    try:
        server.wait(models)
        yield server
    finally:
        server.stop()
        shutil.rmtree(home)
