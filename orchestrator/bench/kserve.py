"""KServe v2 with Triton's generate extension, and plain inference of encoders: bodies, and what their answers say.

The tensor names are those of Triton's vLLM backend, which are our own backend's: docs/protocol.md.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import orjson

from orchestrator.bench.answers import Answer, Fault, HttpReader, mapping, natural
from orchestrator.bench.plan import Load, Prompt, Target
from orchestrator.sse import EventParser

FLAGS = ("return_finish_reason", "return_num_input_tokens", "return_num_output_tokens")
INPUT = "text_input"


def path(target: Target) -> str:
    verb = "infer" if target.task == "encode" else "generate_stream" if target.stream else "generate"
    return f"{target.prefix}/v2/models/{quote(target.model, safe='')}/{verb}"


def sampling(load: Load, prompt: Prompt, tokens: int) -> bytes:
    """The JSON text of `sampling_parameters`, for at most so many tokens."""
    fields: dict[str, Any] = {"max_tokens": tokens, "temperature": load.temperature}
    if load.ignore_eos:
        fields["ignore_eos"] = True
    if prompt.turns:
        fields["messages"] = [{"role": role, "content": content} for role, content in prompt.turns]
    return orjson.dumps({name: value for name, value in {**fields, **load.extra_body}.items() if value is not None})


def body(target: Target, load: Load, prompt: Prompt, tokens: int) -> bytes:
    """The JSON body of a request."""
    if target.task == "encode":
        tensor = {"name": INPUT, "datatype": "BYTES", "shape": [1, 1], "data": [prompt.text]}
        return orjson.dumps({"inputs": [tensor], **({"parameters": load.extra_body} if load.extra_body else {})})
    return orjson.dumps({
        INPUT: prompt.text, "stream": target.stream, "sampling_parameters": sampling(load, prompt, tokens).decode(),
        **dict.fromkeys(FLAGS, True),
    })  # fmt: skip


def reader(target: Target, answer: Answer) -> HttpReader:
    """What takes an answer of the target's endpoint."""
    if target.task == "encode":
        return Inference(answer)
    return Stream(answer) if target.stream else Generation(answer)


class Responses:
    """The responses of one generation, over HTTP or gRPC: the text and the counts of each."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._held = 0  # tokens that came without text: their text comes with the next ones
        self._sum: int | None = None
        self.finished = False

    def take(self, now: float, text: object, reason: object, output: object, prompt: object) -> None:
        """One response. Raises Fault."""
        if not isinstance(text, str):
            raise Fault("nonsense", "a response has no text_output")
        came = natural("output", output)
        if came is not None:
            self._sum = (self._sum or 0) + came
            self._held += came
        self._answer.count(self._sum, prompt)
        if text:
            self._answer.piece(now, None if self._sum is None else self._held)
            self._held = 0
        self.finished |= bool(reason)

    def end(self, now: float, streams: bool) -> None:
        """No more comes. Raises Fault."""
        if not self.finished:
            raise Fault("no_end", "the answer has no finish reason")
        self._answer.finish(now, streams)


class Stream(HttpReader):
    """Server-sent events without [DONE]: the last one has a finish reason."""

    kind = "text/event-stream"

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer)
        self._events, self._responses = EventParser(), Responses(answer)

    def part(self, data: bytes, now: float) -> None:
        try:
            events = self._events.feed(data)
        except ValueError as error:
            raise Fault("too_large", str(error)) from error
        for event in events:
            _take(self._responses, mapping(event, "an event"), now)

    def whole(self, now: float) -> None:
        self._responses.end(now, streams=True)


class Generation(HttpReader):
    """`generate`: an answer in one piece. Triton may answer 200 with an error in it."""

    def whole(self, now: float) -> None:
        responses = Responses(self.answer)
        _take(responses, mapping(bytes(self._kept), "the body"), now)
        responses.end(now, streams=False)


class Inference(HttpReader):
    """`infer` of an encoder."""

    def whole(self, now: float) -> None:
        outputs = mapping(bytes(self._kept), "the body").get("outputs")
        if not isinstance(outputs, list) or not all(isinstance(output, dict) for output in outputs):
            raise Fault("nonsense", "outputs is missing")
        rows = {str(output.get("name")): output.get("data") for output in outputs}
        counts = rows.pop("num_input_tokens", None)
        if not any(rows.values()):
            raise Fault("no_tokens", "the answer has no outputs")
        self.answer.count(None, counts[0] if isinstance(counts, list) and counts else None)
        self.answer.finish(now, streams=False)


def _take(responses: Responses, fields: dict[str, Any], now: float) -> None:
    names = ("text_output", "finish_reason", "num_output_tokens", "num_input_tokens")
    responses.take(now, *(_scalar(fields.get(name)) for name in names))


def _scalar(value: object) -> object:
    """Triton writes a tensor of one element as a scalar or as a list of one."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value
