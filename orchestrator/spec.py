"""One row of the settings table: what a value may be, how it is parsed and how it is called on each surface."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def setting(default: object, help: str, **rules: Any) -> Any:
    """A field of a settings table; `rules` are those of `Spec`."""
    return field(default=default, metadata={"help": help, **rules})


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What one setting may be; `env` and `flag` are its names outside."""

    name: str
    env: str
    help: str
    kind: type
    optional: bool
    default: object
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    pattern: str | None = None
    secret: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def parse(self, raw: object) -> object:
        """A string (environment, flag) or TOML value as this field's type; ValueError says what was expected."""
        if self.optional and (raw is None or raw == ""):
            return None
        value = self._convert(raw)
        if self.choices and value not in self.choices:
            raise ValueError(f"must be one of {', '.join(self.choices)}; got {self._show(raw)}")
        if self.pattern is not None and re.fullmatch(self.pattern, str(value)) is None:
            raise ValueError(f"must match {self.pattern}; got {self._show(raw)}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            low, high = self.minimum, self.maximum
            if (low is not None and value < low) or (high is not None and value > high):
                raise ValueError(f"must be between {_number(low)} and {_number(high)}; got {self._show(raw)}")
        return value

    def _convert(self, raw: object) -> object:
        if self.kind is bool:
            if isinstance(raw, bool):
                return raw
            text = str(raw).strip().lower()
            if text in _TRUE or text in _FALSE:
                return text in _TRUE
            raise ValueError(f"must be true or false; got {self._show(raw)}")
        if isinstance(raw, bool) or not isinstance(raw, (str, int, float, Path)):
            raise ValueError(f"must be {self._noun()}; got {self._show(raw)}")
        if self.kind is int:
            if isinstance(raw, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", raw.strip()):
                return int(raw)
            if isinstance(raw, int):
                return raw
        elif self.kind is float:
            try:
                number = float(raw) if not isinstance(raw, Path) else math.nan
            except (ValueError, OverflowError):
                number = math.nan
            if math.isfinite(number):
                return number
        elif isinstance(raw, (str, Path)) and str(raw) != "" and "\0" not in str(raw):
            return Path(os.path.expanduser(raw)) if self.kind is Path else str(raw)
        raise ValueError(f"must be {self._noun()}; got {self._show(raw)}")

    def _noun(self) -> str:
        return {int: "a whole number", float: "a number", Path: "a path", str: "a text"}[self.kind]

    def _show(self, raw: object) -> str:
        return "a value that is not shown (secret)" if self.secret else repr(raw)[:80]


def _number(value: float | None) -> str:
    return "any" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
