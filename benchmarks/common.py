"""What benchmarks of one kind share: the machine in words, a Triton to measure, a line for each long step."""

from __future__ import annotations

import asyncio
import os
import platform
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import click
import psutil
from rich.console import Console

from orchestrator.local import tritonserver
from orchestrator.local.process import Child
from orchestrator.settings import Settings

RESULTS = Path(__file__).parent / "results"
console = Console(stderr=True)


def machine() -> dict[str, Any]:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    memory = round(psutil.virtual_memory().total / 2**30)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": memory,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


async def start_triton(repository: Path, home: Path, models: list[str]) -> tuple[Child, str]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    http, grpc, metrics = (listener.getsockname()[1] for listener in listeners)
    for listener in listeners:
        listener.close()
    settings = Settings.load(
        {
            "home": home,
            "model_repository": repository,
            "triton_http_port": http,
            "triton_grpc_port": grpc,
            "triton_metrics_port": metrics,
        }
    )
    installation = tritonserver.find()
    argv = tritonserver.command(installation, settings, models)
    child = await Child.start("triton", argv, tritonserver.environment(installation), home / "triton.log")
    url = f"http://127.0.0.1:{http}"
    deadline = time.monotonic() + 120
    async with aiohttp.ClientSession() as session:
        for model in models:
            while True:
                try:
                    async with session.get(f"{url}/v2/models/{model}/ready") as answer:
                        if answer.status == 200:
                            break
                except aiohttp.ClientError:
                    pass
                if time.monotonic() > deadline or child.returncode is not None:
                    await child.kill()
                    raise click.ClickException(f"Triton did not load {model}: {child.last_lines()}")
                await asyncio.sleep(0.2)
    return child, url


def step(what: str, do: Callable[[], object]) -> None:
    began = time.monotonic()
    with console.status(what):
        do()
    console.print(f"{what}: {time.monotonic() - began:.1f} s")
