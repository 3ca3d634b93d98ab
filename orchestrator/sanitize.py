"""What happens to the text of a request before a model sees it: pure functions from texts to texts.

In this order: control and bidi characters go, accents are composed (NFC), white space is tidied, what a browser would
run is removed (unsafe.py), and the whole is cut to its limit. Letters of every language stay, and so do emoji, joiners
and direction marks. Cleaning twice changes nothing more, and the time is linear in the length of the text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import lru_cache, partial

from orchestrator import unsafe
from orchestrator.errors import Text, UnsafeInput

CHANGES = ("control", "bidi", "marks", "nfc", "whitespace", *unsafe.NAMES, "cut")  # in the order they are reported

_NAMED = {name: Text(f"a <{name}> tag", f"una etiqueta <{name}>") for name in unsafe.NAMES} | {
    "handler": Text("an event handler in a tag", "un manejador de eventos en una etiqueta"),
    "uri": Text("a javascript:, vbscript: or data: URI", "una URI javascript:, vbscript: o data:"),
}

_BREAK = re.compile("[\r\x0b\x0c\x85\u2028\u2029](?:(?<=\r)\n)?")  # the line breaks of UAX #14 other than LF
# Controls, surrogates (half a character), byte order marks, noncharacters, deprecated and annotation formats.
_CONTROL = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u206a-\u206f\ud800-\udfff\ufdd0-\ufdef\ufeff\ufff9-\ufffb\ufffe\uffff]"
)
_BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")  # embeddings, overrides, isolates: text that reads otherwise
# Noncharacters past the first plane, and tag characters: invisible ASCII, whose only place is in the flags of regions
# (UTS #51, ED-14a).
_ASTRAL = re.compile(
    "(\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{3,6}\U000e007f)|[\U000e0000-\U000e007f"
    + "".join(chr(plane << 16 | low) for plane in range(1, 17) for low in (0xFFFE, 0xFFFF))
    + "]++"
)
# Combining marks are neither word characters nor spaces. UAX #15, section 13: no text needs more than 30 in a row, and
# normalising takes quadratic time on more.
_MAX_MARKS = 30
_MARKS = re.compile(rf"[^\w\s\x00-\u02ff]{{{_MAX_MARKS + 1},}}+")

_H = " \t\xa0\u1680\u2000-\u200a\u202f\u205f\u3000"  # horizontal white space
_TRAILING = re.compile(rf"(?<![{_H}])[{_H}]++(?![^\n])")
_BLANK_LINES = re.compile(r"\n{3,}+")
_SPACES = re.compile(rf"(?<=\S)[{_H}]{{2,}}+")
_UNTIDY = re.compile(rf"[{_H}][\n{_H}]")
_FLAG = "".join(map(chr, range(0x1F1E6, 0x1F200)))
_EXTENDS = re.compile("[\u200c\u200d\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]")  # joiners, skin tones, tags
_LONGEST = 64  # code points; what claims to be one longer character is cut anywhere


_FAR_BEYOND = 8  # times the limit: what lies beyond is not even looked at


@dataclass(frozen=True)
class Rules:
    """`mode`: reject, clean or off. `max_chars`: of all texts of a request together, in code points."""

    mode: str
    max_chars: int


@dataclass(frozen=True)
class Cleaned:
    """The texts in their order and what was changed in any of them, of CHANGES and in that order."""

    texts: tuple[str, ...]
    changes: tuple[str, ...]


def check(texts: Sequence[str], rules: Rules, param: str) -> Cleaned:
    """What goes on to the model. `param` is the request's field that the texts come from, for the error.

    "clean" removes and cuts. "reject" tidies characters and white space too, but raises UnsafeInput where something
    dangerous would have to go or the limit is passed. "off" changes nothing and knows no limit. In every mode a request
    without any text raises UnsafeInput.
    """
    # who asks the same again, as those do whom the cache answers, has it read only once
    return (_lately if sum(map(len, texts)) <= _SHORT_CHARS else _check)(tuple(texts), rules, param)


def _check(texts: tuple[str, ...], rules: Rules, param: str) -> Cleaned:
    chars = sum(map(len, texts))
    if rules.mode == "off" or (chars <= rules.max_chars and all(map(_is_clean, texts))):
        cleaned = Cleaned(texts, ())
    elif rules.mode == "clean":
        near = _near(texts, _FAR_BEYOND * rules.max_chars)
        cleaned = clean(near, rules.max_chars)
        if list(near) != list(texts):
            cleaned = Cleaned(cleaned.texts, _ordered([{*cleaned.changes, "cut"}]))
    else:
        if chars > _FAR_BEYOND * rules.max_chars:  # reading on would cost more than the answer "too long"
            raise _too_long(chars, rules.max_chars, param)
        tidied = [_tidy(text) for text in texts]
        cleaned = Cleaned(tuple(text for text, _ in tidied), _ordered(changes for _, changes in tidied))
        _refuse(cleaned, rules.max_chars, param)
    if not any(cleaned.texts):
        raise UnsafeInput(Text(f"{param}: there is no text in it.", f"{param}: no contiene texto."), param, ("empty",))
    return cleaned


_SHORT_CHARS = 2048
_lately = lru_cache(maxsize=512)(_check)


def clean(texts: Sequence[str], max_chars: int) -> Cleaned:
    """The texts without anything dangerous; together at most `max_chars` code points, cut at the end of the whole."""
    kept, changes, room = [], [], max_chars
    for text in texts:
        text, changed = _tidy(text)
        if len(text) > room:
            text, _ = _tidy(_cut(text, room))  # a cut can make <scripts> a <script>
            changed |= {"cut"}
        room -= len(text)
        kept.append(text)
        changes.append(changed)
    return Cleaned(tuple(kept), _ordered(changes))


def _near(texts: Sequence[str], chars: int) -> Sequence[str]:
    """The texts without what lies beyond so many characters of the whole."""
    if sum(map(len, texts)) <= chars:
        return texts
    kept = []
    for text in texts:
        kept.append(text[:chars])
        chars -= len(kept[-1])
    return kept


def _refuse(tidied: Cleaned, max_chars: int, param: str) -> None:
    reasons = tuple(name for name in tidied.changes if name in unsafe.NAMES)
    if reasons:
        en, es = (", ".join(_NAMED[name].of(language) for name in reasons) for language in ("en", "es"))
        raise UnsafeInput(
            Text(f"{param}: the text has {en}; that is not accepted.", f"{param}: el texto tiene {es}; no se admite."),
            param,
            reasons,
        )
    chars = sum(map(len, tidied.texts))
    if chars > max_chars:
        raise _too_long(chars, max_chars, param)


def _too_long(chars: int, max_chars: int, param: str) -> UnsafeInput:
    return UnsafeInput(
        Text(
            f"{param}: the text has {chars} characters; the limit is {max_chars}.",
            f"{param}: el texto tiene {chars} caracteres; el límite es {max_chars}.",
        ),
        param,
        ("length",),
    )


def _ordered(changes: Iterable[AbstractSet[str]]) -> tuple[str, ...]:
    every = frozenset().union(*changes)
    return tuple(name for name in CHANGES if name in every)


def _tidy(text: str) -> tuple[str, frozenset[str]]:
    """Everything but the cut; and what was changed. A second call changes nothing."""
    changes = set()
    latin = _is_latin(text)
    steps = _SPACING if latin else _COMPOSITION + _SPACING
    if not _is_printable(text):  # what these look for is neither printable nor a space
        steps = (_CONTROLS if latin else _CONTROLS + _FORMATS) + steps
    for name, step in steps:
        before, text = text, step(text)
        if text != before:
            changes.add(name)
    text, removed = unsafe.remove(text, _tidy_spaces)
    return text, removed.union(changes)


def _is_clean(text: str) -> bool:
    """Whether nothing in it needs a change; no is only a maybe. As most texts are, told at a fraction of the cost."""
    return unsafe.is_safe(text) and _is_printable(text) and _is_latin(text) and _tidy_spaces(text) == text


def _is_printable(text: str) -> bool:
    """Whether all of it is, line breaks and tabs apart."""
    return text.isprintable() or text.replace("\n", "").replace("\t", "").isprintable()


def _is_latin(text: str) -> bool:
    """Whether all of it is in Latin-1, which is composed and has neither marks nor formats."""
    if text.isascii():
        return True
    try:
        text.encode("latin-1")
    except UnicodeEncodeError:
        return False
    return True


def _first_marks(run: re.Match[str]) -> str:
    """The run without the marks that follow 30 others."""
    kept, marks = [], 0
    for char in run[0]:
        marks = marks + 1 if unicodedata.combining(char) else 0
        if marks <= _MAX_MARKS:
            kept.append(char)
    return "".join(kept)


def _tidy_spaces(text: str) -> str:
    """No space at the ends and before line breaks, one inside lines, at most one blank line; indentation stays.

    A single tab or wide space inside a line stays what it is: tables and some languages need them.
    """
    text = text.strip()
    # What is printable has no white space but the plain space.
    if "  " in text or (not text.isprintable() and (_UNTIDY.search(text) or "\n\n\n" in text)):
        text = _SPACES.sub(" ", _BLANK_LINES.sub("\n\n", _TRAILING.sub("", text)))
    return text


def _compose(text: str) -> str:
    return _few_marks(unicodedata.normalize("NFC", text))  # some marks are normalised to two


def _few_marks(text: str) -> str:
    return _MARKS.sub(_first_marks, text)


_Steps = tuple[tuple[str, Callable[[str], str]], ...]
_CONTROLS: _Steps = (("control", partial(_CONTROL.sub, "")), ("whitespace", partial(_BREAK.sub, "\n")))
_FORMATS: _Steps = (("control", partial(_ASTRAL.sub, r"\1")), ("bidi", partial(_BIDI.sub, "")))
_COMPOSITION: _Steps = (("marks", _few_marks), ("nfc", _compose))
_SPACING: _Steps = (("whitespace", _tidy_spaces),)


def _cut(text: str, end: int) -> str:
    """The first `end` code points, or fewer so as to end between two characters as people see them (about UAX #29)."""
    for at in range(end, max(-1, end - _LONGEST), -1):
        if not _joined(text, at):
            return text[:at]
    return text[:end]


def _joined(text: str, at: int) -> bool:
    """Whether text[at - 1] and text[at] are seen as one character."""
    if at in (0, len(text)):
        return False
    if _FLAG[0] <= text[at] <= _FLAG[-1]:  # a pair of these letters is one flag
        return (at - len(text[:at].rstrip(_FLAG))) % 2 == 1
    return text[at - 1] == "\u200d" or _EXTENDS.match(text, at) is not None or unicodedata.category(text[at])[0] == "M"
