"""Where and how to connect to Redis, from a URL as redis-py reads it.

redis-py itself would do, but it costs every process a dozen megabytes.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from urllib.parse import parse_qsl, unquote, urlsplit

from orchestrator.redis_connection import Address
from orchestrator.settings import mask_url

# Options of redis-py's clients that mean nothing to a connection of ours.
IGNORED = frozenset({
    "client_name", "decode_responses", "encoding", "encoding_errors", "health_check_interval", "lib_name",
    "lib_version", "max_connections", "protocol", "retry_on_timeout", "single_connection_client",
    "socket_connect_timeout", "socket_keepalive", "socket_timeout", "timeout",
})  # fmt: skip
_TLS = frozenset({
    "ssl_ca_certs", "ssl_ca_data", "ssl_ca_path", "ssl_cert_reqs", "ssl_certfile", "ssl_check_hostname", "ssl_keyfile",
    "ssl_password",
})  # fmt: skip
_REQUIRED = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}
_FALSE = ("", "0", "f", "false", "n", "no")


def address_of(url: str) -> Address:
    """The address in redis://, rediss:// or unix:// with the options of its query.

    Raises ValueError for what it does not understand, OSError for a certificate that cannot be read.
    """
    at = urlsplit(url)
    if at.scheme not in ("redis", "rediss", "unix"):
        raise ValueError(f"{mask_url(url)}: it must begin with redis://, rediss:// or unix://")
    options = dict(parse_qsl(at.query))
    secure = at.scheme == "rediss"
    known = IGNORED | {"db", "username", "password"} | (_TLS if secure else set())
    for name in options:
        if name not in known:
            raise ValueError(f"{mask_url(url)}: unknown option {name!r}")
    username = options.get("username") or unquote(at.username or "") or None
    password = options.get("password") or unquote(at.password or "") or None
    try:
        if at.scheme == "unix":
            db = int(options.get("db", 0))
            return Address(path=unquote(at.path), username=username, password=password, db=db)
        in_path = unquote(at.path).replace("/", "")
        db = int(options.get("db", in_path if in_path.isdecimal() else 0))
        host, port = at.hostname or "localhost", at.port or 6379
        return Address(
            host=host, port=port, tls=_context(options) if secure else None, username=username, password=password, db=db
        )
    except (ValueError, KeyError) as error:
        raise ValueError(f"{mask_url(url)}: {error}") from error


def _context(options: Mapping[str, str]) -> ssl.SSLContext:
    context = ssl.create_default_context(
        cafile=options.get("ssl_ca_certs"), capath=options.get("ssl_ca_path"), cadata=options.get("ssl_ca_data")
    )
    mode = _REQUIRED[options.get("ssl_cert_reqs", "required")]
    checked = options.get("ssl_check_hostname", "true").lower() not in _FALSE
    context.check_hostname = checked and mode is not ssl.CERT_NONE
    context.verify_mode = mode
    if "ssl_certfile" in options:
        context.load_cert_chain(options["ssl_certfile"], options.get("ssl_keyfile"), options.get("ssl_password"))
    return context
