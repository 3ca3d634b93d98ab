"""Secrets in a text become `***`: API keys, Authorization values, passwords. What identifies a key stays readable.

What it cannot know by its looks it cannot mask: a secret without a name, a URL or a key's form around it.
"""

from __future__ import annotations

import re

MASK = "***"
# One of these is in every text that a rule below changes; looking for them first is what makes a clean line cheap.
_MARKS = ("tg_", "://", "bearer", "authorization", "api-key", "api_key", "apikey", "password", "audit_key")
_ENDS = r"\s\"'<>,;)\]}&"  # of a value in a header, a mapping's repr, JSON or a query
_RULES = (
    # keys.py: tg_<id>_<secret>; the id is public, and a secret that was cut off is one all the same
    (re.compile(r"tg_([a-z2-7]{12})_[A-Za-z0-9_-]+"), rf"tg_\1_{MASK}"),
    # the greediest reading: a password may hold an unescaped @, : or /
    (re.compile(r"://([^\s:/?#@]*):\S*@"), rf"://\1:{MASK}@"),
    (re.compile(rf"(?i)\b(bearer\s+)[^{_ENDS}]+"), rf"\1{MASK}"),
    # with its scheme, whatever that is, and so over white space; quotes are escaped in JSON that a JSON text holds
    (re.compile(r"(?i)(authorization(?:\\*['\"])?\s*[:=,]\s*(?:b?\\*['\"])?)[^\"'<>,;)\]}&\n]+"), rf"\1{MASK}"),
    (re.compile(rf"(?i)((?:api[-_]?key|password|audit_key)(?:\\*['\"])?\s*[:=,]\s*(?:b?\\*['\"])?)[^{_ENDS}]+"),
     rf"\1{MASK}"),
)  # fmt: skip

# greedy: a password with an unescaped @ or / is masked whole
_URL_PASSWORD = re.compile(r"(?s)(?<=://)([^:/?#@]*):.*@")


def suspicious(text: str) -> bool:
    """Whether there may be a secret in a text; no is certain."""
    lower = text.lower()
    for mark in _MARKS:  # any() of a generator takes twice as long
        if mark in lower:
            return True
    return False


def masked(text: str) -> str:
    """The text without its secrets. Masking twice is masking once."""
    if suspicious(text):
        for pattern, shown in _RULES:
            text = pattern.sub(shown, text)
    return text


def mask_url(url: str) -> str:
    """The URL with its password (and any password query parameter) replaced by `***`."""
    masked = _URL_PASSWORD.sub(r"\1:***@", url)
    return re.sub(r"(?i)([?&](?:password|username)=)[^&#]*", r"\1***", masked)


def mask_secret(value: str) -> str:
    """Of a server's URL all but its password; of a web address the host alone, for its path may be the secret."""
    scheme, found, rest = value.partition("://")
    if not found:
        return "***"
    if scheme.lower() in ("http", "https"):
        host = re.split(r"[/?#]", rest, maxsplit=1)[0].rpartition("@")[2]
        return f"{scheme}://{host}/***"
    return mask_url(value)
