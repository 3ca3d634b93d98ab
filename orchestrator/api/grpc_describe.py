"""KServe's RPCs beside inference: health, metadata, configuration, statistics; control is for the admin port."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from google.protobuf.json_format import ParseDict

from orchestrator.api import kserve_path
from orchestrator.api.grpc_door import Methods, Rpc, Unary
from orchestrator.api.grpc_messages import PACKAGE, SERVICE
from orchestrator.api.grpc_schema import message
from orchestrator.api.kserve import Describe
from orchestrator.errors import ModelNotFound, PermissionDenied
from orchestrator.gateway import Gateway

CONTROL = (
    "RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload", "SystemSharedMemoryStatus",
    "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister", "CudaSharedMemoryStatus",
    "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister", "TraceSetting", "LogSettings",
)  # fmt: skip


class Described:
    """The handlers."""

    def __init__(self, gateway: Gateway, describe: Describe) -> None:
        self._gateway, self._describe = gateway, describe

    def methods(self) -> Methods:
        handlers = {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server,
            "ModelMetadata": self._metadata,
            "ModelConfig": self._config,
            "ModelStatistics": self._statistics,
            **dict.fromkeys(CONTROL, _admin_only),
        }
        return {
            f"{SERVICE}/{name}": Unary(
                message(f"{PACKAGE}.{name}Request"), handle, name in ("ServerLive", "ServerReady")
            )
            for name, handle in handlers.items()
        }

    async def _live(self, rpc: Rpc, request: Any) -> Any:
        return _of("ServerLiveResponse", {"live": True})

    async def _ready(self, rpc: Rpc, request: Any) -> Any:
        return _of("ServerReadyResponse", {"ready": self._gateway.ready})

    async def _model_ready(self, rpc: Rpc, request: Any) -> Any:
        """As Triton, an unknown model is one that is not ready."""
        try:
            ready = (await kserve_path.find(self._gateway, request.name, request.version)).ready
        except ModelNotFound:
            ready = False
        return _of("ModelReadyResponse", {"ready": ready})

    async def _server(self, rpc: Rpc, request: Any) -> Any:
        version = importlib.metadata.version("truthgpt")
        facts = {"name": "truthgpt", "version": version, "extensions": list(kserve_path.EXTENSIONS)}
        return _of("ServerMetadataResponse", facts)

    async def _metadata(self, rpc: Rpc, request: Any) -> Any:
        return _of("ModelMetadataResponse", await self._of_model(request, ""))

    async def _config(self, rpc: Rpc, request: Any) -> Any:
        return _of("ModelConfigResponse", {"config": await self._of_model(request, "config")})

    async def _statistics(self, rpc: Rpc, request: Any) -> Any:
        """Of all models where none is named."""
        found = await (self._of_model(request, "stats") if request.name else self._describe("", "", "stats"))
        return _of("ModelStatisticsResponse", found)

    async def _of_model(self, request: Any, what: str) -> Any:
        model = await kserve_path.find(self._gateway, request.name, request.version)
        return await self._describe(model.name, request.version, what)


async def _admin_only(rpc: Rpc, request: Any) -> Any:
    raise PermissionDenied(kserve_path.ADMIN_ONLY)


def _of(name: str, fields: Any) -> Any:
    """Triton's JSON has the messages' own names. What a newer Triton adds has no place in them and is left out."""
    return ParseDict(fields, message(f"{PACKAGE}.{name}")(), ignore_unknown_fields=True)
