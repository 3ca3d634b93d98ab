"""Where the Triton servers of a stack are: every port that it listens on, by its setting and by whose it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.local.tritonserver import PORT_STEP, numbered, shm_prefix
from orchestrator.settings import Settings

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Place:
    """One server. `name` is that of its process, `http` a URL, `grpc` and `metrics` HOST:PORT."""

    name: str
    http: str
    grpc: str
    metrics: str
    shm_prefix: str

    @property
    def log(self) -> str:
        """The name of its log in home/logs."""
        return f"{self.name}.log"


@dataclass(frozen=True)
class Port:
    """A port that a stack listens on. `server` is the name of the Triton server, empty for the gateway's."""

    setting: str
    host: str
    number: int
    server: str = ""

    def __str__(self) -> str:
        return f"{self.setting} of {self.server}" if self.server else self.setting


def own(settings: Settings) -> list[Place]:
    """The servers that `truthgpt up` starts by these settings; none where others are to be used."""
    places = []
    for number in range(1, count(settings) + 1):
        step = PORT_STEP * (number - 1)
        places.append(
            Place(
                name=numbered("triton", number),
                http=f"http://{LOOPBACK}:{settings.triton_http_port + step}",
                grpc=f"{LOOPBACK}:{settings.triton_grpc_port + step}",
                metrics=f"{LOOPBACK}:{settings.triton_metrics_port + step}",
                shm_prefix=shm_prefix(settings.home, number),
            )
        )
    return places


def count(settings: Settings) -> int:
    """How many servers `truthgpt up` starts."""
    return 0 if settings.triton_urls else settings.tritons


def ports(settings: Settings) -> Iterator[Port]:
    """Every port that the stack of these settings listens on, the gateway's first."""
    yield Port("http_port", settings.host, settings.http_port)
    yield Port("ops_port", settings.ops_host, settings.ops_port)
    if settings.grpc:
        yield Port("grpc_port", settings.host, settings.grpc_port)
    for number in range(1, count(settings) + 1):
        for name in ("triton_http_port", "triton_grpc_port", "triton_metrics_port"):
            port = getattr(settings, name) + PORT_STEP * (number - 1)
            yield Port(name, LOOPBACK, port, numbered("triton", number))
