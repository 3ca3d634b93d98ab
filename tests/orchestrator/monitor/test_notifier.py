"""Each sender has its own thread: what hangs, fails or is flooded delays nobody else."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from orchestrator.monitor.attempt import Attempt, SendError
from orchestrator.monitor.notice import Notice
from orchestrator.monitor.notifier import QUEUED_MAX, Notifier
from orchestrator.settings import Settings
from tests.clock import awake
from tests.e2e.stack import free_ports, wait_until
from tests.orchestrator.monitor.receivers import mute, notice, receiving

SETTINGS = replace(Settings(), alert_timeout_s=20.0, alert_retries=2)


def outcomes(notifier: Notifier) -> list[tuple[str, str, str]]:
    """Sender, message's id and outcome, as they come in."""
    heard: list[tuple[str, str, str]] = []
    notifier.on_done = lambda sender, notice, outcome: heard.append((sender, notice.id, outcome))
    return heard


@pytest.mark.parametrize(
    ("answers", "outcome", "requests"),
    [((500, 200), "ok", 2), ((500,), "error", 3), ((400,), "error", 1), ((200,), "ok", 1)],
)
def test_attempts(answers: tuple[int, ...], outcome: str, requests: int) -> None:
    """A server that fails is asked again, `alert_retries` times at most; one that refuses is not."""
    with receiving(*answers) as receiver:
        notifier = Notifier(replace(SETTINGS, alert_webhook_url=receiver.url), pause_s=0.01)
        heard = outcomes(notifier)
        notifier.tell(notice(), ["webhook"])
        wait_until(lambda: heard, 20, "the message is done with")
        assert heard == [("webhook", "5f1e-firing", outcome)] and len(receiver.requests) == requests
        assert notifier.counts() == {("webhook", "ok"): outcome == "ok", ("webhook", "error"): outcome == "error"}
        assert notifier.failing() == (["webhook"] if outcome == "error" else [])
        notifier.close()


def test_pauses_grow_and_a_server_may_ask_for_more() -> None:
    """The pauses double, less up to half of it by chance; Retry-After makes one longer, never shorter."""
    times: list[float] = []

    def send(notice: Notice, attempt: Attempt) -> None:
        times.append(time.monotonic())
        raise SendError("busy", again=True, after_s=1.5 if len(times) == 3 else 0.0)

    notifier = Notifier(replace(SETTINGS, alert_retries=3), {"webhook": send}, pause_s=0.4)
    heard = outcomes(notifier)
    notifier.tell(notice(), ["webhook"])
    wait_until(lambda: heard, 30, "it gives up")
    notifier.close()
    first, second, third = (later - sooner for sooner, later in zip(times, times[1:], strict=False))
    assert first >= 0.2 and second >= 0.4 and third >= 1.5


def test_a_sender_that_hangs_delays_no_other(caplog: pytest.LogCaptureFixture) -> None:
    """While Slack accepts and never answers, the webhook gets all its messages, and `tell` returns at once."""
    caplog.set_level(logging.DEBUG)
    with receiving() as receiver, mute() as port:
        slack = f"http://127.0.0.1:{port}/s3cr3t"
        settings = replace(
            SETTINGS, alert_webhook_url=receiver.url, alert_slack_url=slack, alert_timeout_s=1.0, alert_retries=0
        )
        notifier = Notifier(settings, pause_s=0.01)
        heard = outcomes(notifier)
        began = awake()
        for number in range(20):
            notifier.tell(notice(id=f"{number}"), notifier.names)
        assert awake() - began < 1
        wait_until(lambda: len(receiver.requests) == 20, 20, "the webhook has all")
        assert [request.json["id"] for request in receiver.requests] == [f"{number}" for number in range(20)]
        assert sum(sender == "slack" for sender, _, _ in heard) <= 3 + int(awake() - began)
        wait_until(lambda: ("slack", "0", "error") in heard, 20, "Slack's first one is given up")
        notifier.close()
    assert "s3cr3t" not in caplog.text and "no answer within 1 s" in caplog.text


def test_a_flood_drops_the_oldest() -> None:
    """A queue is bounded: the oldest messages count as failed, the newest are sent."""
    go_on, begun = threading.Event(), threading.Event()
    sent: list[str] = []

    def send(notice: Notice, attempt: Attempt) -> None:
        begun.set()
        go_on.wait()
        sent.append(notice.id)

    notifier = Notifier(SETTINGS, {"webhook": send})
    heard = outcomes(notifier)
    notifier.tell(notice(id="0"), ["webhook"])
    assert begun.wait(20)
    for number in range(1, QUEUED_MAX + 6):
        notifier.tell(notice(id=f"{number}"), ["webhook"])
    assert heard == [("webhook", f"{number}", "error") for number in range(1, 6)]
    go_on.set()
    wait_until(lambda: len(sent) == QUEUED_MAX + 1, 20, "the others are sent")
    assert sent == ["0", *(f"{number}" for number in range(6, QUEUED_MAX + 6))]
    wait_until(lambda: len(heard) == QUEUED_MAX + 6, 20, "each was told of once")
    notifier.close()


def test_a_fault_of_ours_is_one_message() -> None:
    """An exception that nobody thought of fails its message, and the thread goes on."""
    calls: list[str] = []

    def send(notice: Notice, attempt: Attempt) -> None:
        calls.append(notice.id)
        if notice.id == "1":
            raise KeyError("s3cr3t")

    notifier = Notifier(SETTINGS, {"webhook": send})
    heard = outcomes(notifier)
    for number in ("1", "2"):
        notifier.tell(notice(id=number), ["webhook"])
    wait_until(lambda: len(heard) == 2, 20, "both are done with")
    notifier.close()
    assert heard == [("webhook", "1", "error"), ("webhook", "2", "ok")] and calls == ["1", "2"]


_PROGRAM = """
import sys, time
from dataclasses import replace
from orchestrator.monitor.notifier import Notifier
from orchestrator.settings import Settings
from tests.orchestrator.monitor.receivers import notice
url, mail = sys.argv[1:]
settings = replace(Settings(), alert_webhook_url=url, smtp_url=mail, alert_email_to="a@b.example", alert_timeout_s=60.0)
notifier = Notifier(settings)
notifier.tell(notice(), notifier.names)
time.sleep(0.5)
print("ending", flush=True)
"""


def test_hanging_senders_do_not_hold_up_the_end_of_the_process() -> None:
    """A process whose senders hang for a minute ends at once all the same."""
    with mute() as port:
        argv = [sys.executable, "-c", _PROGRAM, f"http://127.0.0.1:{port}/", f"smtp://127.0.0.1:{port}"]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "ending\n"
            began = awake()
            assert process.wait(50) == 0
            assert awake() - began < 10


def test_closing_ends_the_threads() -> None:
    """Whatever they wait for, a pause between attempts included, the senders' threads end."""
    url = f"http://127.0.0.1:{free_ports(1)[0]}/"
    notifier = Notifier(replace(SETTINGS, alert_webhook_url=url, alert_slack_url=url), pause_s=60.0)
    notifier.tell(notice(), notifier.names)
    names = {"alerts by webhook", "alerts by slack"}
    assert names <= {thread.name for thread in threading.enumerate()}
    notifier.close()
    wait_until(lambda: not names & {thread.name for thread in threading.enumerate()}, 20, "they have ended")


def test_what_sends_is_not_loaded_before_it_is_needed() -> None:
    """The watcher's modules bring none of the libraries that send into the gateway's first process."""
    heavy = ("smtplib", "http.client", "email.message", "aiohttp", "redis")
    program = f"import sys, orchestrator.monitor.watcher; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
