"""``/tokenize``, ``/detokenize``, ``/version`` and ``/openapi.json`` over a real socket."""

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import jsonschema
import pytest

import flexpiped
from tests.support.http_app import MODEL, HttpApp, http_app, ids_of
from tests.support.tiny_tokenizer import BOS

pytestmark = pytest.mark.real_loop
TEXT = "Once 漢字 🙂 upon"


@pytest.fixture
async def app() -> AsyncIterator[HttpApp]:
    async with http_app() as app:
        yield app
        await app.becomes_idle()


@pytest.fixture
async def session(app: HttpApp) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(app.url) as session:
        yield session


async def answer_to(session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    async with session.post(path, json=body) as response:
        answer = await response.json()
    return response.status, answer if response.status == 200 else answer["error"]


async def test_a_prompt_there_and_back(session: aiohttp.ClientSession) -> None:
    status, answer = await answer_to(session, "/tokenize", {"model": MODEL, "prompt": TEXT})
    tokens = [0, *ids_of(TEXT)]
    assert (status, answer) == (
        200,
        {"count": len(tokens), "max_model_len": 256, "tokens": tokens, "token_strs": None},
    )
    status, answer = await answer_to(session, "/detokenize", {"tokens": tokens})
    assert (status, answer) == (200, {"prompt": BOS + TEXT})


async def test_a_prompt_without_special_tokens(session: aiohttp.ClientSession) -> None:
    _status, answer = await answer_to(session, "/tokenize", {"prompt": TEXT, "add_special_tokens": False})
    assert answer["tokens"] == list(ids_of(TEXT))


async def test_messages(session: aiohttp.ClientSession) -> None:
    _status, answer = await answer_to(session, "/tokenize", {"messages": [{"role": "user", "content": "hello"}]})
    assert answer["tokens"] == [0, *ids_of("user: hello\nassistant: ")]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, 400, "prompt"),
        ("/tokenize", {"prompt": [5]}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "return_token_strs": True}, 400, "return_token_strs"),
        ("/tokenize", {"prompt": "x", "max_tokens": 5}, 400, "max_tokens"),
        ("/tokenize", {"prompt": "x", "model": "other"}, 404, "model"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "x"}], "add_special_tokens": True},
            400,
            "add_special_tokens",
        ),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": [10**6]}, 400, "tokens"),
        ("/detokenize", {"tokens": "x"}, 400, "tokens"),
        ("/detokenize", {"tokens": [5], "model": "other"}, 404, "model"),
    ],
)
async def test_refusals(
    session: aiohttp.ClientSession, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    found, error = await answer_to(session, path, body)
    assert (found, error["param"]) == (status, param)


async def test_the_version(session: aiohttp.ClientSession) -> None:
    async with session.get("/version") as response:
        assert await response.json() == {"version": flexpiped.__version__, "engine": "fake"}


async def test_the_description_has_every_route(app: HttpApp, session: aiohttp.ClientSession) -> None:
    async with session.get("/openapi.json") as response:
        document = await response.json()
    jsonschema.Draft202012Validator.check_schema(
        document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    )
    assert "securitySchemes" not in document["components"]
    described = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    served = {
        (route.method, route.resource.canonical)
        for route in app.app.router.routes()
        if route.method != "HEAD" and route.resource is not None
    }
    assert described == served
