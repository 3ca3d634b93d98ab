"""Asking a model's own tokenizer about a prompt, for as long as the model is well."""

from __future__ import annotations

import asyncio

from orchestrator.domain import GenerateRequest
from orchestrator.errors import UpstreamUnavailable
from orchestrator.health import Health
from orchestrator.triton import Prompt, Triton

INSPECT_S = 5.0  # a prompt of a megabyte is read in about a second


class Inspector:
    """The gateway holds no tokenizer: the one that the model has loaded is the right one."""

    def __init__(self, triton: Triton, health: Health) -> None:
        self._triton, self._health = triton, health

    async def __call__(self, request: GenerateRequest) -> Prompt:
        """The prompt's tokens, and its text where it came as token ids. Raises InvalidRequest, UpstreamUnavailable."""
        with self._health.attend(request.model) as attendance:
            until = asyncio.get_running_loop().time() + INSPECT_S
            try:
                return await attendance.wait(lambda: self._triton.prompt(request, INSPECT_S), until)
            except TimeoutError as error:
                raise UpstreamUnavailable(f"{request.model} did not read a prompt within {INSPECT_S} s") from error
