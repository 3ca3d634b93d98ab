"""Asking a model's own tokenizer about a prompt, for as long as the model is well."""

from __future__ import annotations

import asyncio
from functools import partial

from orchestrator.domain import GenerateRequest
from orchestrator.errors import UpstreamUnavailable
from orchestrator.fleet import Fleet, Member
from orchestrator.triton import Prompt

INSPECT_S = 5.0  # a prompt of a megabyte is read in about a second


class Inspector:
    """The gateway holds no tokenizer: the one that the model has loaded is the right one."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def __call__(self, request: GenerateRequest) -> Prompt:
        """The prompt's tokens, and its text where it came as token ids. Raises InvalidRequest, UpstreamUnavailable."""
        until, tried = asyncio.get_running_loop().time() + INSPECT_S, list[Member]()
        while True:
            try:
                with self._fleet.attend(request.model, tried=tried) as visit:
                    ask = partial(visit.triton.prompt, request, INSPECT_S)
                    return await visit.attendance.wait(ask, until)
            except TimeoutError as error:
                raise UpstreamUnavailable(f"{request.model} did not read a prompt within {INSPECT_S} s") from error
            except UpstreamUnavailable:
                if not self._fleet.another(request.model, tried):
                    raise
