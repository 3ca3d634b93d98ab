"""A job's process: started by the gateway's first process, and ended with it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys

from orchestrator.jobs.table import Job
from orchestrator.settings import Settings

log = logging.getLogger(__name__)

GRACE_S = 15.0  # beyond its deadline, at which it ends itself, and for its start and end
END_S = 3.0  # between SIGTERM and SIGKILL
KILLED_S = 2.0  # for the kernel to end what was killed; what hangs in a file system may never
SAID_S = 1.0  # for its last words to be read
JOB_END_S = END_S + KILLED_S + SAID_S  # from the cancellation of `run_job` to its end, at most
RAN_AND_FAILED = 3  # exit code of a scheduled run that failed, and has said so in the ledger: it is not due any more
KEPT_BYTES = 4096  # of what it says, the end
NICE = 10
_PR_SET_PDEATHSIG = 1


async def run_job(settings: Settings, job: Job) -> bool:
    """Run a job that is due to its end; whether it ran, or need not any more, and False where it is due as before.

    Cancelled, it ends the process, in JOB_END_S at most. Raises OSError.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "orchestrator.cli", "jobs", "run", job.name, "--scheduled", "--parent", str(os.getpid()),
        env={**os.environ, **settings.child_environ()}, start_new_session=True, stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said = asyncio.create_task(_end_of(process.stdout))
    try:
        async with asyncio.timeout(job.deadline_s + GRACE_S):
            code = await process.wait()
    except TimeoutError:
        log.error("the job %s does not end: it is killed", job.name)
        code = -signal.SIGKILL
    finally:
        await _ended(process)
        await asyncio.wait([said], timeout=SAID_S)
        said.cancel()
    text = said.result() if said.done() and not said.cancelled() else ""
    if code:
        log.error("the job %s ended with %s: %s", job.name, code, text or "it said nothing")
    elif text:
        log.info("the job %s: %s", job.name, text)
    return code in (0, RAN_AND_FAILED)


async def _ended(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), END_S)
    with contextlib.suppress(ProcessLookupError):  # what it has started ends with it
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), KILLED_S)
    if process.returncode is None:
        log.error("process %d was killed and does not end", process.pid)


async def _end_of(stream: asyncio.StreamReader | None) -> str:
    kept = b""
    while stream is not None and (data := await stream.read(KEPT_BYTES)):
        kept = (kept + data)[-KEPT_BYTES:]
    return " | ".join(line for line in kept.decode("utf-8", "replace").splitlines() if line.strip())


def become_child_of(parent: int) -> None:
    """In the job's process: gives way to requests, and is told to end when the process that has started it is gone."""
    os.nice(NICE)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it was gone before it could be asked for
        raise SystemExit(0)
