"""Stands for a supervisor in tests of `down` and `doctor`: holds the home's lock, starts a child, writes a state file.

    python -m tests.orchestrator.supervisor_stand_in HOME stop|stubborn|starting

`stop` ends on SIGTERM with its child, `stubborn` ignores SIGTERM, `starting` has not written its state yet.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from orchestrator.local import state
from tests.orchestrator.gateway import write_state


def main() -> None:
    home, kind = Path(sys.argv[1]), sys.argv[2]
    with state.lock(home):
        child = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(600)", str(home)], start_new_session=True
        )

        def stop(*_: object) -> None:
            child.kill()
            child.wait()
            state.clear(home)
            sys.exit(0)

        signal.signal(signal.SIGTERM, signal.SIG_IGN if kind == "stubborn" else stop)
        if kind != "starting":
            write_state(home, "http://127.0.0.1:1", os.getpid(), processes={"triton": child.pid})
        print(child.pid, flush=True)
        while True:
            time.sleep(1)


if __name__ == "__main__":
    main()
