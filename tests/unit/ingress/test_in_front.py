"""An ingress before the application: what clients get, and what is left when they, the engine or the ingress go."""

import asyncio
import hashlib
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from flexpiped.admission import AdmissionLimits
from flexpiped.api.metrics import Endpoint
from flexpiped.keys import Client, KeyRing, Scope
from tests.support.fake_own_server import EVENTS, cut, fake_own_server, for_ever, streaming
from tests.support.hanging_up import leave_at_random
from tests.support.http_app import CAPABILITIES, FakeEngines, http_app, saying
from tests.support.ingress import InFront, in_front_of
from tests.support.unread import LEAST_BUFFER_BYTES, unread
from tests.support.until import until

pytestmark = pytest.mark.real_loop
FOREVER = {"prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True}
ONE_AT_A_TIME = AdmissionLimits(max_requests_in_flight=1)


@asynccontextmanager
async def fronted(**options: Any) -> AsyncIterator[InFront]:
    async with http_app(**options) as app, in_front_of(app) as front:
        yield front


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def answer_of(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[int, Any, Any]:
    """Return status, headers and the answer without what differs from one time to the next."""
    async with session.post(url, json=body) as answer:
        text = await answer.text()
    ids = {word for word in text.replace('"', " ").split() if word.startswith(("cmpl-", "chatcmpl-"))}
    for each in ids:
        text = text.replace(each, "ID")
    return answer.status, answer.headers.get("Retry-After"), text


CHAT = {"messages": [{"role": "user", "content": "x"}]}
BODIES = [
    ("/v1/completions", {"prompt": "x", "stream": True, "stream_options": {"include_usage": True}}),
    ("/v1/completions", {"prompt": ["x", "yz"], "n": 2, "max_tokens": 5}),
    ("/v1/completions", {"prompt": "x", "stop": ["a t"], "logprobs": 0}),
    ("/v1/completions", {"prompt": "x", "model": "nobody's"}),
    ("/v1/completions", {"prompt": "x", "max_tokens": 100_000}),
    ("/v1/completions", {"prompt": "x", "temperature": "hot"}),
    ("/v1/chat/completions", {**CHAT, "stream": True}),
    ("/v1/chat/completions", {**CHAT, "max_tokens": 3}),
    ("/v1/chat/completions", {**CHAT, "tools": 3}),
    ("/v1/embeddings", {"input": "x"}),
    ("/tokenize", {"prompt": "Once"}),
    ("/nowhere", {}),
]


@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_it_answers_as_the_daemon_does(session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> None:
    async with fronted() as front:
        told = await answer_of(session, front.url + path, body)

        assert told == await answer_of(session, front.app.url + path, body)
        await until(front.is_idle)


async def test_requests_are_counted_once_and_by_the_daemon(session: aiohttp.ClientSession) -> None:
    async with fronted() as front:
        for body in ({"prompt": "x", "max_tokens": 5}, {"prompt": "x", "n": 0}):
            await answer_of(session, f"{front.url}/v1/completions", body)
        await until(front.is_idle)
        async with session.get(f"{front.url}/metrics") as answer:
            shown = set((await answer.text()).splitlines())

        assert {
            'flexpiped_requests_total{endpoint="completions",outcome="done"} 1.0',
            'flexpiped_requests_total{endpoint="completions",outcome="refused"} 1.0',
            "flexpiped_request_completion_tokens_total 5.0",
            "flexpiped_time_to_first_token_seconds_count 1.0",
            "flexpiped_time_per_output_token_seconds_count 1.0",
            "flexpiped_requests_in_flight 0.0",
        } <= shown


async def test_what_is_full_is_full_for_all(session: aiohttp.ClientSession) -> None:
    async with fronted(limits=ONE_AT_A_TIME) as front:
        front.app.engines.last.hold()
        waiting = asyncio.create_task(answer_of(session, f"{front.app.url}/v1/completions", FOREVER))
        await until(lambda: front.app.backend.admission.requests_in_flight == 1)
        status, retry_after, text = await answer_of(session, f"{front.url}/v1/completions", FOREVER)
        waiting.cancel()

        assert (status, retry_after) == (429, "1")
        assert "too_many_requests_in_flight" in text


async def test_a_deadline_ends_the_request_there_too(session: aiohttp.ClientSession) -> None:
    async with fronted() as front:
        front.app.engines.last.hold()
        headers = {"X-Request-Deadline-Ms": "50"}
        async with session.post(f"{front.url}/v1/completions", json=FOREVER, headers=headers) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (503, "deadline_exceeded")
        await until(front.is_idle)


@pytest.mark.parametrize(
    ("send_deadline_s", "headers"),
    [(0.2, {}), (math.inf, {"X-Request-Deadline-Ms": "1500"})],
    ids=["nothing taken", "its own deadline"],
)
async def test_a_client_that_reads_nothing_leaves_nothing_behind(
    send_deadline_s: float, headers: dict[str, str]
) -> None:
    most = 10_000
    capabilities = replace(CAPABILITIES, max_model_len=most + 50)
    engines = FakeEngines(next_token=saying("", then=[40]), capabilities=capabilities)
    async with (
        http_app(engines=engines) as app,
        in_front_of(app, send_deadline_s=send_deadline_s, send_buffer_bytes=LEAST_BUFFER_BYTES) as front,
        unread(front.url, FOREVER | {"max_tokens": most}, headers=headers),
    ):
        await until(lambda: front.desk.requests_in_flight == 1)
        await until(front.is_idle)
        shown = app.backend.metrics.render(None).decode().splitlines()

    assert 'flexpiped_requests_total{endpoint="completions",outcome="disconnected"} 1.0' in shown


async def test_a_deadline_of_what_the_engines_own_server_answers(
    session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    server = fake_own_server(tmp_path, answer=streaming(EVENTS[0], then=for_ever))
    async with server as own, fronted(engines=FakeEngines(own_socket=own.socket)) as front:
        headers = {"X-Request-Deadline-Ms": "300"}
        async with session.post(f"{front.url}/v1/completions", json=FOREVER | {"n": 2}, headers=headers) as answer:
            first, last, rest = (await answer.read()).split(b"\n\n")
        assert (answer.status, first + b"\n\n", rest) == (200, EVENTS[0], b"")
        assert b'"code":"deadline_exceeded"' in last
        await until(lambda: own.open == 0)
        await until(front.is_idle)


async def test_a_deadline_counts_while_others_are_served(session: aiohttp.ClientSession) -> None:
    limits = AdmissionLimits(max_requests_in_flight=1, max_requests_queued=1)
    async with fronted(limits=limits) as front:
        front.app.engines.last.hold()
        first = asyncio.create_task(answer_of(session, f"{front.url}/v1/completions", FOREVER))
        await until(lambda: front.desk.requests_in_flight == 1)
        headers = {"X-Request-Deadline-Ms": "50"}
        async with session.post(f"{front.url}/v1/completions", json=FOREVER, headers=headers) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (503, "deadline_exceeded")
        assert front.desk.requests_in_flight == 1
        first.cancel()
        await until(front.is_idle)


async def test_an_engine_that_dies_is_no_end_of_a_stream(session: aiohttp.ClientSession) -> None:
    engines = FakeEngines(next_token=saying("", then=[40, 41]))
    async with fronted(engines=engines) as front:
        engines.last.hold()
        asked = asyncio.create_task(answer_of(session, f"{front.url}/v1/completions", FOREVER))
        await until(lambda: front.desk.requests_in_flight == 1)
        engines.last.kill("for a test")
        status, _, text = await asked

        assert (status, text.count('"text"')) == (200, 200)


async def test_keys_are_asked_for_and_count_for_their_owner(session: aiohttp.ClientSession) -> None:
    alice = Client(name="alice", scopes=frozenset({Scope.INFER}), max_requests_in_flight=1)
    ring = KeyRing(hashes=(hashlib.sha256(b"secret").digest(),), clients=(alice,))
    async with fronted(keys=lambda: ring) as front:
        front.app.engines.last.hold()
        status, _, _ = await answer_of(session, f"{front.url}/v1/completions", FOREVER)
        assert status == 401
        key = {"Authorization": "Bearer secret"}
        async with session.get(f"{front.url}/metrics", headers=key) as answer:
            assert answer.status == 403
        asked = asyncio.create_task(session.post(f"{front.url}/v1/completions", json=FOREVER, headers=key))
        await until(lambda: front.app.backend.admission.in_flight_of(alice) == 1)
        async with session.post(f"{front.url}/v1/completions", json=FOREVER, headers=key) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (429, "key_concurrency_exceeded")
        asked.cancel()
        await until(front.is_idle)


async def test_200_clients_that_leave_at_random_leave_nothing_behind() -> None:
    engines = FakeEngines(next_token=saying("", then=[40, 41]))
    async with fronted(engines=engines, limits=AdmissionLimits(max_requests_in_flight=16)) as front:
        await leave_at_random(front.url, clients=200, at_once=40, max_tokens=100)
        await until(front.is_idle)


async def test_an_ingress_that_dies_leaves_nothing_behind(session: aiohttp.ClientSession) -> None:
    async with fronted() as front:
        front.app.engines.last.hold()
        limits = AdmissionLimits(max_requests_in_flight=3, max_requests_queued=2)
        front.app.backend.admission.limits = limits  # type: ignore[attr-defined]
        url = f"{front.url}/v1/completions"
        asked = [asyncio.create_task(answer_of(session, url, FOREVER)) for _ in range(5)]
        await until(lambda: front.desk.num_open == 5 + 5 + 3)  # observations, leases, streams
        front.kill()
        answers = await asyncio.gather(*asked)
        await front.desk.close()

        assert {status for status, _, _ in answers} == {503}
        await until(front.app.is_idle)
        shown = front.app.backend.metrics.registry.get_sample_value  # type: ignore[attr-defined]
        labels = {"endpoint": Endpoint.COMPLETIONS.value, "outcome": "disconnected"}
        assert shown("flexpiped_requests_total", labels) == 5.0


async def test_what_only_the_engines_server_has_is_asked_of_it_directly(
    session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    async with fake_own_server(tmp_path) as server, fronted(engines=FakeEngines(own_socket=server.socket)) as front:
        told = await answer_of(session, f"{front.url}/v1/embeddings", {"input": "x"})

        assert told == await answer_of(session, f"{front.app.url}/v1/embeddings", {"input": "x"})
        assert told[0] == 200
        await until(front.is_idle)


async def test_an_engine_that_dies_over_it_for_one_without_a_server(
    session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    async def change(http: web.Request) -> web.StreamResponse:
        front.app.engines.own_socket = None  # what is made from now on has none
        front.app.engines.last.kill("killed by the test")
        await cut(http)
        await for_ever(http)
        raise AssertionError

    engines = fake_own_server(tmp_path, answer=change)
    async with engines as server, fronted(engines=FakeEngines(own_socket=server.socket)) as front:
        status, _, text = await answer_of(session, f"{front.url}/v1/embeddings", {"input": "x"})

        assert (status, '"code":"no_such_route"' in text) == (404, True)
        assert len(front.app.engines.made) == 2
        await until(front.is_idle)


async def test_what_was_tokenized_for_another_model_is_refused(session: aiohttp.ClientSession) -> None:
    """The daemon has another model under the same name, and this ingress has not been told yet."""
    async with http_app() as app, in_front_of(app, serial=app.backend.serial + 1) as front:
        status, retry_after, text = await answer_of(session, f"{front.url}/v1/completions", FOREVER)

        assert (status, retry_after) == (503, "1")
        assert "has just been replaced" in text
        await until(front.is_idle)
