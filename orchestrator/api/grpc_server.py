"""The gRPC server of one worker: what is served, and the bounds on what clients may do."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

import grpc

from orchestrator.api.fields import Defaults
from orchestrator.api.grpc_describe import Described
from orchestrator.api.grpc_door import Door, Methods
from orchestrator.api.grpc_health import HEALTH, Checks
from orchestrator.api.grpc_infer import Inference
from orchestrator.api.grpc_messages import SERVICE
from orchestrator.api.grpc_reflection import methods as reflection
from orchestrator.api.kserve import Describe
from orchestrator.api.middleware import MAX_HEADER_BYTES, Identify
from orchestrator.gateway import Gateway
from orchestrator.incident import Incident
from orchestrator.openfiles import connections

END_S = 1.0  # for the last answers to be written once the drain is over
STREAMS = 256  # calls at a time on one connection; further ones wait at the client
IDLE_S = 300  # a connection without calls is closed
SILENT_S, DEAD_S = 60, 20  # a connection that is silent is asked whether it lives, and closed without an answer
PING_S, PINGS = 10, 3  # a client that asks so more often without need, so many times too often, is sent away


def methods(gateway: Gateway, describe: Describe, defaults: Defaults, request_timeout_s: float) -> Methods:
    """Everything that is served here, by SERVICE/METHOD."""
    return {
        **Inference(gateway, defaults, request_timeout_s).methods(),
        **Described(gateway, describe).methods(),
        **Checks(gateway).methods(),
        **reflection([SERVICE, HEALTH]),
    }


class GrpcServer:
    """Serves `methods` on an address that other workers may share (SO_REUSEPORT). `port` is known once it serves."""

    port = 0

    def __init__(
        self, methods: Methods, identify: Identify, report: Callable[[Incident], None], trusted_proxies: str | None,
        message_limit_bytes: int,
    ) -> None:  # fmt: skip
        logging.getLogger("grpc._cython.cygrpc").addFilter(_without_values)
        calls = connections()  # a connection needs an open file, and its calls need places
        self._server = grpc.aio.server(options=_options(message_limit_bytes, calls), maximum_concurrent_rpcs=calls)
        self.door = Door(methods, identify, report, trusted_proxies)
        self._server.add_generic_rpc_handlers((self.door,))

    async def start(self, host: str, port: int) -> None:
        """Serve; port 0 is any free one. Raises RuntimeError for an address that cannot be had."""
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # the one that the HTTP server takes, too: a name may have several
        family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
        shown = f"[{address[0]}]" if family == socket.AF_INET6 else address[0]
        self.port = self._server.add_insecure_port(f"{shown}:{port}")
        await self._server.start()

    async def stop(self) -> None:
        """Take no calls any more, and end those that still run."""
        await self._server.stop(END_S)


def _without_values(record: logging.LogRecord) -> bool:
    """Of grpc's own lines drop those that quote a stranger's metadata, a credential for instance, where it is no UTF-8.

    Nobody can mend what they tell of: grpc reads the value as Latin-1 and goes on.
    """
    return not str(record.msg).startswith("Invalid encoding")


def _options(message_limit_bytes: int, connections: int) -> list[tuple[str, int]]:
    """Channel arguments of grpc/include/grpc/impl/channel_arg_names.h."""
    return [
        ("grpc.so_reuseport", 1),
        ("grpc.max_receive_message_length", message_limit_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", STREAMS),
        ("grpc.max_metadata_size", MAX_HEADER_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_HEADER_BYTES),
        ("grpc.max_connection_idle_ms", IDLE_S * 1000),
        ("grpc.keepalive_time_ms", SILENT_S * 1000),
        ("grpc.keepalive_timeout_ms", DEAD_S * 1000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", PING_S * 1000),
        ("grpc.http2.max_ping_strikes", PINGS),
        ("grpc.max_allowed_incoming_connections", connections),
        ("grpc.enable_channelz", 0),
    ]
