"""The examples of a documentation page, and a way to run one word for word."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_PARTS = re.compile(r"^(?:#+ (?P<heading>[^\n]+)|```(?P<kind>\w+)\n(?P<code>.*?)^```)$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Example:
    """A fenced block; `kind` is what stands behind the fence: console, python or javascript."""

    heading: str
    kind: str
    code: str

    def run(self, environ: Mapping[str, str], timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run it in a process of its own, with `environ` added to this one's environment."""
        if self.kind == "javascript":
            argv, given = ["node", "--input-type=module", "-"], self.code
        else:
            argv, given = ["bash", "-c", self.code] if self.kind == "console" else [sys.executable, "-c", self.code], ""
        return subprocess.run(
            argv, env={**os.environ, **environ}, input=given, capture_output=True, text=True, timeout=timeout_s
        )


def examples(page: Path) -> list[Example]:
    """Every fenced block of a page with a kind, in order, each with the heading that it stands below."""
    found, heading = [], ""
    for part in _PARTS.finditer(page.read_text(encoding="utf-8")):
        if part["heading"] is not None:
            heading = part["heading"]
        else:
            found.append(Example(heading, part["kind"], part["code"]))
    return found
