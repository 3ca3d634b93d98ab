"""A job's process for tests: the real one, with a short lease, whose work lasts until a file is there.

    python -m tests.orchestrator.jobs.working JOB LEASE_S FOLDER

It notes `begun PID` in FOLDER/log, waits for FOLDER/go, and notes `done PID`.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from orchestrator.jobs.table import job
from orchestrator.ops.jobbodies import Task
from orchestrator.ops.jobrun import run
from orchestrator.ops.redis import connect_to
from orchestrator.settings import Settings


def main() -> None:
    name, lease_s, folder = sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])

    def note(text: str) -> None:
        fd = os.open(folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, f"{text} {os.getpid()}\n".encode())
        os.close(fd)

    def work(task: Task) -> str:
        note("begun")
        while not (folder / "go").exists():
            time.sleep(0.01)
        task.guard()
        note("done")
        return "worked"

    settings = Settings.load()
    assert settings.redis_url is not None
    with connect_to(settings.redis_url) as client:
        ended = run(settings, job(name), client, scheduled=True, do=work, lease_s=lease_s)
    sys.exit(getattr(ended, "result", "ok") != "ok")


if __name__ == "__main__":
    main()
