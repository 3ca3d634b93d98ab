"""KServe v2 over gRPC: one `ModelStreamInfer` a generation, one `ModelInfer` an encoding.

Moments are taken in the coroutine that reads, when grpc.aio hands over the bytes of a message and before they are
parsed: some 0.1 ms after they came out of the socket.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.bench import kserve
from orchestrator.bench.answers import Answer, BenchError, Fault
from orchestrator.bench.plan import Load, PlanError, Prompt, Target

MAX_MESSAGE_BYTES = 64 << 20
REQUESTS_A_CHANNEL = 8  # under way at once; servers bound the streams of a connection
FINAL = "triton_final_response"
PARAMETERS = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
_SERVICE = "/inference.GRPCInferenceService/"


class GrpcWire:
    """An endpoint asked over gRPC. `close` it.

    Raises ModuleNotFoundError where grpcio or protobuf is missing, PlanError for parameters that it cannot carry.
    """

    def __init__(self, target: Target, load: Load) -> None:
        # Forking with gRPC's own handlers is for programs that go on using it in the child.
        os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        import grpc.aio

        from orchestrator.api import grpc_messages

        self._grpc, self._messages = grpc, grpc_messages
        self._target, self._load = target, load
        if target.task == "encode":
            _check_parameters(load.extra_body)
        self._idle: list[Any] = []  # places on channels; the one that was left last is taken first
        self._channels: list[Any] = []
        self._credentials = _credentials(grpc, target) if target.tls else None
        self._metadata = [(name.lower(), value) for name, value in target.headers]
        given = {name for name, _ in self._metadata}
        if "triton_grpc_error" not in given:  # errors of a stream have a status, not a sentence alone
            self._metadata.append(("triton_grpc_error", "true"))
        if target.api_key is not None and "authorization" not in given:
            self._metadata.append(("authorization", f"Bearer {target.api_key}"))
        if not target.allow_cache and "cache-control" not in given:
            self._metadata.append(("cache-control", "no-cache"))

    async def ask(self, prompt: Prompt, tokens: int, answer: Answer) -> None:
        """One request; `answer` is filled as it comes. Raises Fault."""
        place = self._idle.pop() if self._idle else self._another()
        try:
            if self._target.task == "encode":
                await self._encode(place, prompt, answer)
            else:
                await self._generate(place, prompt, tokens, answer)
        except self._grpc.aio.AioRpcError as error:
            code = error.code().name.lower()
            raise Fault(f"grpc_{code}", error.details() or "no reason is given") from None
        finally:
            self._idle.append(place)

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    def _another(self) -> Any:
        """A place on a new channel; the others it has are free."""
        options = [
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.use_local_subchannel_pool", 1),  # else all channels share one connection
            ("grpc.enable_retries", 0),
        ]
        host = f"[{self._target.host}]" if ":" in self._target.host else self._target.host
        address = f"{host}:{self._target.port}"
        if self._credentials is not None:
            channel = self._grpc.aio.secure_channel(address, self._credentials, options)
        else:
            channel = self._grpc.aio.insecure_channel(address, options)
        self._channels.append(channel)
        self._idle += [channel] * (REQUESTS_A_CHANNEL - 1)
        return channel

    async def _generate(self, channel: Any, prompt: Prompt, tokens: int, answer: Answer) -> None:
        request = self._request()
        request.parameters["triton_enable_empty_final_response"].bool_param = True
        _add(request, kserve.INPUT, "BYTES", (1,), _bytes(prompt.text.encode()))
        _add(request, "stream", "BOOL", (1,), b"\1" if self._target.stream else b"\0")
        _add(request, "sampling_parameters", "BYTES", (1,), _bytes(kserve.sampling(self._load, prompt, tokens)))
        for flag in kserve.FLAGS:
            _add(request, flag, "BOOL", (1,), b"\1")
        call = channel.stream_stream(_SERVICE + "ModelStreamInfer")(metadata=self._metadata)
        responses, final, now = kserve.Responses(answer), False, 0.0
        try:
            await call.write(request.SerializeToString())
            await call.done_writing()
            while not final:
                raw = await call.read()
                now = time.perf_counter()
                if raw is self._grpc.aio.EOF:
                    break
                final = self._response(raw, now, responses)
        finally:
            call.cancel()  # it is over, or nobody reads it any more
        responses.end(now, self._target.streams)

    def _response(self, raw: bytes, now: float, responses: kserve.Responses) -> bool:
        """Take one message; whether it is the final one. Raises Fault."""
        message = _parse(self._messages.StreamResponse, raw)
        if message.error_message:
            raise Fault("in_band", message.error_message)
        outputs = _outputs(message.infer_response)
        if outputs:
            names = ("text_output", "finish_reason", "num_output_tokens", "num_input_tokens")
            responses.take(now, *(outputs.get(name) for name in names))
        return FINAL in message.infer_response.parameters and message.infer_response.parameters[FINAL].bool_param

    async def _encode(self, channel: Any, prompt: Prompt, answer: Answer) -> None:
        request = self._request()
        _add(request, kserve.INPUT, "BYTES", (1, 1), _bytes(prompt.text.encode()))
        for name, value in self._load.extra_body.items():
            setattr(request.parameters[name], PARAMETERS[type(value)], value)
        raw = await channel.unary_unary(_SERVICE + "ModelInfer")(
            request.SerializeToString(), metadata=self._metadata
        )  # fmt: skip
        now = time.perf_counter()
        outputs = _outputs(_parse(self._messages.InferResponse, raw))
        prompt_tokens = outputs.pop("num_input_tokens", None)
        if not any(outputs.values()):
            raise Fault("no_tokens", "the answer has no outputs")
        answer.count(None, prompt_tokens)
        answer.finish(now, streams=False)

    def _request(self) -> Any:
        return self._messages.InferRequest(model_name=self._target.model)


def _check_parameters(extra: Mapping[str, Any]) -> None:
    """Raises PlanError for what is no parameter of a KServe request."""
    for name, value in extra.items():
        if type(value) not in PARAMETERS or (isinstance(value, int) and not -(1 << 63) <= value < 1 << 63):
            hint = "give true or false, a number of 64 bits or a text"
            raise PlanError(f"extra body: {name[:50]!r} is no parameter that gRPC can carry", hint)


def _credentials(grpc: Any, target: Target) -> Any:
    """Certificates are checked. Raises BenchError where those to trust cannot be read."""
    try:
        trusted = Path(target.ca_file).read_bytes() if target.ca_file else None
    except OSError as error:
        raise BenchError(f"{target.ca_file}: {error.strerror}", "give a PEM file with --ca-file") from error
    return grpc.ssl_channel_credentials(root_certificates=trusted)


def _add(request: Any, name: str, datatype: str, shape: tuple[int, ...], data: bytes) -> None:
    request.inputs.add(name=name, datatype=datatype, shape=shape)
    request.raw_input_contents.append(data)


def _bytes(data: bytes) -> bytes:
    """One element of a BYTES tensor, raw."""
    return struct.pack("<I", len(data)) + data


def _parse(kind: Any, raw: bytes) -> Any:
    from google.protobuf.message import DecodeError

    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise Fault("nonsense", "a message is not KServe's") from error


def _outputs(response: Any) -> dict[str, Any]:
    """The first elements of the text and count outputs; of others, whether there is anything. Raises Fault."""
    raw, found = response.raw_output_contents, dict[str, Any]()
    for index, output in enumerate(response.outputs):
        data = raw[index] if index < len(raw) else b""
        if output.datatype == "BYTES":
            if len(data) < 4 or struct.unpack_from("<I", data)[0] > len(data) - 4:
                raise Fault("nonsense", f"the output {output.name[:50]} is no text")
            found[output.name] = data[4 : 4 + struct.unpack_from("<I", data)[0]].decode("utf-8", "replace")
        elif output.datatype == "UINT32":
            if len(data) < 4:
                raise Fault("nonsense", f"the output {output.name[:50]} is no number")
            found[output.name] = struct.unpack_from("<I", data)[0]
        else:
            found[output.name] = bool(data)
    return found
