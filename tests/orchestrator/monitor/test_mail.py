"""Alerts by mail, to a real mail server."""

from __future__ import annotations

import email.utils
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.monitor import mail, senders
from orchestrator.monitor.attempt import SendError, within
from orchestrator.monitor.notice import Notice
from orchestrator.settings import Settings
from tests.clock import awake
from tests.orchestrator.monitor.receivers import Certificate, certificate, mailing, mute, notice


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return certificate(tmp_path_factory.mktemp("certificate"))


def send(url: str, to: str = "ops@example.org", timeout_s: float = 30.0, message: Notice | None = None) -> None:
    settings = replace(Settings(), smtp_url=url, alert_email_to=to, alert_email_from="alerts@truthgpt.example")
    made = senders.configured(settings)["email"]
    within(timeout_s, lambda attempt: made(message or notice(), attempt))


def failed(url: str, **options: object) -> SendError:
    with pytest.raises(SendError) as caught:
        send(url, **options)  # type: ignore[arg-type]
    assert "s3cr3t" not in str(caught.value)
    return caught.value


def test_a_mail_arrives() -> None:
    """Every recipient gets one mail with the headers that mail must have, its text and its subject in UTF-8."""
    with mailing() as box:
        send(f"smtp://127.0.0.1:{box.port}", to="ops@example.org, ana@example.org",
             message=notice(summary="Más del 90% — lleno", labels={"model": "ñandú"}))  # fmt: skip
        ((sender, recipients, found),) = box.mails
    assert (sender, recipients) == ("alerts@truthgpt.example", ["ops@example.org", "ana@example.org"])
    assert found["To"] == "ops@example.org, ana@example.org" and found["From"] == "alerts@truthgpt.example"
    assert found["Subject"] == "[TruthGPT] CRITICAL TruthGPTDiskFull ñandú fires on node-1"
    assert email.utils.parsedate_to_datetime(found["Date"]).timestamp() == 1_795_717_800
    assert found["Message-ID"] == "<5f1e-firing.node-1@truthgpt.example>"
    assert found["Auto-Submitted"] == "auto-generated" and found.get_content_type() == "text/plain"
    assert found.get_content().replace("\r\n", "\n") == (
        "CRITICAL TruthGPTDiskFull ñandú fires on node-1\n\nMás del 90% — lleno\nValue 0.95, threshold 0.9.\n"
        "model: ñandú\nSince 2026-11-26 18:28:20 UTC.\nFirst: Free space there.\n"
        "More: docs/operations.md#truthgptdiskfull\n"
    )


@pytest.mark.parametrize("evil", ["x\r\nBcc: all@example.org", "x\nBcc: y", "x\r\n\r\nbody", "x\x00y", "x\u2028Bcc: y"])
def test_no_header_can_be_smuggled_in(evil: str) -> None:
    """A label or host with line breaks stays in the subject, and makes no header and no recipient."""
    with mailing() as box:
        send(f"smtp://127.0.0.1:{box.port}", message=notice(labels={"model": evil}, host=evil))
        ((_, recipients, found),) = box.mails
    assert recipients == ["ops@example.org"] and found["Bcc"] is None
    assert found["Subject"].startswith("[TruthGPT] CRITICAL TruthGPTDiskFull x")
    assert set(found.keys()) == {
        "From", "To", "Subject", "Date", "Message-ID", "Auto-Submitted", "MIME-Version", "Content-Type",
        "Content-Transfer-Encoding",
    }  # fmt: skip


def test_starttls_and_a_login(signed: Certificate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the server offers STARTTLS it is used, its certificate checked, and the login sent only then."""
    with mailing(tls=signed.server(), password=b"s3cr3t p@ss/:", needs_tls=True) as box:
        url = f"smtp://ana:s3cr3t%20p%40ss%2F%3A@localhost:{box.port}"
        error = failed(url)
        assert "certificate is not trusted" in str(error) and not error.again and box.logins == []
        monkeypatch.setenv("SSL_CERT_FILE", str(signed.pem))
        send(url)
    assert (len(box.mails), box.encrypted, box.logins) == (1, [True], [(b"ana", b"s3cr3t p@ss/:")])


def test_tls_from_the_start(signed: Certificate, monkeypatch: pytest.MonkeyPatch) -> None:
    """smtps:// talks TLS at once, and checks the certificate, too."""
    with mailing(smtps=signed.server()) as box:
        assert "certificate is not trusted" in str(failed(f"smtps://127.0.0.1:{box.port}"))
        monkeypatch.setenv("SSL_CERT_FILE", str(signed.pem))
        send(f"smtps://127.0.0.1:{box.port}")
    assert len(box.mails) == 1


def test_a_wrong_password_is_said_without_it() -> None:
    """The server's refusal is final, and the error has its code alone."""
    with mailing(password=b"right") as box:
        error = failed(f"smtp://ana:s3cr3t@127.0.0.1:{box.port}")
        assert not error.again and "535" in str(error)
        assert box.mails == []
        send(f"smtp://ana:right@127.0.0.1:{box.port}")
    assert len(box.mails) == 1 and box.logins[-1] == (b"ana", b"right")


def test_no_password_goes_over_the_net_in_the_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    """To another machine a login needs TLS; this one's own mail server may do without."""
    with mailing(password=b"s3cr3t") as box:
        real = socket.create_connection
        monkeypatch.setattr(socket, "create_connection", lambda to, **kw: real(("127.0.0.1", box.port), **kw))
        error = failed(f"smtp://ana:s3cr3t@mail.example:{box.port}")
    assert "no TLS" in str(error) and box.logins == [] and box.mails == []


@pytest.mark.parametrize(("answer", "again"), [("550 no such user", False), ("450 greylisted", True)])
def test_refused_recipients(answer: str, again: bool) -> None:
    """When all are refused the error says how, and 4xx is worth another attempt; the others get it where one is."""
    with mailing() as box:
        box.refuse["ops@example.org"] = answer
        error = failed(f"smtp://127.0.0.1:{box.port}")
        assert error.again == again and answer[4:] in str(error)
        send(f"smtp://127.0.0.1:{box.port}", to="ops@example.org,ana@example.org")
    assert [recipients for _, recipients, _ in box.mails] == [["ana@example.org"]]


def _greet(connection: socket.socket) -> None:
    connection.sendall(b"220 hello\r\n")


@pytest.mark.parametrize("talk", [lambda connection: None, _greet], ids=["silent", "only greets"])
@pytest.mark.parametrize("scheme", ["smtp", "smtps"])
def test_a_server_that_never_answers(talk: object, scheme: str) -> None:
    """It costs the time-out, wherever it stops."""
    with mute(talk) as port:  # type: ignore[arg-type]
        began = awake()
        error = failed(f"{scheme}://127.0.0.1:{port}", timeout_s=0.5)
        assert awake() - began < 5 and error.again


@pytest.mark.parametrize("url", ["smtp://h:99999", "smtp://[::1", "smtp:///x"])
def test_a_url_that_is_none(url: str) -> None:
    """What is no address of a server fails once, with the setting's name."""
    error = failed(url)
    assert not error.again and "smtp_url" in str(error)


def test_what_is_said_of_an_unknown_answer() -> None:
    """The text of a server's answer is one bounded line of printable characters."""
    assert mail._shown(b"no\r\n\x1b[31mway\xff" + b"x" * 500).isprintable()
    assert len(mail._shown(b"x" * 500)) < 140


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """The Message-ID and the greeting hold only what may stand there, whatever the host is called."""
    message = mail.compose("a@b.example", ["c@d.example"], notice(host="bad> host\n<x"))
    assert message["Message-ID"] == "<5f1e-firing.bad--host--x@b.example>"
