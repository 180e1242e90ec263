"""A request for the engine's own server: passed on as it is, and the answer as it comes.

Nothing is kept of it. Before the client has got anything of the answer, an engine that dies is no harm: the request is
asked again. After that, a stream ends with an error event.
"""

import asyncio
from contextlib import suppress
from typing import Final

import msgspec
from aiohttp import ClientConnectionResetError, web

from engines.errors import EngineDied, EngineError
from engines.offers import OwnRoutes
from engines.protocol import EngineCapabilities
from flexpiped.api.access import client_of
from flexpiped.api.backend import Backend, Reached, backend_of, own_routes_of
from flexpiped.api.deadline import InMidStream, InTime, deadline_of
from flexpiped.api.errors import ApiError, ErrorType, from_engine_error
from flexpiped.api.event_stream import EventStream
from flexpiped.api.fields import Body
from flexpiped.api.hop_headers import NOT_ANSWERED, OF_ONE_HOP, without
from flexpiped.api.metrics import Observation
from flexpiped.api.outcomes import Outcome, outcome_of
from flexpiped.api.own_answer import Answer, asked
from flexpiped.api.own_bodies import refuse_unfit
from flexpiped.api.wire import error_event
from flexpiped.supervision import FRUITLESS_DEATHS
from flexpiped.tracing import headers_to_pass_on

# Paths of OpenAI-like servers that the daemon has nothing for; a server that has one of them not says so itself.
OWN_PATHS: Final = (
    *("/v1/responses", "/v1/messages", "/v1/messages/count_tokens"),
    *("/v1/embeddings", "/pooling", "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
)
GENERATING_PATHS: Final = ("/v1/responses", "/v1/messages")
_UNKNOWN_PATH: Final = b'{"detail":"Not Found"}'  # which is all that servers of this kind say of one
_USAGE: Final = b'"usage":{'
_BYTES_PER_TOKEN: Final = 4  # of a prompt that is not tokenized here: for admission only
# The body was decompressed and read as JSON, whatever the client called it.
_NOT_ASKED: Final = OF_ONE_HOP | {"host", "content-type", "content-encoding", "accept-encoding"}


class _Unanswered(Exception):
    """The engine's server is gone, and the client has got nothing of the answer."""


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0


class _Answer(msgspec.Struct):
    usage: _Usage | None = None


async def forward(
    http: web.Request, observation: Observation, raw: bytes, body: Body, *, default_tokens: int | None
) -> web.StreamResponse:
    """Admit the request and have the engine's own server answer it.

    Args:
        default_tokens: Output tokens where the request does not say; None stands for the context.

    Raises:
        ApiError, EngineError, Overloaded: Before anything was sent.
        ClientStoppedReading
    """
    backend = backend_of(http)
    max_model_len = backend.ensure_serving().max_model_len
    observation.asks()
    deadline_s = deadline_of(http)
    async with backend.admission.admit(client_of(http), deadline_s=deadline_s) as lease:
        tokens = tokens_expected(body, num_bytes=len(raw), default=default_tokens, max_model_len=max_model_len)
        await backend.admission.reserve(lease, tokens=tokens)
        observation.admitted()
        async with InTime(deadline_s) as limit:
            return await _answered(http, observation, raw, body, limit)


async def _answered(
    http: web.Request, observation: Observation, raw: bytes, body: Body, limit: asyncio.Timeout
) -> web.StreamResponse:
    """Ask one engine after the other until one has an answer. Raises: ApiError, EngineError, ClientStoppedReading."""
    backend = backend_of(http)
    engine: Reached | None = None
    for _ in range(FRUITLESS_DEATHS):
        engine = await backend.serving.ready_engine(other_than=engine)
        own = own_routes_of(engine)
        if own is None:  # the kind of engine was changed while the request waited
            raise no_such_route(http.path, engine=engine.capabilities.name)
        refuse_unfit(body, served=backend.model, capabilities=engine.capabilities)
        try:
            return await _answer_of(engine, own, http, observation, raw, limit)
        except _Unanswered as lost:
            if not await _is_gone(engine, backend):
                raise EngineError(f"the engine's own server ended the connection: {lost}") from lost
    raise EngineDied(f"the engine died {FRUITLESS_DEATHS} times in a row over this request")


def tokens_expected(body: Body, *, num_bytes: int, default: int | None, max_model_len: int) -> int:
    """Estimate prompt and output tokens together, for admission: its prompt is tokenized elsewhere."""
    names = ("max_completion_tokens", "max_tokens", "max_output_tokens")
    given = next((count for name in names if (count := _count_in(body, name))), None)
    output = min(given or (max_model_len if default is None else default), max_model_len)
    return min(num_bytes // _BYTES_PER_TOKEN, max_model_len) + (_count_in(body, "n") or 1) * output


def _count_in(body: Body, name: str) -> int:
    """Return a positive integer, 0 where there is none: what is wrong is the server's to refuse."""
    value = body.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


async def _is_gone(engine: Reached, backend: Backend) -> bool:
    """Say whether the engine has died or been replaced, giving the news the time that it takes to arrive."""
    if backend.serving.is_in_force(engine):
        with suppress(TimeoutError):
            async with asyncio.timeout(backend.death_noticed_s):
                await engine.died()
                return True
    return not backend.serving.is_in_force(engine)


async def _answer_of(
    engine: Reached,
    own: OwnRoutes,
    http: web.Request,
    observation: Observation,
    raw: bytes,
    limit: asyncio.Timeout,
) -> web.StreamResponse:
    """Ask this engine, which ``own`` is, too. Leaving on any path closes the connection: its server ends the request.

    Raises:
        _Unanswered
        ApiError: Its server does not have the path.
    """
    with await _asked(own, http, raw) as answer:
        if answer.content_type == "text/event-stream":
            return await _pass_on(http, answer, observation, limit)
        try:
            whole = await answer.read()
        except OSError as error:
            raise _Unanswered(str(error)) from error
        if answer.status in (500, 503) and await _is_gone(engine, backend_of(http)):
            raise _Unanswered(whole.decode(errors="replace"))
        if answer.status == 404 and whole == _UNKNOWN_PATH:
            raise _no_route_there(http.path, engine.capabilities, model=backend_of(http).model)
        _count(whole, observation)
        observation.outcome = Outcome.DONE if answer.status < 400 else outcome_of(answer.status)
        return web.Response(status=answer.status, body=whole, headers=without(NOT_ANSWERED, answer.headers))


async def _asked(engine: OwnRoutes, http: web.Request, raw: bytes) -> Answer:
    """Return the answer once its head has come.

    Raises:
        _Unanswered
    """
    key = engine.own_routes_key
    ours = {"authorization"} if key or backend_of(http).keys() is not None else set()
    context = headers_to_pass_on()
    passed_on = without(_NOT_ASKED | ours | set(context), http.headers)
    headers = [("Host", "localhost"), *passed_on, *context.items(), ("Content-Type", "application/json")]
    if key:
        headers.append(("Authorization", f"Bearer {key}"))
    try:
        return await asked(engine.own_routes_socket, method=http.method, target=http.path_qs, headers=headers, body=raw)
    except OSError as error:
        raise _Unanswered(str(error)) from error


class _Events:
    """A stream as it comes, cut between events, so that one of ours can follow anywhere."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._rest = b""

    async def more(self) -> bytes:
        """Return one event or several, at the end with what follows the last one; nothing: it is over.

        Raises:
            _Unanswered
        """
        while True:
            try:
                data = self._rest + await self._answer.more()
            except OSError as error:
                raise _Unanswered(str(error)) from error
            if self._answer.is_whole:
                self._rest = b""
                return data
            events, end, self._rest = data.rpartition(b"\n\n")
            if end:
                return events + end


async def _pass_on(
    http: web.Request, answer: Answer, observation: Observation, limit: asyncio.Timeout
) -> web.StreamResponse:
    """Send events as they come. The head waits for the first of them, so that until then the request can go elsewhere.

    Raises:
        _Unanswered: Before the first event.
        ClientStoppedReading
    """
    events = _Events(answer)
    first = await events.more()
    observation.began()
    response = EventStream(status=answer.status, headers=without(NOT_ANSWERED, answer.headers))
    try:
        await response.prepare(http)
        try:
            async with InMidStream(limit, http):
                await _send(response, first, answer)
                _count_events(first, observation)
                while data := await events.more():
                    await _send(response, data, answer)
                    _count_events(data, observation)
        except (ApiError, _Unanswered) as error:
            told = error if isinstance(error, ApiError) else _died(error)
            await response.write(error_event(told))
            observation.outcome = outcome_of(told.status, told.code)
            return response
        observation.outcome = Outcome.DONE
    except ClientConnectionResetError:
        observation.outcome = Outcome.DISCONNECTED
    return response


async def _send(response: EventStream, events: bytes, answer: Answer) -> None:
    await (response.write_eof(events) if answer.is_whole else response.write(events))


def _died(lost: _Unanswered) -> ApiError:
    died = EngineDied(f"the engine died during the answer, which only its own server could go on with: {lost}")
    return from_engine_error(died)


def _count_events(events: bytes, observation: Observation) -> None:
    """Note the tokens that the last of the events with any tells: they are those of the answer so far."""
    at = events.rfind(_USAGE)
    while at >= 0:
        begin, end = events.rfind(b"\n", 0, at) + 1, events.find(b"\n", at)
        line = events[begin:] if end < 0 else events[begin:end]
        if _count(line.strip(b"\r").removeprefix(b"data: "), observation):
            return
        at = events.rfind(_USAGE, 0, at)


def _count(answer: bytes, observation: Observation) -> bool:
    """Note the tokens where the answer tells them; say whether it does."""
    with suppress(msgspec.DecodeError, UnicodeDecodeError):
        usage = msgspec.json.decode(answer, type=_Answer).usage
        if usage is not None:
            observation.prompt_tokens = usage.prompt_tokens
            observation.completion_tokens = usage.completion_tokens or 0
            return True
    return False


def _no_route_there(path: str, engine: EngineCapabilities, *, model: str) -> ApiError:
    does = "generates" if engine.generates else "does not generate"
    return ApiError(
        status=404,
        type=ErrorType.NOT_FOUND,
        message=f"POST {path}: {model} {does}, and the {engine.name} engine's own server has no such route for it",
        code="no_such_route",
    )


def no_such_route(path: str, *, engine: str) -> ApiError:
    return ApiError(
        status=404,
        type=ErrorType.NOT_FOUND,
        message=f"POST {path}: the {engine} engine has no server of its own that could answer this",
        code="no_such_route",
    )
