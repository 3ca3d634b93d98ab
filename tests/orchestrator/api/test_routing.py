"""The router: exact paths, templates of several segments, and what no path may be."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.api.routing import Router

ROUTER = Router(
    {
        path: path
        for path in (
            "/v2",
            "/v2/models/stats",
            "/v2/models/{model}",
            "/v2/models/{model}/infer",
            "/v2/models/{model}/versions/{version}/infer",
            "/v2/repository/models/{model}/load",
        )
    }
)


@pytest.mark.parametrize(
    ("path", "template", "params"),
    [
        ("/v2", "/v2", {}),
        ("/v2/models/stats", "/v2/models/stats", {}),
        ("/v2/models/stats/infer", "/v2/models/{model}/infer", {"model": "stats"}),
        ("/v2/models/m", "/v2/models/{model}", {"model": "m"}),
        ("/v2/models/a%2Fb/infer", "/v2/models/{model}/infer", {"model": "a/b"}),
        (
            "/v2/models/m/versions/3/infer",
            "/v2/models/{model}/versions/{version}/infer",
            {"model": "m", "version": "3"},
        ),
        ("/v2/%6dodels/m", "/v2/models/{model}", {"model": "m"}),
        ("/v2/models/%C3%B1", "/v2/models/{model}", {"model": "ñ"}),
        ("/v2/models/%7Bmodel%7D", "/v2/models/{model}", {"model": "{model}"}),
    ],
)
def test_paths_that_are_there(path: str, template: str, params: dict[str, str]) -> None:
    """Exact beats template, segments are decoded one by one, and an encoded slash stays within its segment."""
    found = ROUTER.find(path)
    assert found is not None
    assert (found.template, found.target, found.params) == (template, template, params)


@pytest.mark.parametrize(
    "path",
    [
        "", "/", "v2", "/v2/", "/v1", "/v2/models", "/v2/models/", "/v2/models//infer", "/v2/models/m/",
        "/v2/models/a/b", "/v2/models/m/infer/", "/v2//models/m", "/v2/models/./infer", "/v2/models/../infer",
        "/v2/models/%2e%2E/infer", "/v2/models/%ff", "/v2/models/m%2finfer/x", "/v2/models/{model}/load",
        "/v2%2Fmodels%2Fm", "*",
    ],
)  # fmt: skip
def test_paths_that_are_not_there(path: str) -> None:
    """Empty segments, dots in any spelling, no UTF-8 and encoded slashes between segments lead nowhere."""
    assert ROUTER.find(path) is None


@given(st.text(min_size=1, max_size=40).filter(lambda name: name not in (".", "..")))
def test_any_name_survives_its_encoding(name: str) -> None:
    """Whatever a segment is called, its encoded form leads to the template and comes back as it was."""
    found = ROUTER.find(f"/v2/models/{quote(name, safe='')}/infer")
    assert found is not None
    assert found.params == {"model": name}


@given(st.text(max_size=200))
def test_any_path_is_survived(path: str) -> None:
    """No path raises."""
    ROUTER.find("/" + path)
