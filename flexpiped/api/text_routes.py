"""``/tokenize`` and ``/detokenize`` as vLLM's server has them: by the daemon where no server of the engine does."""

from collections.abc import Mapping
from typing import Any, Final

import msgspec
from aiohttp import web

from engines.protocol import EngineCapabilities
from flexpiped.api.access import client_of
from flexpiped.api.backend import Backend
from flexpiped.api.chat_options import CHAT_OPTIONS, read_chat_options
from flexpiped.api.chat_options import READERS as CHAT_OPTION_READERS
from flexpiped.api.deadline import deadline_of
from flexpiped.api.errors import invalid
from flexpiped.api.fields import Body, Reader, boolean, parse_object, refuse_unknown, text, token_ids
from flexpiped.api.forwarding import forward
from flexpiped.api.handlers import observed, read_body
from flexpiped.api.inputs import MESSAGES, MESSAGES_WITH_TOOLS
from flexpiped.api.metrics import Endpoint
from flexpiped.api.outcomes import Outcome
from flexpiped.api.parameters import ensure_in_vocabulary, ensure_model, taken_here
from flexpiped.api.tools import READERS as TOOL_READERS
from flexpiped.api.tools import TOOLS
from flexpiped.api.unsupported import NeutralValues, refuse_unsupported

TOKENIZE_READERS: Final[Mapping[str, Reader[Any]]] = {
    "model": text,
    "prompt": text,
    "messages": MESSAGES,
    "add_special_tokens": boolean,  # of a prompt; a chat template writes its own
    **CHAT_OPTION_READERS,
}
TOKENIZE_NEUTRAL: Final[NeutralValues] = {
    "chat_template": (),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "return_token_strs": (False,),
    "tools": ([],),
}
# Where the model is known to call tools, which are part of the prompt that its chat template makes.
TOKENIZE_READERS_WITH_TOOLS: Final[Mapping[str, Reader[Any]]] = {
    **TOKENIZE_READERS,
    "messages": MESSAGES_WITH_TOOLS,
    "tools": TOOL_READERS["tools"],
}
DETOKENIZE_READERS: Final[Mapping[str, Reader[Any]]] = {"model": text, "tokens": token_ids}


async def tokenize(http: web.Request) -> web.StreamResponse:
    """POST /tokenize: the token ids of a prompt, or of messages in the model's chat template."""
    return await _answer(http, is_decoding=False)


async def detokenize(http: web.Request) -> web.StreamResponse:
    """POST /detokenize: the text of token ids"""
    return await _answer(http, is_decoding=True)


async def _answer(http: web.Request, *, is_decoding: bool) -> web.StreamResponse:
    async with observed(http, Endpoint.ENGINE) as (backend, observation):
        capabilities = backend.ensure_serving()
        raw = await read_body(http)
        body = parse_object(raw)
        if (own := capabilities.own_server) is not None and own.tokenizes:
            return await forward(http, observation, raw, body, default_tokens=0)
        async with backend.admission.admit(client_of(http), deadline_s=deadline_of(http)):
            if is_decoding:
                answer = await _decoded(backend, body, vocab_size=capabilities.vocab_size)
            else:
                answer = await _encoded(backend, body, capabilities=capabilities)
        observation.outcome = Outcome.DONE
        return web.Response(body=msgspec.json.encode(answer), content_type="application/json")


async def _encoded(backend: Backend, body: Body, *, capabilities: EngineCapabilities) -> dict[str, Any]:
    calls_tools = taken_here(capabilities, calls_tools=backend.tool_calls is not None) >= TOOLS
    readers = TOKENIZE_READERS_WITH_TOOLS if calls_tools else TOKENIZE_READERS
    refuse_unknown(body, TOKENIZE_READERS.keys() | TOKENIZE_NEUTRAL.keys())
    refuse_unsupported(body, TOKENIZE_NEUTRAL, taken=readers.keys())
    given = {name: read(body, name) for name, read in readers.items()}
    ensure_model(given["model"], served=backend.model, adapters=capabilities.adapters)
    prompt, messages, special = given["prompt"], given["messages"], given["add_special_tokens"]
    if (prompt is None) == (messages is None):
        raise invalid("give prompt or messages, and one of them only", param="prompt", code="contradiction")
    if messages is not None and special:
        message = "add_special_tokens is not supported with messages; leave it out or give false"
        raise invalid(message, param="add_special_tokens", code="unsupported_parameter")
    offered, _functions = given.get("tools") or ((), ())
    if prompt is not None and offered:
        raise invalid("tools go with messages only", param="tools", code="contradiction")
    options = read_chat_options(body, taken=CHAT_OPTIONS)
    if prompt is not None:
        tokens = await backend.text.encode(prompt, add_special_tokens=special is not False)
    else:
        tokens = await backend.text.chat(messages or (), tools=offered, options=options)
    return {"count": len(tokens), "max_model_len": capabilities.max_model_len, "tokens": tokens, "token_strs": None}


async def _decoded(backend: Backend, body: Body, *, vocab_size: int) -> dict[str, Any]:
    refuse_unknown(body, DETOKENIZE_READERS)
    given = {name: read(body, name) for name, read in DETOKENIZE_READERS.items()}
    ensure_model(given["model"], served=backend.model)
    if given["tokens"] is None:
        raise invalid("tokens is required", param="tokens", code="missing_parameter")
    ensure_in_vocabulary("tokens", given["tokens"], vocab_size)
    return {"prompt": await backend.text.decode(given["tokens"])}
