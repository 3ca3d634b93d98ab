"""Stands in for our backend inside the real Triton: it speaks its protocol and has no model to wait for.

Ours merges tokens that pile up, and a model that takes no time makes them pile up: its stream of 16 tokens has two or
three chunks. What a gateway adds to a stream of 16 chunks can be measured with 16 only: here each token is a response.
"""

from __future__ import annotations

import json
import re

import numpy as np
import triton_python_backend_utils as pb_utils

WORDS = ("one", " two", " three")
_MAX_TOKENS = re.compile(r'"max_tokens"\s*:\s*(\d+)')
_BEAT = json.dumps({"running": 0, "waiting": 0, "slots": 64, "step_age_s": 0.0, "busy": False, "digest": "instant"})
_READ = json.dumps({"tokens": 4, "text": None})


def _text(name: str, value: str) -> pb_utils.Tensor:
    return pb_utils.Tensor(name, np.array([value.encode()], dtype=object))


def _tensor(request: pb_utils.InferenceRequest, name: str) -> object:
    found = pb_utils.get_input_tensor_by_name(request, name)
    return None if found is None else found.as_numpy().reshape(-1)[0]


class TritonPythonModel:
    """Answers with as many words as `max_tokens` says: each one is a response where a stream was asked for."""

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            parameters = json.loads(request.parameters() or "{}")
            if parameters.get("heartbeat") or parameters.get("inspect"):
                said = _BEAT if parameters.get("heartbeat") else _READ
                self._send(sender, [_text("text_output", said)], last=True)
                continue
            raw = _tensor(request, "sampling_parameters")
            found = _MAX_TOKENS.search(raw.decode() if isinstance(raw, bytes) else str(raw))
            words = [WORDS[n % len(WORDS)] for n in range(int(found[1]) if found else 16)]
            stream = bool(_tensor(request, "stream"))
            pieces = words if stream else ["".join(words)]
            counts = bool(_tensor(request, "return_num_output_tokens"))
            for number, piece in enumerate(pieces):
                last = number == len(pieces) - 1
                tensors = [_text("text_output", piece), _text("finish_reason", "length" if last else "")]
                if counts:
                    tokens = 1 if stream else len(words)
                    tensors.append(pb_utils.Tensor("num_output_tokens", np.array([tokens], dtype=np.uint32)))
                    tensors.append(pb_utils.Tensor("num_input_tokens", np.array([4], dtype=np.uint32)))
                self._send(sender, tensors, last)

    def _send(self, sender: pb_utils.InferenceResponseSender, tensors: list[pb_utils.Tensor], last: bool) -> None:
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0
        sender.send(pb_utils.InferenceResponse(tensors), flags=flags)
