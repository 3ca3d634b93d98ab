"""Triton's model repository extension: what is loaded, and loading and unloading it.

Tried on tritonserver 2.51 in explicit mode with a Python-based, decoupled backend: `load` of a model that is loaded
brings up the new version beside the old one, moves new requests over in one step, and lets the old one end what runs
on it before it goes; no request fails in between. A load that fails leaves the old version as it was. `unload` refuses
new requests at once, returns, and lets running ones end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import orjson

from orchestrator.errors import TruthGPTError, UpstreamError
from orchestrator.triton.client import Heartbeat, Triton
from orchestrator.triton.wire import decode, error_of

READY, LOADING, UNLOADING, UNAVAILABLE = "READY", "LOADING", "UNLOADING", "UNAVAILABLE"
INDEX_S = 5.0


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


class Repository:
    """The model repository of one server."""

    def __init__(self, triton: Triton) -> None:
        self._triton = triton

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
        body = {} if config is None else {"parameters": {"config": orjson.dumps(config).decode()}}
        await self._post(f"v2/repository/models/{quote(model, safe='')}/load", body, timeout_s)

    async def unload(self, model: str, timeout_s: float) -> None:
        """Unload every version of a model; Triton returns before its running requests have ended."""
        await self._post(f"v2/repository/models/{quote(model, safe='')}/unload", {}, timeout_s)

    async def beat(self, model: str) -> Heartbeat | None:
        """The heartbeat of a model, None for one of a backend that has none and is ready. Raises TruthGPTError."""
        if (await self._triton.model_config(model)).generates:
            return await self._triton.heartbeat(model)
        await self._triton.model_ready(model)
        return None

    async def _post(self, path: str, body: object, timeout_s: float) -> Any:
        reply = await self._triton.fetch("POST", path, orjson.dumps(body), {}, timeout_s)
        if reply.status != 200:
            error: TruthGPTError = error_of(reply.body, reply.status)
            raise error
        return decode(reply.body) if reply.body else {}
