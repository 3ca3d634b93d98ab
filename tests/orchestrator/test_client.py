"""The command line's HTTP client, against a real socket."""

from __future__ import annotations

import socket
import threading

import pytest

from orchestrator.client import GatewayClient, GatewayError
from tests.clock import awake
from tests.orchestrator.gateway import ANSWER, USAGE, Gateway, chunk


@pytest.fixture
def gateway():
    with Gateway() as running:
        yield running


def failure(gateway: Gateway, timeout_s: float = 5.0) -> GatewayError:
    """The error that a stream ends with."""
    with pytest.raises(GatewayError) as caught:
        list(GatewayClient(gateway.url, timeout_s).stream("/v1/chat/completions", {"model": "demo"}))
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("whole", [True, False])
def test_a_stream_gives_its_pieces(gateway: Gateway, whole: bool) -> None:
    """Text, reason and usage arrive, also when every byte comes alone and characters are split."""
    gateway.whole_event_a_chunk = whole
    pieces = list(GatewayClient(gateway.url).stream("/v1/chat/completions", {"model": "demo"}))
    assert "".join(piece.text for piece in pieces) == "¡Hola, mundo!"
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["stop"]
    assert pieces[-1].usage == (3, 2)
    assert gateway.asked[0][1] == {"model": "demo", "stream": True, "stream_options": {"include_usage": True}}


def test_an_error_inside_the_stream_is_raised(gateway: Gateway) -> None:
    """An in-band error event ends the iteration with its message, after the text before it."""
    gateway.events = [chunk("one"), b'data: {"error": {"message": "the model died", "type": "x"}}\n\n']
    assert "the model died" in str(failure(gateway))


@pytest.mark.parametrize("cut_off", [True, False])
@pytest.mark.parametrize("events", [ANSWER[:2], ANSWER[:-1], []])
def test_a_stream_without_its_end_is_an_error(gateway: Gateway, events: list[bytes], cut_off: bool) -> None:
    """What ends before [DONE], by a lost connection or in good order, is never taken for a complete answer."""
    gateway.events, gateway.cut_off = events, cut_off
    assert "ended before it was complete" in str(failure(gateway))


@pytest.mark.parametrize(
    "event", [b"data: nonsense\n\n", b"data: []\n\n", b'data: {"choices": [{}]}\n\n', b'data: {"x": 1}\n\n']
)
def test_nonsense_in_a_stream_is_told(gateway: Gateway, event: bytes) -> None:
    """Events that are no chunks of OpenAI's API are an error of their own, not a traceback."""
    gateway.events = [event, USAGE]
    assert "makes no sense" in str(failure(gateway))


@pytest.mark.parametrize("status", [400, 404, 413, 429, 500, 503, 504])
def test_a_refusal_carries_the_gateways_words(gateway: Gateway, status: int) -> None:
    """The message of an error body is shown, its status kept, and Retry-After becomes part of the hint."""
    gateway.status, gateway.body, gateway.headers = status, b'{"error": {"message": "not now"}}', {"retry-after": "7"}
    error = failure(gateway)
    assert (str(error), error.status) == ("not now", status)
    assert ("7 s" in error.hint) == (status == 429)


@pytest.mark.parametrize("body", [b"", b"<html>", b'{"error": "plain"}', b"[1]"])
def test_a_refusal_in_another_form_still_names_its_status(gateway: Gateway, body: bytes) -> None:
    """A proxy's page or KServe's error form gives a sentence too."""
    gateway.status, gateway.body = 502, body
    assert str(failure(gateway)) in ("plain", f"{gateway.url} answered with status 502")


def test_the_timeout_bounds_the_whole_stream(gateway: Gateway) -> None:
    """A stream that goes on sending is cut at the deadline, not kept alive by every byte."""
    gateway.events, gateway.pause_s = [chunk("x")] * 100 + ANSWER, 0.05
    began = awake()
    assert "did not answer in time" in str(failure(gateway, timeout_s=0.4))
    assert awake() - began < 2.0


def test_a_silent_server_is_left_at_the_deadline() -> None:
    """A server that accepts and says nothing costs no more than the timeout."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = GatewayClient(f"http://127.0.0.1:{server.getsockname()[1]}", 0.2)
        with pytest.raises(GatewayError, match="did not answer in time"):
            client.health()
        assert client.live() is False


def test_nobody_there_is_told() -> None:
    """A refused connection names the URL and points to status."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(GatewayError, match="Connection refused") as caught:
        GatewayClient(f"127.0.0.1:{port}").models()
    assert caught.value.status is None and "truthgpt status" in caught.value.hint


def test_a_server_of_another_kind_is_told() -> None:
    """What does not speak HTTP is an error that says so."""

    def answer(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"+PONG\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, args=(server,))
        thread.start()
        with pytest.raises(GatewayError, match="makes no sense"):
            GatewayClient(f"http://127.0.0.1:{server.getsockname()[1]}").health()
        thread.join()


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://a:b", "http://[::1", "http://a:99999", ""])
def test_what_is_no_url_is_refused(url: str) -> None:
    """A wrong URL is an error with an example of a right one."""
    with pytest.raises(GatewayError) as caught:
        GatewayClient(url)
    assert "http://127.0.0.1:8080" in caught.value.hint


def test_a_path_in_the_url_is_kept(gateway: Gateway) -> None:
    """A gateway behind a proxy's path is asked below that path."""
    list(GatewayClient(f"{gateway.url}/proxy/").stream("/v1/completions", {}))
    assert gateway.asked[0][0] == "/proxy/v1/completions"
    assert GatewayClient(gateway.url).live() and GatewayClient(gateway.url).models() == ["demo"]
