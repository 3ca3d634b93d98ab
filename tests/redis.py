"""A real redis-server for tests: on a Unix socket in a folder of its own; it can be stalled, killed and restarted.

`with RealRedis() as server:` starts it in some 20 ms and leaves neither process nor file behind.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

from orchestrator.local.redisserver import binary

START_S = 10.0


class RealRedis:
    """One server. `options` are redis-server's own, such as "--requirepass", "x" or "--appendonly", "yes".

    Nothing is written to disk unless they ask for it, so a restarted server is empty.
    """

    def __init__(self, *options: str) -> None:
        self._options = options
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RealRedis:
        self._folder = Path(tempfile.mkdtemp(prefix="redis-"))  # short: a socket's path is bounded
        try:
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        if self._folder is not None:
            shutil.rmtree(self._folder)
            self._folder = None

    @property
    def path(self) -> Path:
        """The server's Unix socket."""
        assert self._folder is not None, "not inside its with statement"
        return self._folder / "redis.sock"

    @property
    def url(self) -> str:
        return f"unix://{self.path}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "not running"
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it accepts commands. Raises AssertionError when it ends or takes too long."""
        assert self._process is None, "already running"
        # A test run that is killed takes its servers along, where the system has a command for that.
        leash = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        argv = [
            *leash, str(binary()), "--port", "0", "--unixsocket", str(self.path), "--dir", str(self.path.parent),
            "--save", "", *self._options,
        ]  # fmt: skip
        with (self.path.parent / "log").open("ab") as log:
            self._process = subprocess.Popen(argv, stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while not self._answers():
            words = (self.path.parent / "log").read_text()
            assert self._process.poll() is None, f"redis-server ended: {words}"
            assert time.monotonic() < deadline, f"redis-server did not answer: {words}"
            time.sleep(0.003)

    def stop_answering(self) -> None:
        """Stall it: connections stay open and nothing is answered any more."""
        self._signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)  # a signal is delivered some time after it was sent

    def go_on(self) -> None:
        """End the stall."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once, as a crash would; a second time does nothing."""
        if self._process is not None:
            self._process.kill()  # also ends a stalled process
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """Kill it and start it again under the same URL."""
        self.kill()
        self.start()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "not running"
        self._process.send_signal(number)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(self.path))
                probe.sendall(b"PING\r\n")
                return probe.recv(64)[:5] in (b"+PONG", b"-NOAU")  # a server with a password answers as well
            except OSError:  # not listening yet
                return False
