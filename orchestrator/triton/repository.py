"""Triton's model repository extension: what is loaded, and loading and unloading it.

Tried on tritonserver 2.51 in explicit mode with a Python-based, decoupled backend: `load` of a model that is loaded
brings up the new version beside the old one, moves new requests over in one step, and lets the old one end what runs
on it before it goes; no request fails in between. A load that fails leaves the old version as it was. `unload` refuses
new requests at once, returns, and lets running ones end.

A model named X--engine beside one named X is the graph of X alone, as `truthgpt export --serve-with native` makes the
two: it is loaded before X and unloaded after it, and no caller ever sees it.

Over HTTP a load keeps a thread of Triton's HTTP server until it has ended, and every stream whose connection belongs to
that thread, often all of them, stands still for so long: a load goes over gRPC, which disturbs none (tried).
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

import orjson

from orchestrator.errors import TruthGPTError, UpstreamError, UpstreamUnavailable
from orchestrator.triton.client import Heartbeat, Triton
from orchestrator.triton.wire import Reply, decode, error_of

READY, LOADING, UNLOADING, UNAVAILABLE = "READY", "LOADING", "UNLOADING", "UNAVAILABLE"
INDEX_S = 5.0
ENGINE = "--engine"
LOAD_METHOD = "/inference.GRPCInferenceService/RepositoryModelLoad"


@dataclass(frozen=True)
class Row:
    """One version of a model in the index. `state` is empty, and so is `version`, for what was never loaded."""

    name: str
    version: str
    state: str
    reason: str = ""

    @property
    def occupied(self) -> bool:
        """Whether the version takes memory."""
        return self.state in (READY, LOADING, UNLOADING)

    @property
    def unloaded(self) -> bool:
        """Whether Triton was told to unload the version; one that did not load has another reason."""
        return self.state == UNLOADING or (self.state == UNAVAILABLE and self.reason == "unloaded")


def is_engine(name: str, names: Container[str]) -> bool:
    """Whether a model is the graph of another one of those names."""
    return name.endswith(ENGINE) and name.removesuffix(ENGINE) in names


class Repository:
    """The model repository of one server. `grpc` is its gRPC address, which loading needs."""

    def __init__(self, triton: Triton, grpc: str = "") -> None:
        self._triton, self._grpc = triton, grpc

    async def rows(self, model: str | None = None) -> list[Row]:
        """The index, of one model if named. Raises TruthGPTError."""
        found = await self._post("v2/repository/index", {}, INDEX_S)
        try:
            rows = [Row(*(str(row.get(key, "")) for key in ("name", "version", "state", "reason"))) for row in found]
        except (KeyError, TypeError, AttributeError) as error:
            raise UpstreamError("the repository index makes no sense") from error
        return [row for row in rows if model in (None, row.name)]

    async def load(self, model: str, timeout_s: float, config: Mapping[str, Any] | None = None) -> None:
        """Load a model, or load it anew if its files, its version or its configuration have changed.

        `config` takes the place of config.pbtxt. Returns when the version is ready and has taken over. Raises
        UpstreamError with Triton's reason when it does not load, UpstreamUnavailable when that takes longer.
        """
        await self._load(model, {} if config is None else {"config": orjson.dumps(config).decode()}, timeout_s)

    async def forward(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], timeout_s: float
    ) -> Reply:
        """An exchange of the admin edge as Triton answers it, a load over gRPC. Raises TruthGPTError.

        The graph of a model comes and goes with it.
        """
        asked = re.fullmatch(r"/v2/repository/models/([^/]+)/(load|unload)", path)
        if asked is None or method != "POST":
            return await self._triton.fetch(method, path, body, headers, timeout_s)
        model = unquote(asked[1])
        if asked[2] == "unload":
            reply = await self._triton.fetch(method, path, body, headers, timeout_s)
            if reply.status == 200 and any(row.occupied for row in await self.rows(model + ENGINE)):
                await self.unload(model + ENGINE, timeout_s)
            return reply
        try:
            given = (orjson.loads(body) if body else {}).get("parameters", {})
            parameters = {
                name: base64.b64decode(value, validate=True) if name.startswith("file:") else str(value)
                for name, value in given.items()
            }
        except (ValueError, TypeError, AttributeError):
            return Reply(400, {}, orjson.dumps({"error": "the parameters of a load are texts by name"}))
        try:
            if await self.rows(model + ENGINE):
                await self._load(model + ENGINE, {}, timeout_s)
            await self._load(model, parameters, timeout_s)
        except UpstreamError as error:
            return Reply(400, {}, orjson.dumps({"error": str(error)}))
        return Reply(200, {}, b"")

    async def _load(self, model: str, parameters: Mapping[str, str | bytes], timeout_s: float) -> None:
        # Forking with gRPC's own handlers is for programs that go on using it in the child; ours start others.
        os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        import grpc.aio  # here, because whoever loads nothing has no need of it

        async with grpc.aio.insecure_channel(self._grpc) as channel:
            try:
                await channel.unary_unary(LOAD_METHOD)(load_request(model, parameters), timeout=timeout_s)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise UpstreamUnavailable(f"Triton did not load {model} within {timeout_s:g} s") from error
                if error.code() is grpc.StatusCode.UNAVAILABLE and "load" not in (error.details() or ""):
                    raise UpstreamUnavailable(f"Triton does not answer: {error.details()}") from error
                raise UpstreamError(error.details() or "Triton gives no reason") from error

    async def unload(self, model: str, timeout_s: float) -> None:
        """Unload every version of a model; Triton returns before its running requests have ended."""
        await self._post(f"v2/repository/models/{quote(model, safe='')}/unload", {}, timeout_s)

    async def beat(self, model: str, stall_s: float) -> Heartbeat | None:
        """The heartbeat of a model, None for one of a backend that has none and is ready. Raises TruthGPTError.

        `stall_s` bounds how long an encoder may be in one batch.
        """
        return await self._triton.beat(model, await self._triton.model_config(model), stall_s)

    async def _post(self, path: str, body: object, timeout_s: float) -> Any:
        reply = await self._triton.fetch("POST", path, orjson.dumps(body), {}, timeout_s)
        if reply.status != 200:
            error: TruthGPTError = error_of(reply.body, reply.status)
            raise error
        return decode(reply.body) if reply.body else {}


def load_request(model: str, parameters: Mapping[str, str | bytes]) -> bytes:
    """RepositoryModelLoadRequest in protobuf's wire format, see
    https://github.com/triton-inference-server/common/blob/main/protobuf/grpc_service.proto.
    """
    request = _field(2, model.encode())
    for name, value in parameters.items():  # a map's row: key 1, value 2, a ModelRepositoryParameter
        own = _field(3, value.encode()) if isinstance(value, str) else _field(4, value)  # string_param, bytes_param
        request += _field(3, _field(1, name.encode()) + _field(2, own))
    return request


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited field."""
    length, rest = bytearray(), len(data)
    while rest > 0x7F:
        length.append(rest & 0x7F | 0x80)
        rest >>= 7
    length.append(rest)
    return bytes([number << 3 | 2]) + bytes(length) + data
