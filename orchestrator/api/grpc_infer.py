"""ModelInfer and ModelStreamInfer: of a generation model's answer the first gives the whole, the second its chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from orchestrator.api import grpc_tensors, kserve_path
from orchestrator.api.fields import Defaults
from orchestrator.api.grpc_door import GONE, Door, Methods, Rpc, Stream, Unary, parse
from orchestrator.api.grpc_errors import details_of
from orchestrator.api.grpc_messages import SERVICE, InferRequest, StreamResponse
from orchestrator.api.http import SLOW_READER_S
from orchestrator.api.kserve_request import Call
from orchestrator.context import handling
from orchestrator.errors import DeadlineExceeded, TruthGPTError, UpstreamError
from orchestrator.gateway import Gateway

AT_ONCE = 64  # requests of one stream that are answered at a time; the next one is not read before
FINAL = "triton_final_response"
AS_STATUS = b"triton_grpc_error"  # metadata that wants an error as the stream's status instead of in a response


Write = Callable[[Any], Awaitable[None]]


class Inference:
    """The handlers. `request_timeout_s` bounds how long a client may take to read its answer."""

    def __init__(self, gateway: Gateway, defaults: Defaults, request_timeout_s: float) -> None:
        self._gateway, self._defaults = gateway, defaults
        self._within_s = request_timeout_s + SLOW_READER_S

    def methods(self) -> Methods:
        return {
            f"{SERVICE}/ModelInfer": Unary(InferRequest, self.infer),
            f"{SERVICE}/ModelStreamInfer": Stream(self.stream),
        }

    async def infer(self, rpc: Rpc, request: Any) -> Any:
        """The whole answer."""
        model = await kserve_path.find(self._gateway, request.model_name, request.model_version)
        body, within_s = grpc_tensors.read(request), rpc.within_s
        call = kserve_path.generation(body, rpc, model, self._defaults, within_s)
        result = await kserve_path.infer(self._gateway, body, rpc, model, call, within_s)
        return grpc_tensors.write(result, request.id)

    async def stream(self, door: Door, rpc: Rpc, messages: AsyncIterator[bytes]) -> None:
        """Each request is answered as it comes, beside the others; `id` tells whose a response is."""
        await rpc.context.send_initial_metadata((("x-request-id", rpc.id),))
        places, writing, number = asyncio.Semaphore(AT_ONCE), asyncio.Lock(), 0

        async def write(response: Any) -> None:
            async with writing:  # a call takes one message at a time
                await rpc.context.write(response.SerializeToString())

        try:
            async with asyncio.TaskGroup() as group:
                async for raw in messages:
                    await places.acquire()
                    task = group.create_task(self._answer(door, rpc, rpc.another(number), raw, write))
                    task.add_done_callback(lambda _: places.release())
                    number += 1
        except ExceptionGroup as errors:
            error = errors.exceptions[0]
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded("the client does not read its stream") from error
            rpc.told = isinstance(error, TruthGPTError)  # of each request by `_answer`, for itself
            raise error from None
        except asyncio.CancelledError as error:
            # The group's frame keeps it (until Python 3.13), and is in its traceback: a cycle with the whole request.
            error.__traceback__ = None
            raise

    async def _answer(self, door: Door, stream: Rpc, rpc: Rpc, raw: bytes, write: Write) -> None:
        """Answer one request; its error is a response, unless the client wants it as the stream's status."""
        handling.set((rpc.id, rpc.traceparent))
        response = StreamResponse()
        answer = response.infer_response
        async with asyncio.timeout(self._within_s):
            try:
                await self._respond(door, rpc, raw, response, write)
            except GONE:
                raise
            except Exception as error:
                if stream.headers.get(AS_STATUS) == b"true":
                    raise door.tell(rpc, error) from None
                response.error_message = details_of(door.tell(rpc, error), rpc.caller.language)
                del answer.outputs[:], answer.raw_output_contents[:]
                answer.parameters[FINAL].bool_param = True
                await write(response)
            finally:
                stream.notes.add(rpc.notes)

    async def _respond(self, door: Door, rpc: Rpc, raw: bytes, response: Any, write: Write) -> None:
        await door.admit(rpc)  # again: a key may have been revoked since the stream began
        request, answer, within_s = parse(InferRequest, raw), response.infer_response, rpc.within_s
        answer.id, answer.model_name = request.id, request.model_name
        model = await kserve_path.find(self._gateway, request.model_name, request.model_version)
        answer.model_version = model.version
        body = grpc_tensors.read(request)
        call = kserve_path.generation(body, rpc, model, self._defaults, within_s)
        if call is not None and call.request.stream:
            return await self._chunks(rpc, call, response, write)
        result = await kserve_path.infer(self._gateway, body, rpc, model, call, within_s)
        answer.model_version = result.version
        answer.parameters[FINAL].bool_param = True
        grpc_tensors.fill(answer, result.outputs)
        await write(response)

    async def _chunks(self, rpc: Rpc, call: Call, response: Any, write: Write) -> None:
        """A response a chunk."""
        answer, shown, reason = response.infer_response, kserve_path.Shown(call), None
        final = answer.parameters[FINAL]
        async with aclosing(self._gateway.generate(rpc.caller, call.request, rpc.notes)) as chunks:
            async for chunk in chunks:
                reason = chunk.finish_reason
                del answer.outputs[:], answer.raw_output_contents[:]
                grpc_tensors.fill(answer, shown.tensors(chunk))
                final.bool_param = reason is not None
                await write(response)
        if reason is None:
            raise UpstreamError("the answer has no end")
