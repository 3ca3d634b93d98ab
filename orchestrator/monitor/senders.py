"""Who is told of alerts, as the settings say: a webhook, Slack or what takes the same, and mail. Blocking.

A sender is called with a message and an attempt (attempt.py), and raises SendError or whatever its libraries do.
What it imports stays out of memory until something is sent.
"""

from __future__ import annotations

import json
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

from orchestrator.monitor.attempt import Attempt, SendError, within
from orchestrator.monitor.notice import Notice, of_test
from orchestrator.settings import Settings

Sender = Callable[[Notice, Attempt], None]

NAMES = ("webhook", "slack", "email")
_AGAIN = {408, 425, 429}  # of 4xx; what is wrong with a message is wrong the next time, too
_SLACK_CHARS = 3000


@dataclass(frozen=True)
class Result:
    """What became of a test message."""

    sender: str
    ok: bool
    detail: str
    seconds: float


def configured(settings: Settings) -> dict[str, Sender]:
    """The senders by their names."""
    found: dict[str, Sender] = {}
    if settings.alert_webhook_url:
        found["webhook"] = _poster(settings.alert_webhook_url, lambda notice: notice.document())
    if settings.alert_slack_url:
        found["slack"] = _poster(settings.alert_slack_url, lambda notice: {"text": slack_text(notice)})
    if settings.alert_email_to and settings.smtp_url:
        recipients, sender, url = settings.alert_email_to, settings.alert_email_from, settings.smtp_url

        def mail(notice: Notice, attempt: Attempt) -> None:
            from orchestrator.monitor.mail import send

            send(url, sender, recipients, notice, attempt)

        found["email"] = mail
    return found


def test_senders(settings: Settings, only: str | None = None) -> list[Result]:
    """Send one test message by every sender, or by one, all at once: each result within `alert_timeout_s` seconds."""
    senders = {name: send for name, send in configured(settings).items() if only in (None, name)}
    notice = of_test(socket.gethostname(), time.time(), f"{secrets.token_hex(16)}-test")
    results: dict[str, Result] = {}

    def test(name: str, send: Sender) -> None:
        began, detail = time.monotonic(), ""
        try:
            within(settings.alert_timeout_s, lambda attempt: send(notice, attempt))
        except SendError as error:
            detail = str(error)
        results[name] = Result(name, not detail, detail or "sent", round(time.monotonic() - began, 3))

    threads = [threading.Thread(target=test, args=item, daemon=True) for item in senders.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[name] for name in senders]


def slack_text(notice: Notice) -> str:
    """A message in Slack's mrkdwn, its control characters escaped."""
    mark = {"firing": ":red_circle:", "resolved": ":large_green_circle:"}.get(notice.status, ":white_circle:")
    title, text = (
        part.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") for part in (notice.title(), notice.text())
    )
    return f"{mark} *{title}*\n{text}"[:_SLACK_CHARS]


def _poster(url: str, document: Callable[[Notice], object]) -> Sender:
    def post(notice: Notice, attempt: Attempt) -> None:
        _post(url, json.dumps(document(notice)).encode(), attempt)

    return post


def _post(url: str, body: bytes, attempt: Attempt) -> None:
    """POST JSON. Redirects are not followed, and nothing of the answer is read but its head."""
    from http.client import HTTPConnection, HTTPSConnection, InvalidURL

    try:
        parts = urlsplit(url)
        host, tls = parts.hostname, parts.scheme.lower() == "https"
        port = parts.port or (443 if tls else 80)
        if not host:
            raise ValueError
    except ValueError as error:
        raise SendError("its URL is not valid", again=False) from error
    connection: HTTPConnection
    if tls:
        import ssl

        context = ssl.create_default_context()
        connection = HTTPSConnection(host, port, context=context)
        raw = attempt.connect(host, port)
        connection.sock = context.wrap_socket(raw, server_hostname=host)
    else:
        connection = HTTPConnection(host, port)
        connection.sock = attempt.connect(host, port)
    target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~") + (f"?{_query(parts.query)}" if parts.query else "")
    headers = {"Content-Type": "application/json", "User-Agent": "truthgpt", "Connection": "close"}
    if parts.username is not None:
        headers["Authorization"] = _basic(unquote(parts.username), unquote(parts.password or ""))
    try:
        connection.request("POST", target, body, headers)
        with connection.getresponse() as answer:
            status, retry_after = answer.status, answer.headers.get("Retry-After")
    except InvalidURL as error:  # it quotes the URL
        raise SendError("its URL is not valid", again=False) from error
    finally:
        connection.close()
    if not 200 <= status < 300:
        raise _refused(status, retry_after)


def _query(text: str) -> str:
    return quote(text, safe="/%:@!$&'()*+,;=~?")


def _basic(user: str, password: str) -> str:
    from base64 import b64encode

    return f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}"


def _refused(status: int, retry_after: str | None) -> SendError:
    from http import HTTPStatus

    try:
        phrase = f" ({HTTPStatus(status).phrase})"
    except ValueError:
        phrase = ""
    if 300 <= status < 400:
        return SendError(f"it answers with a redirect, {status}, which is not followed: set where it leads", False)
    again = status >= 500 or status in _AGAIN
    return SendError(f"it answers {status}{phrase}", again, _seconds(retry_after) if again else None)


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After (RFC 9110): seconds, or a date."""
    from email.utils import parsedate_to_datetime

    text = (retry_after or "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None
