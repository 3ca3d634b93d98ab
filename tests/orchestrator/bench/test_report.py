"""The report as one HTML file."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from orchestrator.bench import report

from .test_result import found

pytest.importorskip("matplotlib")


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def safe(text: str) -> Page:
    """A page that runs nothing and loads nothing."""
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "iframe", "object", "embed", "link", "img", "image", "foreignobject", "a", "base"}
    for _, given in page.tags:
        for name, value in given.items():
            assert not name.startswith("on"), name
            if name in ("href", "xlink:href", "src", "style"):
                assert "//" not in (value or "") and "javascript:" not in (value or "")
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    return page


def test_a_report_is_one_page_that_loads_nothing() -> None:
    """Its figures, its plots with their words, its definitions."""
    text = report.html([("demo", found(errors=2))])
    page = safe(text)
    assert text.startswith("<!doctype html>") and len(text) < 500_000
    assert "8 clients" in page.text and "output tokens/s" in page.text and "First token:" in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 1 and "between tokens, ms" in page.text
    assert "2 × http_503" in page.text and "<metadata" not in text


def test_whatever_a_name_holds_stays_a_word() -> None:
    """Of models, files, errors and addresses: nothing becomes markup or a formula, and all of it can be read.

    Nor is a letter that no font has a warning: that is not for the reader.
    """
    hostile = (
        "_<script>alert(1)</script>'\"><img src=x onerror=a()>&amp;$x_{2}$ \\frac{%d</style>]]><svg onload=a()>模🙂"
    )
    one, other = found(model=hostile, errors=1), found(scale=2.0)
    other["target"]["url"] = other["runs"][0]["load"]["odd"] = hostile
    other["runs"][0]["error_kinds"] = {hostile: {"count": hostile, "first": hostile}}
    page = safe(report.html([(hostile, one), (f"{hostile} b", other)]))
    assert page.text.count(hostile) >= 8


def test_a_comparison_says_what_is_better_and_what_was_not_measured_alike() -> None:
    """Each figure's ratio at each place of the sweep, and the differences."""
    other = found(1, 8, scale=2.0)
    other["runs"][0]["load"]["output_tokens"] = 99
    text = report.html([("before", found(1, 8, 16)), ("after", other)])
    page = safe(text)
    assert "after to before" in page.text and "2.000 ×" in page.text and "0.500 ×" in page.text
    assert "output_tokens: 8 and 99" in page.text and "class='bad'" in text and "16 clients" in page.text


def test_a_report_of_errors_alone_with_a_rate() -> None:
    """Figures that nobody has are empty places, not failures; the sweep is one of rates."""
    nothing = found()
    for at, run in enumerate(nothing["runs"], 1):
        run.update(ttft_s=None, itl_s=None, tpot_s=None, latency_s=None, completed=0, concurrency=None, rate=at / 2)
    page = safe(report.html([("demo", nothing)]))
    assert "0.5 requests/s" in page.text
