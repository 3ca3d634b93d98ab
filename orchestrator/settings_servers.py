"""The settings of several Triton servers behind one gateway. `Settings` has them all."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.spec import setting

SERVER_URL = r"http://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?/?"


@dataclass(frozen=True, repr=False)
class ServerSettings:
    """Durations are seconds (`_s`)."""

    triton_urls: str | None = setting(
        None,
        "Triton servers to use, comma-separated: http://HOST:PORT, of a name every address. Unset: own ones.",
        pattern=rf"{SERVER_URL}(\s*,\s*{SERVER_URL})*",
    )
    tritons: int = setting(1, "Triton servers that truthgpt up starts.", minimum=1, maximum=16)
    triton_resolve_s: float = setting(
        5.0, "Pause between two look-ups of the names in triton_urls.", minimum=0.05, maximum=3600.0
    )
    triton_eject_s: float = setting(
        1.0, "Rest of a Triton server that failed; doubled each time, up to a minute.", minimum=0.05, maximum=60.0
    )
    prefix_affinity: str = setting(
        "auto",
        "Send prompts that begin alike to the same server: for models that reuse prefixes, always, or never.",
        choices=("auto", "on", "off"),
    )
