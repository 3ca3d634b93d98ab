"""Models from the Hub: the real client against a small server that speaks the Hub's protocol."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def _hub(models: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serve folders as models; yields the server's address and a growing list of the files that were fetched."""
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0].replace("/main", f"/{COMMIT}")
            for name, folder in models.items():
                files = sorted(folder.iterdir())
                if path in (f"/api/models/{name}", f"/api/models/{name}/revision/{COMMIT}"):
                    siblings = [{"rfilename": file.name} for file in files]
                    return self._json({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings})
                if path == f"/api/models/{name}/tree/{COMMIT}":
                    return self._json([_entry(file) for file in files])
                if path.startswith(f"/{name}/resolve/{COMMIT}/") and (folder / path.rsplit("/", 1)[1]).is_file():
                    return self._file(folder / path.rsplit("/", 1)[1])
                if path == f"/api/models/{name}/revision/none":
                    return self._missing("RevisionNotFound")
            return self._missing("RepoNotFound")

        def _json(self, document: Any) -> None:
            self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

        def _file(self, path: Path) -> None:
            content = path.read_bytes()
            if self.command == "GET":
                fetched.append(path.name)
            etag = hashlib.sha1(content, usedforsecurity=False).hexdigest()
            self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

        def _missing(self, code: str) -> None:
            self._send(404, b"{}", {"X-Error-Code": code})

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Requests are not logged: standard error is under test."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", fetched
        finally:
            server.shutdown()
            thread.join()


def _entry(file: Path) -> dict[str, Any]:
    digest = hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()
    return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": digest}


_RESOLVE = """
import json, sys
from export.errors import ExportError
from export.source import Trust, resolve
for model, revision, *trust in json.loads(sys.argv[1]):
    try:
        source = resolve(model, revision, trust=Trust(*trust))
        print(json.dumps([source.id, source.revision, sorted(path.name for path in source.path.iterdir())]))
    except ExportError as error:
        print(json.dumps(str(error)))
"""


def _resolve(home: Path, endpoint: str, *models: tuple[str | bool | None, ...]) -> list[Any]:
    environment = os.environ | {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", _RESOLVE, json.dumps(models)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_model_from_the_hub(gpt2: Path, tmp_path: Path) -> None:
    """A Hub model is fetched once with its commit; what would be refused is refused before its weights are fetched."""
    pickled, encoder = tmp_path / "pickled", tmp_path / "encoder"
    for folder, weights in ((pickled, "pytorch_model.bin"), (encoder, "model.safetensors")):
        folder.mkdir()
        (folder / "config.json").write_bytes((gpt2 / "config.json").read_bytes())
        (folder / weights).write_bytes(b"weights")
    (encoder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
    home = tmp_path / "home"
    with _hub({"org/tiny": gpt2, "org/pickled": pickled, "org/encoder": encoder}) as (endpoint, fetched):
        asked = (
            ("org/tiny", None),
            ("org/encoder", None),
            ("org/pickled", None),
            ("org/unknown", None),
            ("org/tiny", "none"),
        )
        found, refused, unsafe, unknown, revision = _resolve(home, endpoint, *asked)
        assert "pytorch_model.bin" not in fetched
        # Allowed by name, and only then, pickles and Python files are fetched.
        (pickled / "modeling_own.py").write_text("raise SystemExit(1)")
        allowed, both = _resolve(
            home, endpoint, ("org/pickled", None, True, False), ("org/pickled", None, True, True)
        )
        assert allowed[2] == ["config.json", "pytorch_model.bin"]
        assert both[2] == ["config.json", "modeling_own.py", "pytorch_model.bin"]
        assert fetched.count("pytorch_model.bin") == 1
    assert found[:2] == ["org/tiny", COMMIT]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(found[2])
    assert refused == "org/encoder is not a causal language model (BertForMaskedLM)."
    assert unsafe == "org/pickled has no safetensors weights on the Hub."
    assert unknown == "There is no folder org/unknown and no such public model on the Hub."
    assert revision == "org/tiny has no revision none."
    assert fetched.count("model.safetensors") == 1
    # The server is gone: the cache still answers, and what it does not hold gets a sentence.
    cached, absent = _resolve(home, endpoint, ("org/tiny", None), ("org/other", None))
    assert cached[:2] == ["org/tiny", COMMIT]
    assert absent == "org/other is neither a folder nor in the Hub's cache here, and the Hub cannot be reached."
