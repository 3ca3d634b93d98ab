"""The admin edge's calls to several servers: what changes something goes to each, one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import orjson

from orchestrator.errors import TruthGPTError, UpstreamUnavailable
from orchestrator.resolving import Entry, Resolver
from orchestrator.triton import Reply, Repository, Triton
from orchestrator.triton.wire import decode

READS = "/v2/repository/index"  # a POST that changes nothing


class Control:
    """`connect` makes the client of a server; `grpc_of` tells its gRPC address. Drained servers are meant as well."""

    def __init__(
        self, resolver: Resolver, connect: Callable[[str], Triton], grpc_of: Callable[[Entry], str]
    ) -> None:  # fmt: skip
        self._resolver, self._connect, self._grpc_of = resolver, connect, grpc_of

    async def forward(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], timeout_s: float
    ) -> Reply:
        """One server answers what only asks, the first that can; of what changes something the last one's answer.

        A change stops at the first server that does not make it, and the error names that and those that did: a second
        attempt makes it everywhere. `timeout_s` is for all together. Raises TruthGPTError.
        """
        servers = await self._resolver.resolve()
        if not servers:
            raise UpstreamUnavailable("no Triton server is known")
        if len(servers) == 1:
            return await self._ask(servers[0], method, path, body, headers, timeout_s)
        until = asyncio.get_running_loop().time() + timeout_s
        asks = method == "GET" or path == READS
        done: list[str] = []
        for at, server in enumerate(servers):
            left_s = until - asyncio.get_running_loop().time()
            try:
                if left_s <= 0:
                    raise UpstreamUnavailable(f"the {timeout_s:g} s for all servers were over")
                reply = await self._ask(server, method, path, body, headers, left_s)
            except TruthGPTError as error:
                if asks and at + 1 < len(servers):
                    continue
                return _failed(server, 503, str(error), done)
            if asks:
                return reply
            if reply.status >= 400:
                fields = decode(reply.body)
                text = fields.get("error") if isinstance(fields, dict) else None
                return _failed(server, reply.status, str(text or reply.status), done)
            done.append(server.url)
        return reply

    async def _ask(
        self, server: Entry, method: str, path: str, body: bytes | None, headers: Mapping[str, str], timeout_s: float
    ) -> Reply:
        triton = self._connect(server.url)
        try:
            return await Repository(triton, self._grpc_of(server)).forward(method, path, body, headers, timeout_s)
        finally:
            await triton.close()

    def close(self) -> None:
        self._resolver.close()


def _failed(server: Entry, status: int, why: str, done: list[str]) -> Reply:
    told = f"; done at {', '.join(done)}, and nowhere else" if done else ""
    return Reply(status, {}, orjson.dumps({"error": f"{server.url}: {why}{told}"}))
