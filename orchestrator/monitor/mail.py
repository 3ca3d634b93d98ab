"""Alerts by mail (RFC 5322, RFC 5321): STARTTLS where the server offers it, or TLS from the start. Blocking."""

from __future__ import annotations

import contextlib
import logging
import smtplib
import socket
import ssl
from datetime import UTC, datetime
from email.message import EmailMessage
from email.policy import SMTP as SMTP_POLICY
from email.utils import format_datetime
from typing import Any
from urllib.parse import unquote, urlsplit

from orchestrator.monitor.attempt import Attempt, SendError
from orchestrator.monitor.notice import Notice

log = logging.getLogger(__name__)

REPLY_CHARS = 120
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class _Client(smtplib.SMTP):
    """Over the attempt's connection; `context` is for TLS from the start."""

    def __init__(self, attempt: Attempt, context: ssl.SSLContext | None) -> None:
        self._attempt, self._context = attempt, context
        # its own way to a name asks name servers
        super().__init__(local_hostname=_ascii(socket.gethostname()), timeout=attempt.timeout_s)

    def _get_socket(self, host: str, port: int, timeout: Any) -> socket.socket:  # as smtplib.SMTP_SSL does
        raw = self._attempt.connect(host, port)
        return raw if self._context is None else self._context.wrap_socket(raw, server_hostname=host)


def send(url: str, sender: str, recipients: str, notice: Notice, attempt: Attempt) -> None:
    """Send one mail to all. Raises SendError and OSError."""
    try:
        parts = urlsplit(url)
        host, port, tls = parts.hostname, parts.port, parts.scheme.lower() == "smtps"
        if not host:
            raise ValueError
    except ValueError as error:
        raise SendError("smtp_url is not valid", again=False) from error
    addresses = [address.strip() for address in recipients.split(",") if address.strip()]
    message = compose(sender, addresses, notice)
    client = _Client(attempt, ssl.create_default_context() if tls else None)
    try:
        client.connect(host, port or (465 if tls else 25))
        # _host is the name that STARTTLS demands of the certificate; connect() leaves it as the constructor had it
        client._host = host  # type: ignore[attr-defined]
        client.ehlo_or_helo_if_needed()
        if not tls and client.has_extn("starttls"):
            client.starttls(context=ssl.create_default_context())
            client.ehlo()
            tls = True
        if parts.username:
            if not tls and host not in _LOOPBACK:
                raise SendError("the server offers no TLS, and without it the password is not sent", again=False)
            client.login(unquote(parts.username), unquote(parts.password or ""))
        refused = client.send_message(message, sender, addresses)
        with contextlib.suppress(smtplib.SMTPException, OSError):
            client.putcmd("quit")  # its answer is not waited for: the mail is sent
    except smtplib.SMTPException as error:
        raise _translated(error) from error
    finally:
        client.close()
    if refused:  # sent again, those who have got it would get it twice
        log.warning("%d of %d mail addresses were refused", len(refused), len(addresses))


def compose(sender: str, recipients: list[str], notice: Notice) -> EmailMessage:
    """The mail; its Message-ID is the same whenever it is sent again."""
    message = EmailMessage(policy=SMTP_POLICY)
    message["From"] = sender
    message["To"] = ", ".join(recipients)
    message["Subject"] = f"[TruthGPT] {''.join(c if c.isprintable() else ' ' for c in notice.title())}"
    message["Date"] = format_datetime(datetime.fromtimestamp(notice.at, UTC))
    message["Message-ID"] = f"<{_ascii(notice.id)}.{_ascii(notice.host)}@{_ascii(sender.rpartition('@')[2])}>"
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(f"{notice.title()}\n\n{notice.text()}\n", cte="quoted-printable")
    return message


def _ascii(text: str) -> str:
    """What may stand in a host name or a message's id."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-.") else "-" for c in text) or "localhost"


def _translated(error: smtplib.SMTPException) -> SendError:
    if isinstance(error, smtplib.SMTPAuthenticationError):  # its text may be what was sent
        return SendError(f"the server refuses the login with {error.smtp_code}", 400 <= error.smtp_code < 500)
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        code, text = next(iter(error.recipients.values()), (0, b""))
        return SendError(f"the server refuses every recipient with {code}{_shown(text)}", 400 <= code < 500)
    if isinstance(error, smtplib.SMTPResponseException):
        return SendError(f"the server answers {error.smtp_code}{_shown(error.smtp_error)}", error.smtp_code < 500)
    if isinstance(error, smtplib.SMTPServerDisconnected):
        return SendError("the server hung up", again=True)
    return SendError(f"the server cannot be talked to ({type(error).__name__})", again=False)


def _shown(text: bytes | str) -> str:
    shown = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    shown = "".join(c if c.isprintable() else " " for c in shown).strip()[:REPLY_CHARS]
    return f" ({shown})" if shown else ""
