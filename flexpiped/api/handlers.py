"""The endpoints that generate. Admission, request and stream are scopes: leaving them on any path gives all back."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace

from aiohttp import web

from engines.closing import closing
from engines.errors import EngineError
from engines.protocol import EngineCapabilities, GenerationRequest
from engines.text.protocol import Text
from flexpiped.admission import Overloaded
from flexpiped.api import routing
from flexpiped.api.access import client_of
from flexpiped.api.backend import Backend, backend_of, choose
from flexpiped.api.backends import BACKENDS
from flexpiped.api.bad_words import bad_words_as_tokens
from flexpiped.api.deadline import InTime, deadline_of
from flexpiped.api.errors import ApiError, from_engine_error, from_http_status, from_overloaded, invalid
from flexpiped.api.fields import parse_object
from flexpiped.api.forwarding import GENERATING_PATHS, forward, no_such_route
from flexpiped.api.generation import Job, ReadsCalls, choices_of, reads_calls
from flexpiped.api.inputs import Prompt
from flexpiped.api.jobs import jobs_of
from flexpiped.api.metrics import Endpoint, Observation
from flexpiped.api.outcomes import outcome_of
from flexpiped.api.parameters import (
    DEFAULT_COMPLETION_TOKENS,
    Parameters,
    ensure_generates,
    ensure_model,
    sampling_of,
)
from flexpiped.api.routing import ToEngine, route
from flexpiped.api.sampling_defaults import MAX_TOKENS, with_defaults
from flexpiped.api.sending import send_events, send_whole
from flexpiped.api.tool_grammar import grammar_with_calls
from flexpiped.api.wire import ChatWire, CompletionWire, Head
from flexpiped.supervision import model_ends
from flexpiped.tracing import note_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What sets completions and chat apart once the request has been read."""

    wire: type[CompletionWire] | type[ChatWire]
    id_prefix: str
    prompt_name: str
    default_tokens: int | None  # None: the rest of the context


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A prompt as token ids; ``text`` where it was given as that."""

    token_ids: tuple[int, ...]
    text: str | None = None


COMPLETION = Kind(wire=CompletionWire, id_prefix="cmpl", prompt_name="prompt", default_tokens=DEFAULT_COMPLETION_TOKENS)
CHAT = Kind(wire=ChatWire, id_prefix="chatcmpl", prompt_name="messages", default_tokens=None)


async def completions(http: web.Request) -> web.StreamResponse:
    """POST /v1/completions"""
    async with observed(http, Endpoint.COMPLETIONS) as (backend, observation):
        raw = await read_body(http)
        body, capabilities = parse_object(raw), backend.serving.capabilities
        defaulted = with_defaults(body, backend.sampling_defaults, capabilities)
        asked = route(routing.COMPLETIONS, defaulted, served=backend.model, capabilities=capabilities)
        if isinstance(asked, ToEngine):
            return await forward(http, observation, raw, body, default_tokens=COMPLETION.default_tokens)
        prompts = asked.prompts

        async def encoded() -> list[Encoded]:
            return [await encode(backend.text, each) for each in prompts]

        return await answer(http, observation, COMPLETION, asked.parameters, encoded)


async def chat_completions(http: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions"""
    async with observed(http, Endpoint.CHAT) as (backend, observation):
        raw = await read_body(http)
        body, capabilities = parse_object(raw), backend.serving.capabilities
        defaulted = with_defaults(body, backend.sampling_defaults, capabilities)
        calls = backend.tool_calls
        asked = route(
            routing.CHAT,
            defaulted,
            served=backend.model,
            capabilities=capabilities,
            calls_tools=calls is not None,
        )
        if isinstance(asked, ToEngine):
            return await forward(http, observation, raw, body, default_tokens=CHAT.default_tokens)
        messages, tools, options = asked.messages, asked.tools, asked.options
        offered = () if tools is None else tools.given

        async def encoded() -> list[Encoded]:
            return [Encoded(token_ids=await backend.text.chat(messages, tools=offered, options=options))]

        if tools is None or calls is None:
            return await answer(http, observation, CHAT, asked.parameters, encoded)
        grammar = grammar_with_calls(tools, calls, content=asked.parameters.grammar)
        parameters = replace(asked.parameters, grammar=grammar)
        return await answer(http, observation, CHAT, parameters, encoded, reads=reads_calls(tools, calls))


async def engine_route(http: web.Request) -> web.StreamResponse:
    """POST to a path that only an engine's own server has"""
    async with observed(http, Endpoint.ENGINE) as (backend, observation):
        capabilities = backend.ensure_serving()
        if capabilities.own_server is None:
            raise no_such_route(http.path, engine=capabilities.name)
        if http.path in GENERATING_PATHS:
            ensure_generates(capabilities, model=backend.model)
        raw = await read_body(http)
        default_tokens = None if http.path in GENERATING_PATHS else 0
        return await forward(http, observation, raw, parse_object(raw), default_tokens=default_tokens)


async def answer(
    http: web.Request,
    observation: Observation,
    kind: Kind,
    parameters: Parameters,
    encoded: Callable[[], Awaitable[list[Encoded]]],
    *,
    reads: ReadsCalls | None = None,
) -> web.StreamResponse:
    """Admit, encode, check against the model, generate, send.

    Args:
        encoded: Gives the prompts once the request has been admitted.
        reads: How calls of tools are read from the output, where it may have some.

    Raises:
        ApiError, EngineError, Overloaded: Before anything was sent.
    """
    backend = backend_of(http)
    capabilities = backend.ensure_serving()
    ensure_model(parameters.model, served=backend.model, adapters=capabilities.adapters)
    name = parameters.model or backend.model
    observation.asks()
    deadline_s = deadline_of(http)
    async with backend.admission.admit(client_of(http), deadline_s=deadline_s) as lease:
        prompts, choices = await encoded(), parameters.choices
        adapter = "" if name == backend.model else name
        answer_id = f"{kind.id_prefix}-{uuid.uuid4().hex}"
        requests = await _requests(backend, parameters, kind, capabilities, answer_id, prompts, adapter=adapter)
        tokens = sum(len(each.prompt_token_ids) + each.sampling.max_tokens for each in requests)
        await backend.admission.reserve(lease, tokens=choices.best_of * tokens)
        observation.admitted()
        observation.prompt_tokens = sum(len(each.token_ids) for each in prompts)
        head = Head(answer_id=answer_id, created_unix_s=int(backend.wall_clock()), model=name)
        made = len(requests) * choices.best_of
        wire = kind.wire(head, include_usage=parameters.include_usage, choices=made, top=choices.logprobs)
        jobs: list[Job] = []
        for prompt, request in zip(prompts, requests, strict=True):
            ends, lead = model_ends(request.sampling, capabilities), ""
            if choices.echo:
                lead = await backend.text.decode(prompt.token_ids) if prompt.text is None else prompt.text
            jobs += jobs_of(parameters, request, ends=ends, lead=lead, first=len(jobs), reads=reads)
        async with InTime(deadline_s) as limit, closing(choices_of(backend, jobs)) as pieces:
            if parameters.stream:
                return await send_events(
                    http,
                    pieces,
                    wire,
                    observation,
                    limit=limit,
                    include_usage=parameters.include_usage,
                    choices=made,
                )
            return await send_whole(
                pieces, wire, observation, made=choices.best_of, wanted=choices.n, prompts=len(requests)
            )


async def encode(text: Text, prompt: Prompt) -> Encoded:
    """Return a prompt that may be given as token ids."""
    if isinstance(prompt, str):
        return Encoded(token_ids=await text.encode(prompt), text=prompt)
    return Encoded(token_ids=prompt)


async def _requests(
    backend: Backend,
    parameters: Parameters,
    kind: Kind,
    capabilities: EngineCapabilities,
    answer_id: str,
    prompts: Sequence[Encoded],
    *,
    adapter: str,
) -> list[GenerationRequest]:
    """Return what the engine is asked for each prompt. Raises: ApiError."""
    bad_words = await bad_words_as_tokens(backend.text, parameters.engine_params.get("bad_words", ()))
    return [
        GenerationRequest(
            request_id=answer_id if not index else f"{answer_id}-prompt-{index}",
            prompt_token_ids=prompt.token_ids,
            sampling=sampling_of(
                parameters,
                prompt=prompt.token_ids,
                prompt_name=kind.prompt_name,
                default_tokens=kind.default_tokens or backend.sampling_defaults.get(MAX_TOKENS),
                capabilities=capabilities,
                new_seed=backend.new_seed(),
                adapter=adapter,
                bad_words=bad_words,
            ),
        )
        for index, prompt in enumerate(prompts)
    ]


@asynccontextmanager
async def observed(http: web.Request, endpoint: Endpoint) -> AsyncIterator[tuple[Backend, Observation]]:
    """Find the backend that a request is for, and observe the request as one of that model's.

    Raises:
        ApiError
    """
    backends = http.app[BACKENDS]
    try:
        name = parse_object(await read_body(http)).get("model") if backends.are_named() else None
        backend = backends.of(name)
    except BaseException:
        with backends.unnamed.observe(endpoint) as nobodys, errors_translated(nobodys):
            raise
    choose(http, backend)
    note_model(backend.model)
    with backend.metrics.observe(endpoint) as observation, errors_translated(observation), backend.uses.one():
        yield backend, observation


async def read_body(http: web.Request) -> bytes:
    """Raises: ApiError, when the body does not decompress or ends early; HTTPRequestEntityTooLarge, unread."""
    if (http.content_length or 0) > http.client_max_size:
        raise web.HTTPRequestEntityTooLarge(max_size=http.client_max_size, actual_size=http.content_length or 0)
    deadline_s = None if http.content.is_eof() else http.app[BACKENDS].body_deadline_s()  # most come with the head
    try:
        async with asyncio.timeout(deadline_s):
            return await http.read()
    except TimeoutError:
        raise from_http_status(408, message="the body did not arrive in time") from None
    except web.RequestPayloadError:  # what it says in words is aiohttp's own
        coding = http.headers.get("Content-Encoding", "")
        why = f"it is no {coding}, or ends early" if coding else "it ends early"
        raise invalid(f"the body cannot be read: {why}", param=None, code="invalid_body") from None


@contextmanager
def errors_translated(observation: Observation) -> Iterator[None]:
    """Turn what is raised before an answer began into ``ApiError``, and note how the request ended."""
    try:
        yield
    except ApiError as error:
        observation.outcome = outcome_of(error.status, error.code)
        raise
    except (EngineError, Overloaded) as error:
        translated = from_overloaded(error) if isinstance(error, Overloaded) else from_engine_error(error)
        observation.outcome = outcome_of(translated.status, translated.code)
        raise translated from error
    except web.HTTPException as error:
        observation.outcome = outcome_of(error.status)
        raise
