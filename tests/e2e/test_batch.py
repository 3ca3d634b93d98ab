"""A batch through the whole stack: killed in the middle, and run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

from .stack import COMMAND, Stack, wait_until

LINES = 96


def prompt(number: int) -> str:
    """Eight words that no other line has, so that no line is answered from the cache; after them comes "two"."""
    return " ".join("three" if digit == "1" else "two" for digit in f"{number:07b}") + " one"


def test_a_killed_batch_goes_on_where_it_was(stack: Stack, tmp_path: Path):
    """kill -9 twice in the middle, run again: every custom_id is exactly once in the output, with the right answer."""
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    requests = [
        {
            "custom_id": f"r{n}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": stack.model, "prompt": prompt(n), "max_tokens": 2 + n % 3},
        }
        for n in range(LINES)
    ]
    file.write_text("".join(json.dumps(request) + "\n" for request in requests))
    arguments = [*COMMAND, "batch", "run", str(file), "--output", str(out), "--json"]

    def done() -> int:
        return max(0, partial.read_bytes().count(b"\n") - 1) if partial.exists() else 0

    for share in (LINES // 4, LINES // 2):
        process = subprocess.Popen(arguments, env=stack.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            wait_until(lambda share=share: done() >= share, 30, f"{share} lines are done")
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
        assert process.returncode == -signal.SIGKILL and not out.exists()

    before = done()
    ended = stack.cli(*arguments[len(COMMAND) :])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads(ended.stdout)
    assert LINES // 2 <= before < LINES and report["skipped"] == before
    assert (report["total"], report["succeeded"], report["failed"]) == (LINES, LINES, 0)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["custom_id"] for row in found] == [request["custom_id"] for request in requests]
    for row, request in zip(found, requests, strict=True):
        body = row["response"]["body"]
        assert body["usage"]["completion_tokens"] == request["body"]["max_tokens"]
        assert body["choices"][0]["text"].split()[0] == "two"
    assert report["output_tokens"] == sum(request["body"]["max_tokens"] for request in requests)
    assert not partial.exists()
