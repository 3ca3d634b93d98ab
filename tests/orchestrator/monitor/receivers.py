"""Servers that alerts are really sent to: HTTP that answers as a test says, mail, and ones that never answer."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from orchestrator.monitor.notice import Notice
from tests.e2e.stack import free_ports


@dataclass
class Request:
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Receiver:
    """What came in, and what is answered: a status with headers each, the last one for all that follow."""

    answers: list[tuple[int, dict[str, str]]] = field(default_factory=lambda: [(200, {})])
    requests: list[Request] = field(default_factory=list)
    port: int = 0
    scheme: str = "http"

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}/hooks/s3cr3t-path?token=s3cr3t-query"

    @property
    def seen(self) -> list[tuple[str, str]]:
        """Status and name of the alerts that came, for a webhook."""
        return [(request.json["status"], request.json["alert"]["name"]) for request in self.requests]


@contextmanager
def receiving(*answers: int | tuple[int, dict[str, str]], tls: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    """An HTTP server, with TLS where a context is given."""
    receiver = Receiver()
    if answers:
        receiver.answers = [(answer, {}) if isinstance(answer, int) else answer for answer in answers]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.requests.append(Request(self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            status, headers = receiver.answers.pop(0) if len(receiver.answers) > 1 else receiver.answers[0]
            with contextlib.suppress(OSError):  # a client need not read it all
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(b"thank you")

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a client that trusts no certificate hangs up

    server = Quiet(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        receiver.scheme = "https"
    receiver.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def mute(talk: Callable[[socket.socket], None] = lambda connection: None) -> Iterator[int]:
    """A port whose server accepts, does with each connection what `talk` says, and never closes it."""
    connections: list[socket.socket] = []
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            try:
                connection, _ = server.accept()
            except OSError:
                return
            connections.append(connection)
            threading.Thread(target=guarded, args=(connection,), daemon=True).start()

    def guarded(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            talk(connection)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            ended.set()
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in connections:
                connection.close()


def drip(connection: socket.socket) -> None:
    """The head of an answer, a byte every 0.05 s, without end."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
    while True:
        connection.sendall(b"x")
        time.sleep(0.05)


def notice(status: str = "firing", name: str = "TruthGPTDiskFull", **changes: Any) -> Notice:
    """A message; 2026-11-26 18:30 UTC."""
    fields: dict[str, Any] = {
        "id": "5f1e-firing", "status": status, "at": 1_795_717_800.5, "host": "node-1", "name": name,
        "severity": "critical", "summary": "95.0% of the disk of the folder home is in use; the threshold is 90%.",
        "labels": {"folder": "home"}, "value": 0.95, "threshold": 0.9, "since": 1_795_717_700.0,
        "resolved": 1_795_717_800.5 if status == "resolved" else None, "runbook": "docs/operations.md#truthgptdiskfull",
        "advice": "Free space there.",
    }  # fmt: skip
    return Notice(**{**fields, **changes})


@dataclass
class Certificate:
    """A certificate for 127.0.0.1 and localhost that signs itself."""

    pem: Path
    key: Path

    def server(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.pem, self.key)
        return context


def certificate(folder: Path) -> Certificate:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=2))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    result = Certificate(folder / "certificate.pem", folder / "key.pem")
    result.pem.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    result.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )  # fmt: skip
    return result


@dataclass
class Mailbox:
    """What a mail server got: envelopes and mails, and who logged in."""

    port: int = 0
    mails: list[tuple[str, list[str], EmailMessage]] = field(default_factory=list)
    logins: list[tuple[bytes, bytes]] = field(default_factory=list)
    encrypted: list[bool] = field(default_factory=list)
    refuse: dict[str, str] = field(default_factory=dict)  # recipient -> answer


@contextmanager
def mailing(
    tls: ssl.SSLContext | None = None, smtps: ssl.SSLContext | None = None, password: bytes | None = None,
    needs_tls: bool = False,
) -> Iterator[Mailbox]:  # fmt: skip
    """A mail server: with STARTTLS where `tls` is given, TLS from the start with `smtps`, a login with `password`."""
    import email.policy
    from email import message_from_bytes

    from aiosmtpd.controller import Controller
    from aiosmtpd.smtp import AuthResult, LoginPassword

    box = Mailbox(port=free_ports(1)[0])

    class Handler:
        async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: Any) -> str:
            if address in box.refuse:
                return box.refuse[address]
            envelope.rcpt_tos.append(address)
            return "250 OK"

        async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
            mail = message_from_bytes(envelope.content, policy=email.policy.default)
            assert isinstance(mail, EmailMessage)
            box.mails.append((envelope.mail_from, list(envelope.rcpt_tos), mail))
            box.encrypted.append(session.ssl is not None or smtps is not None)
            return "250 OK"

    def authenticate(server: Any, session: Any, envelope: Any, mechanism: str, data: Any) -> AuthResult:
        assert isinstance(data, LoginPassword)
        box.logins.append((data.login, data.password))
        return AuthResult(success=data.password == password, handled=False)  # the server answers

    controller = Controller(
        Handler(), hostname="127.0.0.1", port=box.port, tls_context=tls, ssl_context=smtps, auth_required=needs_tls,
        auth_require_tls=needs_tls, authenticator=authenticate, ready_timeout=30,
    )  # fmt: skip
    try:
        controller.start()
        yield box
    finally:
        controller.stop()
