"""Secrets that stand in files, as container platforms hand them out: NAME_FILE names the file that has NAME's value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

FILE = "_FILE"
MAX_BYTES = 64 << 10


def with_files(environ: Mapping[str, str], names: Iterable[str], problems: list[str]) -> Mapping[str, str]:
    """The environment with the values that files have of these variables; what is wrong is added to `problems`.

    White space at a file's ends is no part of the value. A variable may not be given both ways.
    """
    found = dict(environ)
    for name in names:
        path = environ.get(name + FILE)
        if not path:
            continue
        if environ.get(name):
            problems.append(f"{name} and {name}{FILE} are both set")
            continue
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_BYTES + 1)
            if len(data) > MAX_BYTES:
                raise ValueError(f"it has more than {MAX_BYTES} bytes")
            found[name] = data.decode("utf-8").strip()
            if not found[name]:
                raise ValueError("it is empty")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            problems.append(f"{path}, which {name}{FILE} names, has no secret: {reason}")
    return found
