"""From the names in `triton_urls` to addresses, each of which is one server.

A name that cannot be looked up, or has no addresses, keeps those that it had: a DNS server that is away takes no Triton
away. A look-up that hangs is waited for no longer than LOOK_UP_S, and no second one of its name is begun meanwhile.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

log = logging.getLogger(__name__)

DEFAULT_PORT = 8000
LOOK_UP_S = 2.0

Rows = Sequence[tuple[Any, ...]]  # as getaddrinfo returns them
LookUp = Callable[[str, int], Awaitable[Rows]]


class ServersError(ValueError):
    """A server cannot be named so; `hint` says how."""

    hint = "give TRUTHGPT_TRITON_URLS as http://HOST:PORT, several with commas between them"


@dataclass(frozen=True, order=True)
class Entry:
    """One host of `triton_urls`, and the port of each of its addresses."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """As it is shown, and how a server is known to all workers once its host is an address."""
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    @property
    def literal(self) -> Entry | None:
        """The same with the address in its one spelling, None where the host is a name."""
        try:
            found = ipaddress.ip_address(self.host)
        except ValueError:
            return None
        mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
        return Entry(str(mapped or found), self.port)


def entries(urls: str) -> tuple[Entry, ...]:
    """The hosts in a list with commas, each once. Raises ServersError."""
    found: dict[Entry, None] = {}
    for url in urls.split(","):
        try:
            at = urlsplit(url.strip())
            port = DEFAULT_PORT if at.port is None else at.port
            if at.scheme != "http" or not at.hostname or not 0 < port < 65536:
                raise ValueError("not http://HOST:PORT with a port from 1 to 65535")
        except ValueError as error:
            raise ServersError(f"triton_urls: {url.strip()!r} names no server: {error}") from error
        found[Entry(at.hostname, port)] = None
    return tuple(found)


class Resolver:
    """The addresses of these hosts, as they were last known. `failures` counts look-ups that found none.

    `look_up` stands for the system's own.
    """

    def __init__(self, hosts: Sequence[Entry], look_up: LookUp | None = None, deadline_s: float = LOOK_UP_S) -> None:
        self._look_up, self._deadline_s = look_up or _look_up, deadline_s
        self._known: dict[Entry, frozenset[Entry]] = {}
        self._running: dict[Entry, asyncio.Task[Rows | Exception]] = {}
        self._told: dict[Entry, str] = {}  # the failure that the log knows of
        self.failures = 0
        for host in hosts:
            literal = host.literal
            self._known[host] = frozenset() if literal is None else frozenset((literal,))
        self._names = tuple(host for host in hosts if host.literal is None)

    @property
    def fixed(self) -> bool:
        """Whether there is no name to look up."""
        return not self._names

    @property
    def servers(self) -> tuple[Entry, ...]:
        """All servers that are known now, each once, in an order of their own."""
        return tuple(sorted(set().union(*self._known.values())))

    async def resolve(self) -> tuple[Entry, ...]:
        """Look up every name once, at the same time; all servers that are known then."""
        await asyncio.gather(*map(self._renew, self._names))
        return self.servers

    def close(self) -> None:
        """Wait for no look-up any more."""
        for running in self._running.values():
            running.cancel()
        self._running.clear()

    async def _renew(self, name: Entry) -> None:
        task = self._running.get(name)
        if task is None:
            task = self._running[name] = asyncio.create_task(_answer(self._look_up, name), name=f"look up {name.host}")
        done, _ = await asyncio.wait((task,), timeout=self._deadline_s)
        if not done:
            self._failed(name, f"no answer within {self._deadline_s:g} s")
            return
        self._running.pop(name, None)
        answer = task.result()
        if isinstance(answer, Exception):
            self._failed(name, str(answer) or type(answer).__name__)
            return
        found = _servers(answer, name.port)
        if not found:
            self._failed(name, "it has no address")
            return
        if self._told.pop(name, None) is not None or found != self._known[name]:
            log.info("%s is now %s", name.url, ", ".join(sorted(one.url for one in found)))
        self._known[name] = found

    def _failed(self, name: Entry, why: str) -> None:
        self.failures += 1
        if self._told.get(name) != why:
            self._told[name] = why
            kept = "its last known addresses are used on" if self._known[name] else "no address of it is known"
            log.warning("%s cannot be looked up: %s; %s", name.host, why, kept)


async def _answer(look_up: LookUp, name: Entry) -> Rows | Exception:
    """What is found, or why nothing is: nobody may be waiting for it any more."""
    try:
        return await look_up(name.host, name.port)
    except (OSError, UnicodeError) as error:
        return error


def _look_up(host: str, port: int) -> Awaitable[Rows]:
    return asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)


def _servers(rows: Rows, port: int) -> frozenset[Entry]:
    """The servers in what a look-up found. A host that has addresses of both kinds is taken by those of IPv4: the
    others lead to the same servers, which would count twice.
    """
    found = {Entry(str(row[4][0]), port) for row in rows if row[0] in (socket.AF_INET, socket.AF_INET6)}
    literals = {one.literal or one for one in found}
    return frozenset({one for one in literals if ":" not in one.host} or literals)
