"""URLs of Redis."""

from __future__ import annotations

import ssl

import pytest
import redis.asyncio

from orchestrator.redis_url import address_of


@pytest.mark.parametrize(
    "url",
    [
        "redis://example", "redis://", "redis://ana:p%40ss@example:7000/3", "redis://:p%2Fw@example/", "redis://h/7?db=2",
        "redis://[::1]:7000/1", "redis://ana@h", "redis://h?username=ana&password=x", "redis://h/0?socket_timeout=3",
        "unix:///run/a%20b/redis.sock?db=2", "unix://:secret@/run/redis.sock", "unix://ana:secret@/run/redis.sock",
        "rediss://example:7000/2", "rediss://u:p@example?ssl_cert_reqs=none", "rediss://h?ssl_check_hostname=false",
    ],
)  # fmt: skip
def test_urls_mean_what_redis_py_reads_in_them(url: str) -> None:
    """Hosts, sockets, users, escaped passwords, databases and TLS options."""
    ours = address_of(url)
    theirs = redis.asyncio.ConnectionPool.from_url(url).make_connection()
    assert (ours.username, ours.password, ours.db) == (theirs.username, theirs.password, int(theirs.db or 0))
    if isinstance(theirs, redis.asyncio.UnixDomainSocketConnection):
        assert ours.path == theirs.path
        return
    assert (ours.path, ours.host, ours.port) == (None, theirs.host, int(theirs.port))
    assert (ours.tls is not None) == isinstance(theirs, redis.asyncio.SSLConnection)
    if isinstance(theirs, redis.asyncio.SSLConnection) and ours.tls is not None:
        wanted = theirs.ssl_context.get()
        assert (ours.tls.verify_mode, ours.tls.check_hostname) == (wanted.verify_mode, wanted.check_hostname)


def test_tls_is_verified_unless_told() -> None:
    """Certificate and name are checked by default, and a certificate that is not there is an OSError."""
    tls = address_of("rediss://example").tls
    assert tls is not None and tls.verify_mode is ssl.CERT_REQUIRED and tls.check_hostname
    with pytest.raises(OSError):
        address_of("rediss://example?ssl_ca_certs=/nowhere/ca.pem")


@pytest.mark.parametrize(
    "url",
    [
        "http://:hunter2@example", "redis://:hunter2@example?no_such_option=1", "redis://:hunter2@example?db=x",
        "redis://:hunter2@example:port", "redis://:hunter2@example?ssl_cert_reqs=none",
        "rediss://:hunter2@example?ssl_cert_reqs=perhaps",
    ],
)  # fmt: skip
def test_what_nobody_understands_is_refused(url: str) -> None:
    """Schemes, options and values that are unknown are a ValueError that does not show the password."""
    with pytest.raises(ValueError) as caught:
        address_of(url)
    assert "hunter2" not in str(caught.value)
