"""Finds and removes what a browser would run: four kinds of tags, event handlers inside tags, and script URIs.

What is removed becomes one space, so that the text on its two sides never joins: `<scr<script>ipt>` is `<scr ipt>`.
Tags follow the WHATWG HTML tokenizer (section 13.2.5: a tag is `<` and a letter, quotes count after `=` only), except
that a tag need not be closed: other text may come behind it later. URIs are told from words by what follows the colon:
`javascript:alert(1)` and `data:text/html,x` are URIs, "JavaScript: The Good Parts" and "the data: we found" are not.
Every pattern takes linear time: what repeats is possessive, and no match can begin inside what an earlier one scanned.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from html import unescape

NAMES = ("script", "iframe", "object", "embed", "handler", "uri")

_PASSES = 4  # enough for any text that was not built to need more
_GAP = r"[\t\n]*+"  # browsers drop tabs and line breaks anywhere in a URI (WHATWG URL, section 4.4)
_MEDIA = r"(?:application|audio|font|image|message|model|multipart|text|video|x-[a-z0-9-]++)/"
# The global and window handlers of the HTML standard, and those of SVG, pointers, touch, animations and older browsers.
_HANDLERS = """
abort activate afterprint afterscriptexecute animationcancel animationend animationiteration animationstart auxclick
beforeactivate beforecopy beforecut beforedeactivate beforeinput beforematch beforepaste beforeprint
beforescriptexecute beforetoggle beforeunload begin blur bounce cancel canplay canplaythrough change click close command
contentvisibilityautostatechange contextlost contextmenu contextrestored copy cuechange cut dblclick deactivate drag
dragend dragenter dragexit dragleave dragover dragstart drop durationchange emptied end ended error finish focus focusin
focusout formdata fullscreenchange fullscreenerror gesturechange gestureend gesturestart gotpointercapture hashchange
input invalid keydown keypress keyup languagechange load loadeddata loadedmetadata loadend loadstart lostpointercapture
message messageerror mousedown mouseenter mouseleave mousemove mouseout mouseover mouseup mousewheel offline online
pagehide pagereveal pageshow pageswap paste pause play playing pointercancel pointerdown pointerenter pointerleave
pointermove pointerout pointerover pointerrawupdate pointerup popstate progress propertychange ratechange
readystatechange rejectionhandled repeat reset resize scroll scrollend scrollsnapchange scrollsnapchanging search
securitypolicyviolation seeked seeking select selectionchange selectstart show slotchange stalled start storage submit
suspend timeout timeupdate toggle touchcancel touchend touchmove touchstart transitioncancel transitionend transitionrun
transitionstart unhandledrejection unload volumechange waiting webkitanimationend webkitanimationiteration
webkitanimationstart webkittransitionend wheel
""".split()


def _scheme(*names: str) -> str:
    return "(?:" + "|".join(_GAP.join(name) for name in names) + ")"


_BLOCK = re.compile(r"<(/?)(script|iframe|object|embed)(?![\w:.-])(?:[^<>]*+>)?+", re.ASCII | re.IGNORECASE)
_VALUE = r"""(?:"[^"]*+"|'[^']*+'|[^\s>]*+)"""  # a quote that nothing closes is an ordinary character
_TAG = re.compile(rf"</?[a-z][^\s/>]*+(?:[\s/]++|[^\s/>][^\s/>=]*+(?:\s*+=\s*+{_VALUE})?+)*+", re.IGNORECASE)
_HANDLER = re.compile(rf"""(?<=[\s/"'])on(?:{"|".join(_HANDLERS)})\s*+=\s*+{_VALUE}""", re.IGNORECASE)
_SCRIPT, _DATA = _scheme("javascript", "vbscript"), _scheme("data")
_TAG_URI = re.compile(
    rf"""(=\s*+["']?+\s*+)(?:{_SCRIPT}{_GAP}:|{_DATA}{_GAP}:(?=\s*+(?:[,;]|{_MEDIA})))""", re.IGNORECASE
)
# The first letter comes before its lookbehinds and with its case, so that the search skips to it quickly.
# "```javascript:src/app.js" opens a fenced block of code.
_FIRST = "(?-i:[jvdJVD])"
_URI = re.compile(
    rf"(?={_FIRST})(?<![a-z0-9_.+-])(?<!```)(?:{_SCRIPT}:(?=\S)|{_DATA}:(?=[,;]\S|{_MEDIA}))", re.IGNORECASE
)
_LONG_NUMBER = re.compile("(&#)0*+([0-9]{0,8})[0-9]*+")  # int() refuses thousands of digits


def is_safe(text: str) -> bool:
    """Whether there is neither a tag nor a URI to remove: no `<`, and no scheme's end; no is only a maybe."""
    return "<" not in text and not (":" in text and ("t:" in text or "a:" in text or "T:" in text or "A:" in text))


def remove(text: str, tidy: Callable[[str], str]) -> tuple[str, frozenset[str]]:
    """The text without anything dangerous, and which of NAMES were removed; a second call changes nothing.

    `tidy` puts the white space in order that removing leaves, and has been applied to `text`. Only text that was built
    for it still has a match after one pass. After four it loses every `<` and `:`, without which nothing can match.
    """
    if is_safe(text):
        return text, frozenset()
    found: set[str] = set()
    for _ in range(_PASSES):
        before, text = text, _once(text, found)
        if text == before:
            return text, frozenset(found)
        text = tidy(text)
    return tidy(text.translate({ord("<"): " ", ord(":"): " "})), frozenset(found)


def _once(text: str, found: set[str]) -> str:
    if "<" in text:
        text = _without_blocks(text, found)
        text = _TAG.sub(lambda tag: _harmless(tag[0], found), text)
    if ":" in text:
        text, count = _URI.subn(" ", text)
        if count:
            found.add("uri")
    return text


def _without_blocks(text: str, found: set[str]) -> str:
    """Without the four kinds of tags; a script goes with its content where it is closed."""
    tags = list(_BLOCK.finditer(text))
    last_close = max((tag.start() for tag in tags if tag[0][:8].lower() == "</script"), default=-1)
    kept, at, in_script = [], 0, False
    for tag in tags:
        closes, name = bool(tag[1]), tag[2].lower()
        found.add(name)
        if not in_script:
            kept.append(text[at : tag.start()])
        if name == "script":
            in_script = not closes and tag.start() < last_close
        at = tag.end()
    return " ".join([*kept, text[at:]])


def _harmless(tag: str, found: set[str]) -> str:
    """One tag without handlers and script URIs; nothing of it where a URI is hidden behind character references."""
    tag, handlers = _HANDLER.subn(" ", tag)
    tag, uris = _TAG_URI.subn(r"\1 ", tag)
    if "&" in tag and _TAG_URI.search(unescape(_LONG_NUMBER.sub(r"\1\2", tag))):
        tag, uris = " ", 1
    if handlers:
        found.add("handler")
    if uris:
        found.add("uri")
    return tag
