"""Which handlers a path has. A path is split as it was sent, and only then its segments are decoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar
from urllib.parse import unquote_to_bytes

_T = TypeVar("_T")


@dataclass(frozen=True)
class Found(Generic[_T]):
    """`template` is the path as registered, `params` its segments by name, decoded."""

    template: str
    target: _T
    params: dict[str, str] = field(default_factory=dict)


@dataclass
class _Node(Generic[_T]):
    literal: dict[str, _Node[_T]] = field(default_factory=dict)
    any: _Node[_T] | None = None
    leaf: tuple[str, list[str], _T] | None = None


class Router(Generic[_T]):
    """Path templates such as `/v2/models/{model}/infer`; `{name}` takes any one segment that is not empty.

    An exact path beats every template; among templates a literal segment beats a `{name}`. An encoded slash is part of
    its segment, and `.` and `..` are no segments: nothing leads upwards.
    """

    def __init__(self, routes: Mapping[str, _T]) -> None:
        self._exact = {path: Found(path, target) for path, target in routes.items() if "{" not in path}
        self._root = _Node[_T]()
        for path, target in routes.items():
            if path in self._exact:
                continue
            node, names = self._root, []
            for segment in path.split("/")[1:]:
                if segment.startswith("{"):
                    names.append(segment[1:-1])
                    node.any = node = node.any or _Node()
                else:
                    node = node.literal.setdefault(segment, _Node())
            node.leaf = (path, names, target)

    def find(self, raw_path: str) -> Found[_T] | None:
        """What is at this path, still percent-encoded and without its query; None when nothing is."""
        exact = self._exact.get(raw_path)
        if exact is not None:
            return exact
        node, values = self._root, []
        for raw in raw_path.split("/")[1:]:
            try:
                segment = unquote_to_bytes(raw).decode("utf-8") if "%" in raw else raw
            except UnicodeDecodeError:
                return None
            following = node.literal.get(segment)
            if following is None:
                following = node.any
                values.append(segment)
            if following is None or segment in ("", ".", ".."):
                return None
            node = following
        if node.leaf is None:
            return None
        path, names, target = node.leaf
        return Found(path, target, dict(zip(names, values, strict=True)))
