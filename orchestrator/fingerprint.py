"""Keyed hashes for the audit log: equal things can be found equal, and nobody without the key can guess what they were.

A hash is HMAC-SHA-256 (RFC 2104), of which the first 128 bits are kept, as 32 hexadecimal digits. One key is kept; from
it come three, so that no hash of one use means anything in another:

    use      key                                  what is hashed
    input    HMAC(key, "truthgpt audit input")    a request's prompt, in the form below
    caller   HMAC(key, "truthgpt audit caller")   a caller's id: a key's id, or `ip-<address>`
    chain    HMAC(key, "truthgpt audit chain")    a line of the audit log (auditlog.py)

A prompt is hashed as its client sent it, before sanitising, in UTF-8 behind a word that says what it is:

    text\\n       the text
    messages\\n   JSON, no white space, nothing escaped that need not be: [["user","Hola"],["assistant","¿Sí?"]]
    tokens\\n     JSON, no white space: [15,7,20]
    texts\\n      JSON as above, of several texts: ["one","two"]
    tensors\\n    for each tensor, in order, each of name, datatype, shape (as JSON), data and every element of BYTES:
                 its length in bytes in decimal, a colon, and itself
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

import orjson

from orchestrator.domain import EncodeRequest, GenerateRequest, InferRequest, Tensor
from orchestrator.ownership import give, make_folder

KEY_FILE = "audit.key"
KEY_BYTES = 32
HASH_DIGITS = 32
CALLERS = 4096  # whose hash is remembered

_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class AuditKeyError(Exception):
    """The key cannot be had or may not be used; `hint` says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class Keyed:
    """HMAC-SHA-256 under one key, whose two blocks are hashed once and for all: a third of what hmac.digest costs."""

    def __init__(self, key: bytes) -> None:
        block = (key if len(key) <= 64 else hashlib.sha256(key).digest()).ljust(64, b"\0")
        self._inner, self._outer = (hashlib.sha256(bytes(byte ^ pad for byte in block)) for pad in (0x36, 0x5C))

    def hash(self, data: bytes) -> str:
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(data)
        outer.update(inner.digest())
        return outer.hexdigest()[:HASH_DIGITS]


class Fingerprint:
    """The hashes of one key. Nothing of the key shows in a repr."""

    def __init__(self, key: bytes) -> None:
        self._input, self._caller, self._chain = (
            Keyed(hmac.digest(key, b"truthgpt audit " + use, "sha256")) for use in (b"input", b"caller", b"chain")
        )
        self._callers: dict[str, str] = {}

    def text(self, text: str | bytes) -> str:
        """Of a prompt that is one text."""
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        return self._input.hash(b"text\n" + data)

    def messages(self, turns: Sequence[tuple[str, str]]) -> str:
        """Of a conversation: role and content of each turn."""
        return self._of_json(b"messages\n", turns)

    def tokens(self, ids: Sequence[int]) -> str:
        """Of a prompt that is token ids."""
        return self._of_json(b"tokens\n", ids)

    def texts(self, texts: Sequence[str]) -> str:
        """Of several texts that are one request, as embeddings have them."""
        return self._of_json(b"texts\n", texts)

    def tensors(self, tensors: Sequence[Tensor]) -> str:
        """Of the tensors of an inference."""
        parts = [b"tensors\n"]
        for tensor in tensors:
            shape = orjson.dumps(tensor.shape)
            for part in (_utf8(tensor.name), _utf8(tensor.datatype), shape, tensor.data, *tensor.elements):
                parts += (b"%d:" % len(part), part)
        return self._input.hash(b"".join(parts))

    def request(self, request: GenerateRequest | InferRequest | EncodeRequest) -> str:
        """Of what the model is given, as the client sent it."""
        if isinstance(request, GenerateRequest):
            memo = request.memo
            if memo is None:
                return self._prompt(request)
            known: str | None = memo.get(self)
            if known is None:
                known = memo[self] = self._prompt(request)
            return known
        return self.tensors(request.inputs) if isinstance(request, InferRequest) else self.texts(request.texts)

    def _prompt(self, request: GenerateRequest) -> str:
        if request.text is not None:
            return self.text(request.text)
        if request.messages is not None:
            return self.messages([(turn.role, turn.content) for turn in request.messages])
        return self.tokens(request.token_ids or ())

    def caller(self, id: str) -> str:
        """Of a caller's id; empty for an empty one."""
        if not id:
            return ""
        known = self._callers.get(id)
        if known is None:
            if len(self._callers) >= CALLERS:
                self._callers.clear()
            known = self._callers[id] = self._caller.hash(_utf8(id))
        return known

    def chain(self, line: bytes) -> str:
        """Of a line of the audit log."""
        return self._chain.hash(line)

    def _of_json(self, what: bytes, value: object) -> str:
        try:
            data = orjson.dumps(value)
        except TypeError:  # text that is no valid Unicode: the same form, more slowly
            data = _utf8(_json(value))
        return self._input.hash(what + data)


def load_key(home: Path, given: str | None, create: bool = True) -> bytes:
    """The key: `given`, the setting's text, else what home/audit.key holds, which is made where there is none.

    Several processes may do so at once: all get the same one. Raises AuditKeyError where it cannot be had, others may
    read it, or (`create` false) there is none.
    """
    if given is not None:
        return given.encode()
    path = home / KEY_FILE
    try:
        key = _read(path)
        if key is None and create:
            _create(path)
            key = _read(path)
    except OSError as error:
        hint = "make that possible, or set TRUTHGPT_AUDIT_KEY"
        raise AuditKeyError(f"{path}: {(error.strerror or str(error)).lower()}", hint) from error
    if key is None:
        hint = "put it back, or set TRUTHGPT_AUDIT_KEY to the one that was used"
        raise AuditKeyError(f"there is no key {path}", hint)
    return key


def _read(path: Path) -> bytes | None:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    with file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if mode & 0o077:
            raise AuditKeyError(f"others may read or change {path} (mode {mode:04o})", f"chmod 600 {path}")
        text = file.read(1024).strip()
    try:
        key = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        hint = "put back the one that was made; without it nothing in the audit log can be checked"
        raise AuditKeyError(f"{path} is no key of {KEY_BYTES} bytes in hexadecimal", hint)
    return key


def _create(path: Path) -> None:
    """Put a new key there, complete and in one step, unless somebody else is quicker."""
    make_folder(path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{KEY_FILE}-")  # created 0600
    try:
        with os.fdopen(handle, "wb") as file:
            give(handle, path.parent)
            file.write(secrets.token_hex(KEY_BYTES).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(name, path)
    except FileExistsError:
        return
    finally:
        os.unlink(name)


def _utf8(text: str) -> bytes:
    # what a client's JSON escapes may be no valid Unicode text: its hash is wanted all the same
    return text.encode("utf-8", "surrogatepass")
