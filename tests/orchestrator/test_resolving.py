"""From names to servers: DNS that says nothing, fails, hangs or changes."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.resolving import Entry, Resolver, ServersError, entries
from tests.clock import awake


class Dns:
    """Answers as told: addresses, an error, or nothing for ever. Counts what it was asked."""

    def __init__(self, *addresses: str) -> None:
        self.answer: tuple[str, ...] | Exception | None = addresses
        self.asked = 0

    async def __call__(self, host: str, port: int) -> list[tuple[Any, ...]]:
        self.asked += 1
        if self.answer is None:
            await asyncio.sleep(3600)
        if isinstance(self.answer, Exception):
            raise self.answer
        return [
            (socket.AF_INET6 if ":" in one else socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port))
            for one in self.answer or ()
        ]


def resolver(dns: Dns, urls: str = "http://triton:8000") -> Resolver:
    return Resolver(entries(urls), dns, deadline_s=0.1)


async def resolved(those: Resolver) -> list[str]:
    return [server.url for server in await those.resolve()]


@pytest.mark.parametrize(
    ("urls", "found"),
    [
        ("http://a", [Entry("a", 8000)]),
        ("http://a:1 , http://b:65535/,http://a:1", [Entry("a", 1), Entry("b", 65535)]),
        ("http://[::1]:8000,http://[0:0::1]", [Entry("::1", 8000), Entry("0:0::1", 8000)]),
    ],
)
def test_hosts_and_ports(urls: str, found: list[Entry]) -> None:
    """Each host once, in its order, with 8000 where no port is given."""
    assert list(entries(urls)) == found


@pytest.mark.parametrize("url", ["http://a:0", "http://a:70000", "https://a", "a:8000", "http://", "http://a,,", ""])
def test_what_names_no_server_is_refused(url: str) -> None:
    """With the setting, what was given, and how it is to be given."""
    with pytest.raises(ServersError, match=r"triton_urls: '.*' names no server") as raised:
        entries(url)
    assert "http://HOST:PORT" in raised.value.hint


@given(st.ip_addresses(v=4), st.integers(1, 65535))
def test_an_address_is_itself(address: Any, port: int) -> None:
    """Literals need no look-up, whatever their spelling."""
    one = Resolver(entries(f"http://{address}:{port},http://[::ffff:{address}]:{port}"))
    assert one.fixed and one.servers == (Entry(str(address), port),)


async def test_every_address_is_a_server() -> None:
    """Of a name all addresses, each once, beside the literals; and those of a name that is an address of another."""
    dns = Dns("10.0.0.2", "10.0.0.1", "10.0.0.2")
    one = resolver(dns, "http://triton:8000,http://10.0.0.1:8000,http://10.0.0.1:9000")
    assert [server.url for server in one.servers] == ["http://10.0.0.1:8000", "http://10.0.0.1:9000"]
    assert await resolved(one) == ["http://10.0.0.1:8000", "http://10.0.0.1:9000", "http://10.0.0.2:8000"]


async def test_a_host_with_both_kinds_of_address_is_one_server() -> None:
    """Its IPv4 addresses are taken; a host that has IPv6 alone is taken by that."""
    assert await resolved(resolver(Dns("::1", "127.0.0.1"))) == ["http://127.0.0.1:8000"]
    assert await resolved(resolver(Dns("fd00::1", "fd00::2"))) == ["http://[fd00::1]:8000", "http://[fd00::2]:8000"]


@pytest.mark.parametrize("answer", [(), socket.gaierror(-2, "unknown"), UnicodeError("label too long"), None])
async def test_a_name_that_gives_nothing_keeps_what_it_had(answer: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing found, an error and silence: the addresses stay, each look-up counts, the log has it once and when it is
    over.
    """
    caplog.set_level(logging.INFO)
    dns = Dns("10.0.0.1")
    one = resolver(dns)
    await one.resolve()
    dns.answer = answer
    for _ in range(3):
        assert await resolved(one) == ["http://10.0.0.1:8000"]
    assert one.failures == 3
    assert len([r for r in caplog.records if "cannot be looked up" in r.message]) == 1
    if answer is None:
        one.close()
    dns.answer = ("10.0.0.2",)
    assert await resolved(one) == ["http://10.0.0.2:8000"]
    assert caplog.records[-1].message == "http://triton:8000 is now http://10.0.0.2:8000"
    one.close()


async def test_a_look_up_that_hangs_is_waited_for_and_not_repeated() -> None:
    """Each round takes no longer than its deadline, and of a name one look-up runs at most: threads do not pile up."""
    dns = Dns()
    dns.answer = None
    one = resolver(dns)
    began = awake()
    for _ in range(4):
        assert await one.resolve() == ()
    assert awake() - began < 2.0 and dns.asked == 1 and one.failures == 4
    one.close()


async def test_another_name_is_not_held_up(caplog: pytest.LogCaptureFixture) -> None:
    """Names are looked up at the same time; what is wrong with one says nothing of another."""

    async def look_up(host: str, port: int) -> list[tuple[Any, ...]]:
        return await (good if host == "good" else bad)(host, port)

    good, bad = Dns("10.0.0.1"), Dns()
    one = Resolver(entries("http://good,http://bad"), look_up, deadline_s=0.1)
    assert await resolved(one) == ["http://10.0.0.1:8000"]
    assert "no address of it is known" in caplog.text and "bad" in caplog.text


async def test_the_systems_own_look_up() -> None:
    """`localhost` is found without a network, and is one server."""
    assert await resolved(Resolver(entries("http://localhost:8123"))) == ["http://127.0.0.1:8123"]
