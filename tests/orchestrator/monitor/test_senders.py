"""The webhook and Slack against real HTTP servers, good and bad."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.monitor import senders
from orchestrator.monitor.attempt import AFTER_MAX_S, SendError, within
from orchestrator.monitor.notice import Notice
from orchestrator.settings import Settings
from tests.clock import awake
from tests.e2e.stack import free_ports
from tests.orchestrator.monitor.receivers import certificate, drip, mute, notice, receiving


def send(url: str, sender: str = "webhook", timeout_s: float = 20.0, message: Notice | None = None) -> None:
    """One attempt."""
    settings = replace(Settings(), **{f"alert_{sender}_url": url})
    made = senders.configured(settings)[sender]
    within(timeout_s, lambda attempt: made(message or notice(), attempt))


def failed(url: str, **options: float) -> SendError:
    with pytest.raises(SendError) as caught:
        send(url, **options)  # type: ignore[arg-type]
    assert "s3cr3t" not in str(caught.value)
    return caught.value


def test_the_webhook_gets_the_document() -> None:
    """The document of docs/alerts.md arrives as JSON, byte for byte, at the path and query of the URL."""
    with receiving() as receiver:
        send(receiver.url)
        (request,) = receiver.requests
    assert request.path == "/hooks/s3cr3t-path?token=s3cr3t-query"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["host"] == f"127.0.0.1:{receiver.port}"
    expected = {
        "version": 1, "id": "5f1e-firing", "status": "firing", "repeated": False,
        "time": "2026-11-26T18:30:00.500Z", "instance": "node-1",
        "alert": {
            "name": "TruthGPTDiskFull", "severity": "critical", "labels": {"folder": "home"},
            "summary": "95.0% of the disk of the folder home is in use; the threshold is 90%.", "value": 0.95,
            "threshold": 0.9, "since": "2026-11-26T18:28:20.000Z", "resolved": None, "advice": "Free space there.",
            "runbook": "docs/operations.md#truthgptdiskfull",
        },
    }  # fmt: skip
    assert request.body == json.dumps(expected).encode()


def test_slack_gets_a_text() -> None:
    """One `text` with the name, severity, what, value, threshold, since, host, what to do and the page; escaped."""
    with receiving() as receiver:
        send(receiver.url, "slack", message=notice(summary="<!channel> & más"))
        send(receiver.url, "slack", message=notice("resolved"))
        one, other = (request.json for request in receiver.requests)
    assert one == {
        "text": ":red_circle: *CRITICAL TruthGPTDiskFull home fires on node-1*\n"
        "&lt;!channel&gt; &amp; más\nValue 0.95, threshold 0.9.\nfolder: home\nSince 2026-11-26 18:28:20 UTC.\n"
        "First: Free space there.\nMore: docs/operations.md#truthgptdiskfull"
    }
    assert "is resolved" in other["text"] and "It was: 95.0% of" in other["text"] and "Value" not in other["text"]
    assert "until 2026-11-26 18:30:00 UTC" in other["text"]


def test_a_login_in_the_url_is_sent_as_one() -> None:
    """User and password of the URL become basic authentication, and are not in the request's path or host."""
    with receiving() as receiver:
        send(f"http://ana:p%40ss@127.0.0.1:{receiver.port}/h")
        (request,) = receiver.requests
    assert (request.headers["authorization"], request.path) == ("Basic YW5hOnBAc3M=", "/h")


@pytest.mark.parametrize(
    ("status", "again"), [(400, False), (401, False), (404, False), (408, True), (429, True), (500, True), (503, True)]
)
def test_which_answers_are_worth_another_attempt(status: int, again: bool) -> None:
    """What is wrong with the request stays wrong; a server that is busy or broken may come round."""
    with receiving(status) as receiver:
        error = failed(receiver.url)
    assert error.again == again and str(status) in str(error)


@pytest.mark.parametrize(
    ("value", "expected"), [("7", 7.0), ("0", 0.0), ("999999999999", AFTER_MAX_S), ("soon", None), ("", None)]
)
def test_retry_after_is_heard_within_bounds(value: str, expected: float | None) -> None:
    """Seconds are taken up to a minute, and what is no time is passed over."""
    with receiving((429, {"Retry-After": value})) as receiver:
        assert failed(receiver.url).after_s == expected


def test_retry_after_may_be_a_date() -> None:
    """A date is so many seconds from now; one in the past none."""
    soon, past = (time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + s)) for s in (30, -30))
    with receiving((503, {"Retry-After": soon}), (503, {"Retry-After": past})) as receiver:
        after_s = failed(receiver.url).after_s
        assert after_s is not None and 10 < after_s <= 30
        assert failed(receiver.url).after_s == 0.0


def test_a_redirect_is_not_followed() -> None:
    """A server cannot pass an alert on to another host."""
    with receiving() as other, receiving((307, {"Location": other.url})) as receiver:
        error = failed(receiver.url)
    assert other.requests == [] and not error.again and "redirect" in str(error)


@pytest.mark.parametrize("talk", [lambda connection: None, drip], ids=["silent", "drips"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_an_attempt_has_a_deadline_altogether(talk: Callable[..., None], scheme: str) -> None:
    """A server that accepts and says nothing, or a byte at a time without end, costs the time-out and no more."""
    with mute(talk) as port:
        began = awake()
        error = failed(f"{scheme}://127.0.0.1:{port}/s3cr3t", timeout_s=0.5)
        assert awake() - began < 5
    if talk is drip and scheme == "https":  # it was told something, and that was no TLS
        assert "TLS" in str(error) or "no answer" in str(error)
    else:
        assert "no answer within 0.5 s" in str(error)
    assert error.again


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}/s3cr3t", "https://ana:s3cr3t@127.0.0.1:{port}/s3cr3t"])
def test_a_refused_connection_is_worth_another_attempt(url: str) -> None:
    """Nobody listens: the error says so, without the URL."""
    error = failed(url.format(port=free_ports(1)[0]))
    assert error.again and "refused" in str(error).lower()


@pytest.mark.parametrize(
    "url", ["http://h:99999/s3cr3t", "http://[::1/s3cr3t", "http:///s3cr3t", "https://s3cr3t.invalid\x01/"]
)
def test_a_url_that_is_none_is_said_without_it(url: str) -> None:
    """What cannot be used fails once, and its text is not shown."""
    assert not failed(url).again


def test_certificates_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that nobody has vouched for is refused, and nothing is sent; with SSL_CERT_FILE it is trusted."""
    made = certificate(tmp_path)
    with receiving(tls=made.server()) as receiver:
        error = failed(receiver.url)
        assert not error.again and "certificate is not trusted" in str(error) and receiver.requests == []
        monkeypatch.setenv("SSL_CERT_FILE", str(made.pem))
        send(receiver.url)
        assert [request.path for request in receiver.requests] == ["/hooks/s3cr3t-path?token=s3cr3t-query"]


def test_nothing_is_configured_by_default() -> None:
    """Without settings there is no sender, and testing them tests none."""
    assert senders.configured(Settings()) == {} and senders.test_senders(Settings()) == []


def test_testing_the_senders(caplog: pytest.LogCaptureFixture) -> None:
    """Each gets one real message that says that it is a test, all at once; each result has its time and its reason."""
    caplog.set_level(logging.DEBUG)
    with receiving() as good, mute() as port:
        slack = f"http://127.0.0.1:{port}/s3cr3t"
        settings = replace(
            Settings(), alert_webhook_url=good.url, alert_slack_url=slack, alert_timeout_s=1.0, alert_retries=5
        )
        began = awake()
        one, other = senders.test_senders(settings)
        assert awake() - began < 8
        assert (one.sender, one.ok, one.detail) == ("webhook", True, "sent")
        assert (other.sender, other.ok, other.detail) == ("slack", False, "no answer within 1 s")
        assert other.seconds >= 1.0
        assert good.seen == [("test", "TruthGPTTest")]
        (only,) = senders.test_senders(settings, "webhook")
        assert only.ok and len(good.requests) == 2
    assert "s3cr3t" not in caplog.text + repr([one, other])
