"""Blocking work beside the event loop, with a deadline, that holds up neither the loop nor the end of the process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

_T = TypeVar("_T")


class Aside:
    """Runs one function at a time in a daemon thread. One that hangs makes the next ones fail at once."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._busy = False

    async def run(self, function: Callable[[], _T], timeout_s: float) -> _T:
        """What the function returns or raises. Raises TimeoutError when it takes longer, and what it does is lost.

        The same while one before it still hangs, and RuntimeError where no thread is to be had.
        """
        if self._busy:
            raise TimeoutError("what was begun before still hangs")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            self._busy = False
            if not future.done():  # else nobody waits any more
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)

        def work() -> None:
            result, error = None, None
            try:
                result = function()
            except BaseException as caught:
                error = caught
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(settle, result, error)

        threading.Thread(target=work, name=self._name, daemon=True).start()
        self._busy = True
        async with asyncio.timeout(timeout_s):
            return await future  # type: ignore[no-any-return]
