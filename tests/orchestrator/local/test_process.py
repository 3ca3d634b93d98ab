import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.local.process import Child, alive
from orchestrator.rotation import trim


async def start(code: str, log: Path) -> Child:
    return await Child.start("test", [sys.executable, "-c", code], os.environ, log)


async def until(check, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def test_stop_is_polite_then_kills_the_whole_group(tmp_path: Path):
    """A child that ignores SIGTERM is killed after its grace, and so is what it has started."""
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(p.pid, flush=True); time.sleep(60)"
    )
    child = await start(code, tmp_path / "log")
    await until(lambda: (tmp_path / "log").read_text().strip())
    grandchild = int((tmp_path / "log").read_text())
    await child.stop(0.3)
    assert child.returncode == -signal.SIGKILL
    await until(lambda: not alive(grandchild))


async def test_a_stopped_child_can_be_stopped_politely(tmp_path: Path):
    """A SIGSTOPped child still gets to handle SIGTERM."""
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "print('up', flush=True); time.sleep(60)"
    )
    child = await start(code, tmp_path / "log")
    await until(lambda: "up" in (tmp_path / "log").read_text())
    os.kill(child.pid, signal.SIGSTOP)
    await child.stop(5)
    assert child.returncode == 7


def test_children_end_when_their_supervisor_is_killed(tmp_path: Path):
    """After kill -9 of the parent the kernel ends the child."""
    code = (
        "import asyncio, os, sys, time; from pathlib import Path; from orchestrator.local.process import Child\n"
        "async def main():\n"
        "    argv = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "    c = await Child.start('x', argv, os.environ, Path(sys.argv[1]))\n"
        "    print(c.pid, flush=True); time.sleep(60)\n"
        "asyncio.run(main())"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        child = int(parent.stdout.readline())
        assert alive(child)
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 5
    while alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


async def test_the_telling_lines_of_a_log_are_found_after_a_rotation(tmp_path: Path):
    """last_lines prefers the lines that name an error, also where the log was emptied while the process ran."""
    log = tmp_path / "x.log"
    log.write_text("error: in an earlier process\n" * 10)
    code = (
        "import os, time\n"
        f"while os.path.getsize({str(log)!r}) > 100: time.sleep(0.01)\n"
        "print('all well'); print('error: no such thing'); print('bye')"
    )
    child = await start(code, log)
    assert trim(log, 100, 2)
    assert await child.wait() == 0
    assert child.last_lines() == "error: no such thing"


async def test_an_earlier_processes_errors_are_not_this_ones(tmp_path: Path):
    """last_lines tells of this process only: an error of yesterday's is no reason for today's."""
    log = tmp_path / "log"
    log.write_text("error: yesterday\n")
    child = await start("print('all well')", log)
    await child.wait()
    assert child.last_lines() == "all well"


async def test_a_program_that_does_not_exist_is_an_oserror(tmp_path: Path):
    """What cannot be executed raises at once."""
    with pytest.raises(OSError):
        await Child.start("x", ["/nonexistent/program"], {}, tmp_path / "log")
