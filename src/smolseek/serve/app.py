"""The server's endpoints."""

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError, StarletteHTTPException
from fastapi.responses import HTMLResponse, JSONResponse, Response

from smolseek import __version__, console
from smolseek.api import Model
from smolseek.errors import SmolseekError
from smolseek.generate.request import QueueFull
from smolseek.serve import endpoints
from smolseek.serve.answers import Answer, CompletionAnswer
from smolseek.serve.errors import FAILED, ApiError, end_error, shutting_down
from smolseek.serve.guard import DETAILS, Guard
from smolseek.serve.jobs import Job, chat_job, completion_job
from smolseek.serve.metrics import CONTENT_TYPE, Metrics
from smolseek.serve.playground import playground
from smolseek.serve.schema import ChatRequest, CompletionRequest, GenerationRequest
from smolseek.serve.settings import Settings
from smolseek.serve.stream import EventStream, event, when_client_goes
from smolseek.serve.vocabulary import Vocabulary
from smolseek.serve.worker import Delta, Ticket, Worker

T = TypeVar("T")


class Service:
    """A model behind HTTP: the endpoints, and what they share.

    Args:
        model: the model.
        worker: the thread that generates text.
        settings: the options of the server.
        metrics: the server's counters.
    """

    def __init__(self, model: Model, worker: Worker, settings: Settings, metrics: Metrics) -> None:
        self.model, self.worker, self.settings, self.metrics = model, worker, settings, metrics
        self.name = served_name(model.name)
        self.draining = False
        """Whether new requests are refused."""
        self.active: set[Ticket] = set()
        """Requests whose answer is not complete."""
        self._started = int(time.time())
        self._vocabulary = Vocabulary(model.tokenizer)
        # One thread, since it is not documented which methods of a tokenizer may run at the same time.
        self._tokenization = ThreadPoolExecutor(1, "tokenizer")
        self._rendering = ThreadPoolExecutor(1, "answers")
        self._preparing = 0
        """Number of requests that the thread prepares, or that wait for it."""

    async def models(self) -> dict[str, Any]:
        """List the server's model."""
        return {"object": "list", "data": [self._entry()]}

    async def retrieve_model(self, name: str) -> dict[str, Any]:
        """Describe the server's model."""
        self._require_name(name)
        return self._entry()

    async def health(self) -> Response:
        """Tell whether the server takes requests."""
        status = "draining" if self.draining else "failed" if self.worker.failure else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def counters(self) -> Response:
        """Return the counters for Prometheus."""
        return Response(self.metrics.text(self.worker.stats), media_type=CONTENT_TYPE)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer a conversation with the model's chat template."""
        prepare = functools.partial(chat_job, body, self.model, self.settings, time.monotonic())
        return await self._generate(body, request, prepare, Answer)

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """Continue texts."""
        prepare = functools.partial(completion_job, body, self.model, self.settings, time.monotonic())
        return await self._generate(body, request, prepare, CompletionAnswer)

    async def _generate(
        self, body: GenerationRequest, request: Request, prepare: Callable[[], Job], kind: type[Answer]
    ) -> Response:
        if self.draining:
            raise shutting_down()
        self._require_name(body.model)
        job = await self._prepare(prepare)
        if self.settings.log_prompts:
            for prompt in job.prompts:
                console.say(f"prompt: {console.printable(self.model.tokenizer.decode(list(prompt)))}")
        try:
            ticket = await self.worker.submit(job.texts)
        except QueueFull as error:
            raise _queue_full(str(error)) from None
        if self.draining:  # since the beginning of this method
            self.worker.cancel(ticket)
            raise shutting_down()
        answer = kind(job, self.name, self._vocabulary)
        self.active.add(ticket)

        def leave() -> None:
            self.worker.cancel(ticket)

        def close() -> None:
            self.worker.cancel(ticket)
            self.active.discard(ticket)
            request.scope[DETAILS] = _details(answer)

        if job.stream:
            return EventStream(self._events(answer, _deltas(ticket)), leave, close)
        try:
            with when_client_goes(request.receive, leave):
                deltas = [delta async for delta in _deltas(ticket)]
                return await self._render(lambda: JSONResponse(answer.complete(deltas)))
        finally:
            close()

    async def _events(self, answer: Answer, deltas: AsyncIterator[Delta]) -> AsyncIterator[bytes]:
        """Yield the events of a stream, one or several at a time."""
        for chunk in answer.first_chunks():
            yield event(chunk)
        async for delta in deltas:
            render = functools.partial(_rendered, answer, delta)
            yield await self._render(render) if delta.reports_prompt else render()
        if answer.job.include_usage:
            yield event(answer.usage_chunk())

    async def _render(self, render: Callable[[], T]) -> T:
        """Run `render` in the thread for answers that may be large, so that the other requests do not wait for it."""
        return await asyncio.get_running_loop().run_in_executor(self._rendering, render)

    async def _prepare(self, prepare: Callable[[], Job]) -> Job:
        """Run `prepare` in the thread of the tokenizer, unless so many requests wait for it as may wait or run."""
        if self._preparing >= self.settings.max_queue + self.settings.max_sequences:
            raise _queue_full(f"{self._preparing} requests wait for the tokenizer already: try again later")
        self._preparing += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._tokenization, prepare)
        finally:
            self._preparing -= 1

    def _require_name(self, name: str | None) -> None:
        if name is not None and name not in (self.name, self.model.name, self.name.rpartition("/")[2]):
            message = f"the model {name[:100]!r} does not exist here: use {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _entry(self) -> dict[str, Any]:
        config = self.model.config
        weight = self.model.model.lm_head.weight
        details = {
            "context": config.max_position_embeddings,
            "vocab_size": config.vocab_size,
            "moe_layers": [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)],
            "n_routed_experts": config.n_routed_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "chat_template": bool(self.model.tokenizer.chat_template),
            "number_format": self.model.number_format,
            "cache_bytes_per_token": config.cache_features * config.num_hidden_layers * weight.dtype.itemsize,
        }
        entry = {"id": self.name, "object": "model", "created": self._started, "owned_by": "smolseek"}
        return entry | {"smolseek": details}


async def _deltas(ticket: Ticket) -> AsyncIterator[Delta]:
    """Yield what is new in the texts of a ticket until all of them have ended.

    Raises:
        ApiError: if a text has ended without an answer.
    """
    finished = 0
    while finished < len(ticket.texts):
        delta = await ticket.deltas.get()
        if delta.end is not None:
            finished += 1
            if error := end_error(delta.end):
                raise error
        yield delta


def _rendered(answer: Answer, delta: Delta) -> bytes:
    return b"".join(event(chunk) for chunk in answer.chunks(delta))


def _details(answer: Answer) -> str:
    """Return the numbers of an answer for the log."""
    usage, texts = answer.usage(), len(answer.job.texts)
    if len(answer.finished) < texts:
        return f"{texts - len(answer.finished)} of {texts} texts not finished"
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    reasons = ", ".join(sorted({end.reason for end in answer.finished.values()}))
    return f"prompt {usage['prompt_tokens']} tokens ({cached} cached), {usage['completion_tokens']} new, {reasons}"


def _queue_full(message: str) -> ApiError:
    return ApiError(429, message, code="queue_full", retry_after=1)


def served_name(name: str) -> str:
    """Return the name that clients use for the model: without the folders of this machine."""
    path = Path(name)
    return path.resolve().name if path.exists() else name


def create_app(service: Service) -> Guard:
    """Return the ASGI application of a server."""
    app = FastAPI(title="smolseek", version=__version__, docs_url=None, redoc_url=None)
    app.add_api_route("/v1/models", service.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", service.retrieve_model, methods=["GET"])
    app.add_api_route("/v1/chat/completions", service.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/completions", service.complete, methods=["POST"], response_model=None)
    app.add_api_route("/health", service.health, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", service.counters, methods=["GET"], response_model=None)
    page = endpoints.page(app.openapi())

    async def docs() -> Response:
        return HTMLResponse(page, headers=endpoints.HEADERS)

    app.add_api_route("/docs", docs, methods=["GET"], include_in_schema=False)
    app.include_router(playground())
    for kind in (ApiError, SmolseekError, RequestValidationError, StarletteHTTPException, Exception):
        app.add_exception_handler(kind, _answer_error)
    return Guard(app, service.settings, service.metrics)


async def _answer_error(_request: Request, error: Exception) -> Response:
    """Return an error in OpenAI's form."""
    api_error = to_api_error(error)
    headers = dict(api_error.headers)
    if isinstance(error, StarletteHTTPException):
        headers |= error.headers or {}
    return JSONResponse(api_error.body(), api_error.status, headers)


def to_api_error(error: Exception) -> ApiError:
    """Return the error that a client gets for an exception."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, SmolseekError):
        return ApiError(400, str(error))
    if isinstance(error, RequestValidationError):
        return _validation_error(error)
    if isinstance(error, StarletteHTTPException):
        messages = {
            400: "the body is not valid JSON",
            404: "there is no such path: /docs lists the endpoints",
            405: "this path does not have this method: /docs lists the endpoints",
        }
        return ApiError(error.status_code, messages.get(error.status_code, str(error.detail)))
    return ApiError(500, FAILED)


def _validation_error(error: RequestValidationError) -> ApiError:
    """Return one message for the first field with a wrong value."""
    errors = error.errors()
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']} at character {first['loc'][1]}")
    field = str(first["loc"][1]) if len(first["loc"]) > 1 else None
    if field is None:
        return ApiError(400, "the body is not a JSON object: send an object with the fields of the request")
    if first["type"] == "missing" and len(first["loc"]) == 2:
        return ApiError(400, f"{field} is missing: set this field", param=field)
    of_field = [one for one in errors if len(one["loc"]) > 1 and one["loc"][1] == first["loc"][1]]
    expected = dict.fromkeys(one["msg"].removeprefix("Input should be ") for one in of_field)
    return ApiError(400, f"{field[:100]} has a wrong value: expected {', or '.join(expected)}", param=field[:100])
