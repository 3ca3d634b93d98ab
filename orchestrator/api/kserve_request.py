"""Triton's `generate` bodies, and the same as tensors of an `infer`, -> GenerateRequest. Unknown names are refused.

The names, their ranges and which of two wins are those of docs/protocol.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from orchestrator.api import controls, policy
from orchestrator.api.bodies import json_value
from orchestrator.api.fields import (
    Defaults,
    boolean,
    integer,
    messages,
    number,
    prompt,
    required,
    sampling,
    unknown,
    wrong,
)
from orchestrator.api.kserve_tensors import InferBody, scalars
from orchestrator.domain import Caller, GenerateRequest, Model, Notes, Tensor, made
from orchestrator.errors import InvalidRequest, Text

TEXTS = ("text_input", "sampling_parameters")
FLAGS = (
    "stream", "exclude_input_in_output", "return_finish_reason", "return_logprobs", "return_num_input_tokens",
    "return_num_output_tokens", "return_num_cached_tokens",
)  # fmt: skip
OUTPUTS = ("text_output", "finish_reason", "num_input_tokens", "num_output_tokens", "num_cached_tokens", "logprobs")
SAMPLING = (
    "max_tokens", "temperature", "top_k", "top_p", "seed", "stop", "timeout_s", *sorted(controls.NAMES - {"priority"}),
)  # fmt: skip
# In sampling_parameters alone; a field of the name priority is KServe's own.
PROMPTS = ("messages", "prompt_token_ids")
APART = (*PROMPTS, "priority")
# Fields of KServe's own. Only `timeout`, microseconds, means something to a generation model.
KSERVE = ("timeout", "priority", "sequence_id", "sequence_start", "sequence_end", "binary_data_output")
# What numbers may be, both ends included.
TEMPERATURE = (0.0, 100.0)
SEED = (-(2**63), 2**64 - 1)
TIMEOUT_US = (0, 2**63 - 1)
MAX_TIMEOUT_S = 86_400.0


_KNOWN = frozenset((*TEXTS, *FLAGS, *SAMPLING, *KSERVE))
_TENSORS = frozenset((*TEXTS, *FLAGS))
_RETURNED = {f"return_{name}": name for name in OUTPUTS if name != "text_output"}
_READ = sampling(TEMPERATURE, SEED)


class Asked(Protocol):
    """One request at an edge. Header names are lower-case, `accepted_at` is monotonic seconds."""

    @property
    def id(self) -> str: ...
    @property
    def caller(self) -> Caller: ...
    @property
    def accepted_at(self) -> float: ...
    @property
    def headers(self) -> Mapping[bytes, bytes]: ...
    @property
    def traceparent(self) -> str | None: ...
    @property
    def notes(self) -> Notes: ...


@dataclass(frozen=True)
class Call:
    """What to generate, and which fields the answer has. `prefix` stands in front of the text."""

    request: GenerateRequest
    id: str | None
    outputs: frozenset[str]
    prefix: str


def generate(body: dict[str, Any], asked: Asked, model: Model, defaults: Defaults) -> Call:
    """`POST v2/models/{model}/generate` and `generate_stream`. Raises InvalidRequest naming the parameter."""
    fields: dict[str, Any] = dict(scalars(body.get("parameters")))
    for name in (*fields, *body):
        if name not in _KNOWN and (name in fields or name not in ("id", "parameters")):
            raise unknown(name, (*TEXTS, *FLAGS, *SAMPLING, *KSERVE))
    for name, value in body.items():
        if name in _KNOWN and value is not None:
            one = isinstance(value, list) and len(value) == 1 and name in _TENSORS
            fields[name] = value[0] if one else value  # a tensor of one element may be a list of one
    given = fields.pop("sampling_parameters", None) or {}
    if isinstance(given, str):
        not_json = Text("sampling_parameters is not valid JSON.", "sampling_parameters no es JSON válido.")
        given = json_value(given.encode(), not_json, "sampling_parameters")
    if not isinstance(given, dict):
        raise wrong("sampling_parameters", "a JSON object", "un objeto JSON")
    for name in given:
        if name not in SAMPLING and name not in APART:
            raise unknown(name, (*SAMPLING, *APART))
    fields.pop("priority", None)
    fields |= {name: value for name, value in given.items() if value is not None}
    id = body.get("id")
    if id is not None and not isinstance(id, str):
        raise wrong("id", "a string", "un texto")
    returned = {"text_output"}
    for flag, output in _RETURNED.items():
        if flag in fields and boolean(fields, flag):
            returned.add(output)
    logprobs = integer(fields, "logprobs", *controls.LOGPROBS)
    if logprobs is None and "logprobs" in returned:
        logprobs = 0
    if logprobs is not None:
        returned.add("logprobs")
    echo = "exclude_input_in_output" in fields and not boolean(fields, "exclude_input_in_output")
    values: dict[str, Any] = {
        "id": asked.id, "model": model.name, "accepted_at": asked.accepted_at, "temperature": defaults.temperature,
        "task": policy.task(asked.headers, model.task), "cache": policy.cache_policy(asked.headers),
        "traceparent": asked.traceparent, "logprobs": logprobs, "stream": boolean(fields, "stream"),
    }  # fmt: skip
    for name, read in _READ.items():
        if name in fields:
            values[name] = read(fields)
    controls.control(fields, values)
    request = made(GenerateRequest, **values, timeout_s=timeout_s(fields), **_prompt(fields))
    return Call(request, id, frozenset(returned), request.text or "" if echo else "")


def infer(body: InferBody, asked: Asked, model: Model, defaults: Defaults) -> Call:
    """An inference request to a generation model: its tensors are the fields of `generate`. Raises InvalidRequest."""
    fields: dict[str, Any] = {"id": body.id, "parameters": body.parameters}
    for tensor in body.inputs:
        fields[tensor.name] = _scalar(tensor, model.name)
    if "text_input" not in fields:
        raise required("text_input")
    names = {wanted.name for wanted in body.outputs}
    for wanted in body.outputs:
        if wanted.name not in OUTPUTS or wanted.classes:
            shown = wanted.name[:100]
            raise InvalidRequest(
                Text(
                    f"unexpected inference output '{shown}' for model '{model.name}'",
                    f"el modelo '{model.name}' no tiene la salida '{shown}' en esta forma",
                ),
                "outputs",
            )
    call = generate(fields, asked, model, defaults)
    if names and call.request.logprobs is None:
        # Who asks for all that a model's metadata declares asks for them too. As with Triton, no answer has them then.
        names.discard("logprobs")
        return Call(call.request, call.id, frozenset(names), call.prefix)
    return Call(call.request, call.id, frozenset(names) or call.outputs, call.prefix)


def _prompt(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The one prompt of three ways to give it, as the field of GenerateRequest that it fills."""
    text, turns, token_ids = fields.get("text_input"), fields.get("messages"), fields.get("prompt_token_ids")
    if text is not None and not isinstance(text, str):
        raise wrong("text_input", "a string", "un texto")
    if (bool(text), turns is not None, token_ids is not None).count(True) > 1:
        raise InvalidRequest(
            Text(
                "Give one of text_input, messages and prompt_token_ids, not several.",
                "Envíe solo uno de text_input, messages y prompt_token_ids.",
            ),
            "text_input",
        )
    if turns is not None:
        return {"messages": messages(turns)}
    if token_ids is not None:
        if not isinstance(token_ids, list):
            raise wrong("prompt_token_ids", "a list of token ids", "una lista de identificadores de token")
        return prompt(token_ids, "prompt_token_ids")
    if text is None:
        raise required("text_input")
    return prompt(text, "text_input")


def timeout_s(fields: dict[str, Any]) -> float | None:
    """The nearest of `timeout_s` and KServe's `timeout` in microseconds, where 0 says nothing."""
    limits_s = [(integer(fields, "timeout", *TIMEOUT_US) or 0) / 1e6]
    if "timeout_s" in fields:
        limits_s.append(number(fields, "timeout_s", 0.0, MAX_TIMEOUT_S, 0.0))
        if not limits_s[-1]:
            raise wrong("timeout_s", f"above 0 and at most {MAX_TIMEOUT_S:g}", f"mayor que 0 y hasta {MAX_TIMEOUT_S:g}")
    return min((limit_s for limit_s in limits_s if limit_s), default=None)


def _scalar(tensor: Tensor, model: str) -> str | bool:
    """The value of an input of one element."""
    name = tensor.name
    if name not in TEXTS and name not in FLAGS:
        shown = name[:100]
        raise InvalidRequest(
            Text(
                f"unexpected inference input '{shown}' for model '{model}'",
                f"el modelo '{model}' no tiene la entrada '{shown}'",
            ),
            "inputs",
        )
    datatype = "BYTES" if name in TEXTS else "BOOL"
    if tensor.datatype != datatype:
        raise InvalidRequest(
            Text(
                f"inference input '{name}' data-type is '{tensor.datatype}', but model '{model}' expects '{datatype}'",
                f"la entrada '{name}' es de tipo '{tensor.datatype}', pero el modelo '{model}' espera '{datatype}'",
            ),
            name,
        )
    if tensor.shape not in ((1,), (1, 1)):
        shown = ",".join(map(str, tensor.shape))
        raise InvalidRequest(
            Text(
                f"unexpected shape for input '{name}' for model '{model}'. Expected [1], got [{shown}].",
                f"forma inesperada de la entrada '{name}' del modelo '{model}': se espera [1], no [{shown}].",
            ),
            name,
        )
    if datatype == "BOOL":
        return tensor.data != b"\0"
    try:
        return tensor.elements[0].decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            Text(f"{name} is not valid UTF-8 text.", f"{name} no es texto UTF-8 válido."), name
        ) from error
