"""An adapter is chosen by its name in place of the model's."""

from collections.abc import AsyncIterator
from dataclasses import replace

import aiohttp
import pytest

from engines.fake import FAKE_CAPABILITIES
from engines.protocol import GenerationRequest, SamplingParams
from engines.validation import unknown_parameter
from tests.support.http_app import CAPABILITIES, MODEL, FakeEngines, HttpApp, http_app, saying

pytestmark = pytest.mark.real_loop
ADAPTED = replace(CAPABILITIES, adapters=("sql", "de"))


def by_adapter(request: GenerationRequest, position: int) -> int:
    return saying(request.sampling.adapter or "none")(request, position)


@pytest.fixture
async def app() -> AsyncIterator[HttpApp]:
    async with http_app(engines=FakeEngines(next_token=by_adapter, capabilities=ADAPTED)) as app:
        yield app
        await app.becomes_idle()


@pytest.mark.parametrize(("model", "text"), [("sql", "sql"), ("de", "de"), (MODEL, "none"), (None, "none")])
async def test_its_name_stands_for_the_models(
    app: HttpApp, session: aiohttp.ClientSession, model: str | None, text: str
) -> None:
    body = {"prompt": "x", "max_tokens": 20} | ({} if model is None else {"model": model})
    async with session.post(f"{app.url}/v1/completions", json=body) as response:
        answer = await response.json()
    assert (answer["choices"][0]["text"], answer["model"]) == (text, model or MODEL)


async def test_another_name_is_refused_with_those_that_there_are(app: HttpApp, session: aiohttp.ClientSession) -> None:
    async with session.post(f"{app.url}/v1/completions", json={"prompt": "x", "model": "other"}) as response:
        error = (await response.json())["error"]
    assert (response.status, error["code"]) == (404, "model_not_found")
    assert error["message"].endswith(f"this server has '{MODEL}', 'sql', 'de'")


async def test_they_are_listed_beside_their_model(app: HttpApp, session: aiohttp.ClientSession) -> None:
    async with session.get(f"{app.url}/v1/models") as response:
        cards = (await response.json())["data"]
    assert [(card["id"], card.get("parent")) for card in cards] == [(MODEL, None), ("sql", MODEL), ("de", MODEL)]
    async with session.get(f"{app.url}/v1/models/sql") as response:
        assert (await response.json())["parent"] == MODEL


def test_an_engine_without_it_cannot_go_on_with_the_request() -> None:
    sampling = SamplingParams(max_tokens=3, adapter="sql")
    assert unknown_parameter(sampling, ADAPTED) is None
    assert unknown_parameter(sampling, FAKE_CAPABILITIES) == "model"
