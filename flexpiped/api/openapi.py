"""``/openapi.json``: what this server takes and answers now, with the engine that it has. Pure.

The schemas of requests are those of the tables that validate them (``parameter_table``, ``text_routes``).
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Final

from engines.protocol import EngineCapabilities
from flexpiped.api import openapi_answers as answers
from flexpiped.api.adapter_routes import (
    LOAD_NEUTRAL,
    LOAD_READERS,
    LOAD_REQUIRED,
    UNLOAD_READERS,
    UNLOAD_REQUIRED,
)
from flexpiped.api.deadline import HEADER, LONGEST_MS
from flexpiped.api.fields import TOKEN_ID, Reader
from flexpiped.api.forwarding import OWN_PATHS
from flexpiped.api.inputs import MESSAGES_WITH_TOOLS
from flexpiped.api.parameter_table import CHAT_PARAMETERS, COMPLETION_PARAMETERS, HonouredBy, Parameter
from flexpiped.api.parameters import taken_here
from flexpiped.api.text_routes import (
    DETOKENIZE_READERS,
    TOKENIZE_NEUTRAL,
    TOKENIZE_READERS,
    TOKENIZE_READERS_WITH_TOOLS,
)
from flexpiped.api.tools import TOOLS
from flexpiped.api.unsupported import NeutralValues

Schema = Mapping[str, Any]
_ANY: Final[Schema] = {}
# Of those, the engine's own server takes more than the daemon does.
_WIDER_THERE: Final = frozenset({"model", "prompt", "messages", "stream_options"})
_THERE: Final = (HonouredBy.OWN_SERVER, HonouredBy.OWN_SERVER_OR_DAEMON)
_OUTPUT_TOKENS: Final = frozenset({"max_tokens", "max_completion_tokens", "min_tokens"})
_STREAM_FIRST: Final[Schema] = {  # "stream_options" needs "stream"
    "anyOf": [
        {"properties": {"stream": {"const": True}}, "required": ["stream"]},
        {"properties": {"stream_options": {"type": "null"}}},
    ]
}
_DEADLINE: Final[Schema] = {
    "name": HEADER,
    "in": "header",
    "required": False,
    "schema": {"type": "integer", "minimum": 1, "maximum": LONGEST_MS},
    "description": "how long the client will wait for the whole of its answer",
}


def describe(
    *,
    model: str,
    capabilities: EngineCapabilities | None,
    version: str,
    asks_for_keys: bool,
    calls_tools: bool = False,
) -> dict[str, Any]:
    """Return the OpenAPI document of the HTTP port.

    Args:
        capabilities: Of the engine; None while there is none yet.
        calls_tools: It is known how the model calls tools.
    """
    engine = "none yet" if capabilities is None else capabilities.name
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "flexpiped",
            "version": version,
            "description": f"OpenAI-compatible API of the model {model}, served by the {engine} engine.",
        },
        "paths": {
            **_reading(),
            **_generating(model, capabilities, calls_tools),
            **_of_text(model, capabilities, calls_tools),
            **_of_engine(),
            **_of_adapters(),
        },
        "components": {"schemas": answers.SCHEMAS},
    }
    if asks_for_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, item in document["paths"].items():
            if path not in ("/healthz", "/readyz"):
                for operation in item.values():
                    operation["security"] = [{"key": []}]
    return document


def _generating(model: str, capabilities: EngineCapabilities | None, calls_tools: bool) -> dict[str, Any]:
    completion = request_schema(COMPLETION_PARAMETERS, required="prompt", model=model, capabilities=capabilities)
    chat = request_schema(
        CHAT_PARAMETERS, required="messages", model=model, capabilities=capabilities, calls_tools=calls_tools
    )
    return {
        "/v1/completions": _post("Complete a prompt", completion, "Completion", is_streamed=True),
        "/v1/chat/completions": _post("Answer messages", chat, "ChatCompletion", is_streamed=True),
    }


def _of_text(model: str, capabilities: EngineCapabilities | None, calls_tools: bool) -> dict[str, Any]:
    if capabilities is not None and capabilities.own_server is not None:
        encoding: Schema = {"type": "object"}
        decoding = encoding
    else:
        with_tools = taken_here(capabilities, calls_tools=calls_tools) >= TOOLS
        ours = TOKENIZE_READERS_WITH_TOOLS if with_tools else TOKENIZE_READERS
        tools = {"tools": _or_null(ours["tools"].schema)} if with_tools else {}
        readers = {name: _or_null(reader.schema) for name, reader in TOKENIZE_READERS.items()} | {
            "model": _model_name(model, capabilities)
        }
        neutral = {name: _only(values) for name, values in TOKENIZE_NEUTRAL.items()}
        shared = {name: each for name, each in readers.items() if name not in ("prompt", "messages")}
        encoding = {
            "anyOf": [
                _object({"prompt": {"type": "string"}, **shared, **neutral}, required=["prompt"]),
                _object(
                    {
                        "messages": ours["messages"].schema,
                        **shared,
                        "add_special_tokens": _only((False,)),
                        **neutral,
                        **tools,
                    },
                    required=["messages"],
                ),
            ]
        }
        tokens = _within(DETOKENIZE_READERS["tokens"].schema, capabilities)
        decoding = _object({"model": readers["model"], "tokens": tokens}, required=["tokens"])
    return {
        "/tokenize": _post("Token ids of a prompt or of messages", encoding, "Tokens"),
        "/detokenize": _post("Text of token ids", decoding, "Text"),
    }


def _of_engine() -> dict[str, Any]:
    """Describe routes that the engine's own server answers, where it has one and knows them."""
    return {
        path: {
            "post": {
                "summary": "Passed on to the engine's own server; 404 with the reason where there is none",
                "requestBody": _body({"type": "object"}),
                "responses": {"200": _content("the engine's answer", _ANY, "text/event-stream"), **answers.ERRORS},
            }
        }
        for path in OWN_PATHS
    }


def _of_adapters() -> dict[str, Any]:
    def changing(
        summary: str, readers: Mapping[str, Reader[Any]], neutral: NeutralValues, required: Sequence[str]
    ) -> Any:
        properties = {
            name: {**reader.schema, "minLength": 1} if name in required else _or_null(reader.schema)
            for name, reader in readers.items()
        }
        request = _object(
            {**properties, **{name: _only(values) for name, values in neutral.items()}}, required=[*required]
        )
        told = {"description": "done", "content": {"text/plain": {"schema": {"type": "string"}}}}
        return {
            "post": {"summary": summary, "requestBody": _body(request), "responses": {"200": told, **answers.ERRORS}}
        }

    return {
        "/v1/load_lora_adapter": changing(
            "Serve one more LoRA adapter, for holders of a key with scope admin",
            LOAD_READERS,
            LOAD_NEUTRAL,
            LOAD_REQUIRED,
        ),
        "/v1/unload_lora_adapter": changing(
            "Serve a LoRA adapter no more, for holders of a key with scope admin", UNLOAD_READERS, {}, UNLOAD_REQUIRED
        ),
    }


def _model_name(model: str, capabilities: EngineCapabilities | None) -> dict[str, Any]:
    adapters = () if capabilities is None else capabilities.adapters
    return _or_null({"enum": [model, *adapters]} if adapters else {"const": model})


def _reading() -> dict[str, Any]:
    def get(summary: str, schema: str, **more: Any) -> dict[str, Any]:
        responses = {"200": _content("", _ref(schema)), **answers.READ_ERRORS}
        return {"get": {"summary": summary, "responses": responses, **more}}

    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    ready = get("Requests are served", "Readiness")
    ready["get"]["responses"] = {"200": _content("", _ref("Readiness")), "503": _content("", _ref("Readiness"))}
    metrics = {"200": {"description": "for Prometheus", "content": {"text/plain": {"schema": {"type": "string"}}}}}
    return {
        "/v1/models": get("The models that are served", "Models"),
        "/v1/models/{model}": get("One model", "Model", parameters=[name]),
        "/version": get("Which flexpiped, and which engine", "Version"),
        "/openapi.json": get("This document", "Document"),
        "/healthz": get("The process answers", "Liveness"),
        "/readyz": ready,
        "/metrics": {"get": {"summary": "Metrics", "responses": metrics | answers.READ_ERRORS}},
    }


def request_schema(
    table: Mapping[str, Parameter],
    *,
    required: str,
    model: str,
    capabilities: EngineCapabilities | None,
    calls_tools: bool = False,
) -> dict[str, Any]:
    """Return the schema of a request with the parameters of ``table``, as they are taken with this engine."""
    taken = taken_here(capabilities, calls_tools=calls_tools)
    properties = {name: _parameter(name, parameter, capabilities, taken) for name, parameter in table.items()}
    own = None if capabilities is None else capabilities.own_server
    if own is None:
        properties["model"] = _model_name(model, capabilities)
        reader = MESSAGES_WITH_TOOLS if required == "messages" and taken >= TOOLS else table[required].reader
        properties[required] = {} if reader is None else _within(reader.schema, capabilities)
    required_names = [required] if own is None else []  # "prompt_embeds" may stand for a prompt there
    return {**_object(properties, required=required_names), **_STREAM_FIRST}


def _parameter(
    name: str, parameter: Parameter, capabilities: EngineCapabilities | None, taken: Set[str]
) -> dict[str, Any]:
    told = f"honoured by: {parameter.by.value}"
    own = None if capabilities is None else capabilities.own_server
    if own is not None and (name in _WIDER_THERE or parameter.by in _THERE):
        return {"description": told}
    if parameter.reader is None or (parameter.by is not HonouredBy.DAEMON and name not in taken):
        return {**_only(parameter.neutral), "description": f"{told}; not with this engine"}
    schema = _within(parameter.reader.schema, capabilities)
    if name in _OUTPUT_TOKENS and capabilities is not None:
        schema["maximum"] = capabilities.max_model_len - 1  # the prompt has one token at least
    return {**_or_null(schema), "description": told}


def _within(schema: Schema, capabilities: EngineCapabilities | None) -> dict[str, Any]:
    """Return ``schema`` with the vocabulary's bound wherever it has a token id."""
    found = {name: _each_within(value, capabilities) for name, value in schema.items()}
    if schema is TOKEN_ID and capabilities is not None:
        found["maximum"] = capabilities.vocab_size - 1
    return found


def _each_within(value: Any, capabilities: EngineCapabilities | None) -> Any:
    if isinstance(value, list):
        return [_each_within(each, capabilities) for each in value]
    return _within(value, capabilities) if isinstance(value, Mapping) else value


def _only(values: Iterable[Any]) -> dict[str, Any]:
    return {"enum": [None, *values]}


def _or_null(schema: Schema) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _object(properties: Mapping[str, Any], *, required: list[str]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": required,
        "additionalProperties": False,
    }


def _post(summary: str, request: Schema, answer: str, *, is_streamed: bool = False) -> dict[str, Any]:
    streamed = ("text/event-stream",) if is_streamed else ()
    return {
        "post": {
            "summary": summary,
            "parameters": [_DEADLINE],
            "requestBody": _body(request),
            "responses": {"200": _content("the answer", _ref(answer), *streamed), **answers.ERRORS},
        }
    }


def _body(schema: Schema) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _content(description: str, schema: Schema, *others: str) -> dict[str, Any]:
    """Describe an answer in JSON, or as events of the types ``others``."""
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    return {
        "description": description,
        "content": content | {each: {"schema": answers.EVENT} for each in others},
    }


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}
