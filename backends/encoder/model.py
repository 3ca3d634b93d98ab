"""Triton's entry point: one TritonPythonModel a model instance. Glue only: what Triton's dynamic batcher hands over is
tokenised together, run in batches packed by length, and answered one by one.

docs/encoders.md has the tensor contract whole.
"""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

if not __package__:  # Triton loads this file by path; its folder and its sibling become one package for the imports
    _root = types.ModuleType("truthgpt_backends")
    _root.__path__ = [str(Path(__file__).parent.parent)]
    sys.modules[_root.__name__] = _root
    __package__ = f"{_root.__name__}.{Path(__file__).parent.name}"

from ..inflight.entry import EntryError
from ..inflight.errors import EngineError, Internal, InvalidArgument, Unavailable
from . import entry as entries
from .answer import best_labels, gathered, scores
from .runner import EngineRunner, Feed, Rows, Runner, SessionRunner
from .tokens import TextCodec, Texts, Tokens

ENGINE_TIMEOUT_US = 30_000_000
# As Triton words it where the engine is not there: its process died, it is being unloaded, or nobody loaded it.
_AWAY = re.compile(r"not healthy|not ready|unavailable|unknown model|unload|timeout|timed out", re.IGNORECASE)
KSERVE = {"id", "priority", "timeout", "sequence_id", "sequence_start", "sequence_end", "binary_data_output"}


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        self._rows = max(1, int(config["max_batch_size"]))
        try:
            instances = sum(int(group.get("count", 1)) for group in config.get("instance_group", [])) or 1
            folder = Path(args["model_repository"]) / args["model_version"]
            self._entry = entries.load(folder, parameters, instances)
            self._codec = TextCodec(self._entry.folder, self._entry.max_len, self._entry.prompt)
            # as in backends/inflight: KIND_GPU names a device; with KIND_CPU it is the first one
            on_gpu = args.get("model_instance_kind") == "GPU"
            self._runner = self._make_runner(int(args.get("model_instance_device_id") or 0) if on_gpu else 0)
        except EntryError as error:
            raise pb_utils.TritonModelException(str(error)) from error

    def execute(self, requests: list[Any]) -> list[Any]:
        answers: list[Any] = [None] * len(requests)
        wanted: list[tuple[int, Texts]] = []
        for index, request in enumerate(requests):
            try:
                parameters = _parameters(request)
                if parameters.pop("heartbeat", False):
                    answers[index] = self._heartbeat(len(requests) - 1)
                elif request.is_cancelled():
                    answers[index] = _failure("cancelled: the client has gone", pb_utils.TritonError.CANCELLED)
                else:
                    wanted.append((index, _texts(request, parameters)))
            except EngineError as error:
                answers[index] = _refused(error)
            except Exception as error:  # a request that breaks the glue must be answered all the same
                answers[index] = _refused(Internal(f"{type(error).__name__}: {error}"))
        if wanted:
            try:
                self._answer(wanted, answers)
            except Exception as error:  # and so must its neighbours
                for index, _ in wanted:
                    answers[index] = answers[index] or _refused(Internal(f"{type(error).__name__}: {error}"))
        return answers

    def _answer(self, wanted: list[tuple[int, Texts]], answers: list[Any]) -> None:
        encoded = self._codec.encode([texts for _, texts in wanted])
        flat = [tokens for tokenised in encoded if isinstance(tokenised, list) for tokens in tokenised]
        rows = iter(self._runner.run(flat))
        for (index, _), tokenised in zip(wanted, encoded, strict=True):
            if isinstance(tokenised, EngineError):
                answers[index] = _refused(tokenised)
                continue
            result = gathered([next(rows) for _ in tokenised], self._entry.width)
            answers[index] = _refused(result) if isinstance(result, EngineError) else self._tensors(result, tokenised)

    def _tensors(self, rows: Rows, tokenised: list[Tokens]) -> Any:
        counts = np.array([[len(tokens)] for tokens in tokenised], np.uint32)
        tensors = [pb_utils.Tensor("num_input_tokens", counts)]
        if self._entry.task == "embeddings":
            tensors.append(pb_utils.Tensor("embedding", np.ascontiguousarray(rows)))
        else:
            given = scores(rows, self._entry.problem)
            labels = np.array([[label.encode()] for label in best_labels(given, self._entry.labels)], dtype=object)
            tensors += [pb_utils.Tensor("scores", given), pb_utils.Tensor("label", labels)]
        return pb_utils.InferenceResponse(tensors)

    def _heartbeat(self, waiting: int) -> Any:
        # Triton hands over one batch after the other, so whoever is answered here finds no run in progress.
        state = {
            "busy": False,
            "step_age_s": 0.0,
            "running": 0,
            "waiting": waiting,
            "slots": self._rows,
            "digest": self._entry.digest,
            "device": self._runner.device,
            "fallback": self._runner.fallback,
        }
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor("heartbeat", np.array([[json.dumps(state).encode()]], dtype=object))]
        )

    def _make_runner(self, device_id: int) -> Runner:
        if self._entry.engine is None:
            runner: Runner = SessionRunner(self._entry, device_id)
            answer = runner.run([Tokens([self._entry.pad], [0])])[0]  # the first run allocates; nobody should wait
            if isinstance(answer, Exception):
                raise EntryError(f"the graph does not run: {answer}")
            return runner
        return EngineRunner(self._entry, self._ask, self._rows)

    def _ask(self, given: Feed) -> Rows:
        request = pb_utils.InferenceRequest(
            model_name=self._entry.engine,
            model_version=self._entry.engine_version,
            requested_output_names=[self._entry.output],
            inputs=[pb_utils.Tensor(name, array) for name, array in given.items()],
            timeout=ENGINE_TIMEOUT_US,
        )
        response = request.exec()
        if response.has_error():
            said = str(response.error().message())
            kind = Unavailable if _AWAY.search(said) else Internal
            raise kind(f"{self._entry.engine} failed: {said}")
        tensor = pb_utils.get_output_tensor_by_name(response, self._entry.output)
        rows: Rows = tensor.as_numpy() if tensor.is_cpu() else np.from_dlpack(tensor)
        return rows


def _parameters(request: Any) -> dict[str, Any]:
    given: dict[str, Any] = json.loads(request.parameters() or "{}")
    return {name: v for name, v in given.items() if name not in KSERVE and not name.startswith("triton_")}


def _texts(request: Any, parameters: dict[str, Any]) -> Texts:
    truncate = parameters.pop("truncate", False)
    if not isinstance(truncate, bool):
        raise InvalidArgument(f"truncate must be true or false, not {truncate!r:.80}")
    if parameters:
        raise InvalidArgument(f"unknown parameter {sorted(parameters)[0]!r:.80}; known: heartbeat, truncate")
    tensor = pb_utils.get_input_tensor_by_name(request, "text_input")
    texts = [] if tensor is None else list(tensor.as_numpy().reshape(-1))
    if not texts:
        raise InvalidArgument("text_input is empty: give at least one text")
    return Texts(texts, truncate)


def _refused(error: EngineError) -> Any:
    code = {"invalid_argument": pb_utils.TritonError.INVALID_ARG, "internal": pb_utils.TritonError.INTERNAL}.get(
        error.kind, pb_utils.TritonError.UNAVAILABLE
    )
    return _failure(error.wire(), code)


def _failure(message: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
