"""What several servers say of one model, as one."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.domain import Model
from orchestrator.fleet.member import Member
from orchestrator.health import Served
from orchestrator.triton import Heartbeat


def together(model: Model, rows: Sequence[tuple[Member, Served]]) -> Served:
    """The state of `model`, which is what is served of it; `rows` is how it is at each server that has it.

    `reason` says which server is not as the others, also while the model is ready.
    """
    ready = [served for _, served in rows if served.model.ready]
    beats = [served.beat for served in ready or [served for _, served in rows] if served.beat is not None]
    odd = [text for member, served in rows if (text := _odd(model, member, served))]
    return Served(
        model, reason="; ".join(odd), configured=True, judged=any(served.judged for _, served in rows),
        since=max((served.since for _, served in rows), default=0.0), beat=_sum(beats) if beats else None,
    )  # fmt: skip


def _odd(model: Model, member: Member, served: Served) -> str:
    if not served.model.ready:
        return f"not ready at {member.url}: {served.reason}"
    if member.drained:
        return f"{member.url} is drained"
    if member.resting:
        return f"{member.url} failed and rests"
    if served.model.version != model.version:
        return f"version {served.model.version} at {member.url}"
    if served.model.digest != model.digest:
        return f"another version {served.model.version} at {member.url}"
    return f"on the CPU at {member.url}: its device failed" if served.fallback else ""


def _sum(beats: Sequence[Heartbeat]) -> Heartbeat:
    devices = dict.fromkeys(beat.device for beat in beats if beat.device)
    return Heartbeat(
        running=sum(beat.running for beat in beats),
        waiting=sum(beat.waiting for beat in beats),
        slots=sum(beat.slots for beat in beats),
        step_age_s=max(beat.step_age_s for beat in beats),
        busy=any(beat.busy for beat in beats),
        digest=beats[0].digest,
        device=", ".join(devices),
        fallback=any(beat.fallback for beat in beats),
        version=beats[0].version,
    )
