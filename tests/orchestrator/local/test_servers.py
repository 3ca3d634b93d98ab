"""One server of a stack, with a process that only stands for Triton's."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from orchestrator.local import modelset, places, tritonserver
from orchestrator.local.process import Child
from orchestrator.local.servers import Server
from orchestrator.settings import Settings
from tests.e2e.stack import free_ports
from tests.orchestrator.conftest import until


async def test_a_server_that_cannot_be_started_again_is_tried_again(tmp_path: Path) -> None:
    """On a full disk, say: the watch goes on, as it does for the other servers, and each attempt is told."""
    http, grpc, metrics = free_ports(3)
    ports = {"triton_http_port": http, "triton_grpc_port": grpc, "triton_metrics_port": metrics}
    settings = Settings.load({"home": tmp_path, "model_repository": tmp_path / "repository", **ports}, {})
    said = list[str]()

    async def check(name: str, number: int) -> None:
        return None

    modelset.write(tmp_path, {"m": 1})
    (tmp_path / "triton").write_text("in the way of the backends")
    (place,) = places.own(settings)
    server = Server(settings, tritonserver.find(), place, 1, said.append, check, lambda: None)
    server.child = await Child.start("triton", ["/bin/sleep", "60"], {}, tmp_path / "logs" / "triton.log")
    watching = asyncio.create_task(server.watch())
    try:
        server.kill()
        await until(lambda: sum("cannot be started again" in line for line in said) > 1, 20)
        assert not watching.done()
        (tmp_path / "triton").unlink()
        before = server.process.pid
        await until(lambda: server.process.pid != before, 20)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await server.stop()
        tritonserver.sweep(place.shm_prefix, kill=True)
        shutil.rmtree(tmp_path / "triton")
