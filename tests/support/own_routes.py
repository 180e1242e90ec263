"""The daemon's HTTP API in front of a real engine that has been started, and what tests ask of it."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import aiohttp

from engines.native.adapter import NativeEngine
from engines.protocol import Engine
from engines.sglang.adapter import SglangEngine
from engines.text.client import TextService
from engines.vllm.adapter import VllmEngine
from flexpiped.admission import Admission, AdmissionLimits
from flexpiped.api.app import create_app
from flexpiped.api.backend import Backend
from flexpiped.api.metrics import Metrics
from flexpiped.api.tool_syntax import ToolCalls
from flexpiped.servers import listen_tcp, serving, url_of
from flexpiped.supervisor import Supervisor
from tests.support.http_app import health_of
from tests.support.until import until

WORD, OTHER = "string", "get"  # one token each
ANSWER = {"type": "string", "enum": ["red", "green"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "colour", "schema": ANSWER}}
TOOL = {
    "type": "function",
    "function": {
        "name": "paint",
        "strict": True,  # else any JSON will do for arguments
        "parameters": {
            "type": "object",
            "properties": {"colour": ANSWER},
            "required": ["colour"],
            "additionalProperties": False,
        },
    },
}


class Started:
    """An engine that its fixture has started, and closes."""

    def __init__(self, engine: VllmEngine | SglangEngine | NativeEngine) -> None:
        self._engine = engine

    async def start(self, **_unused: object) -> None:
        """Nothing is left to do."""

    async def close(self) -> None:
        """The fixture does it."""

    # named here, as a check of a protocol does not find what __getattr__ has

    @property
    def own_routes_socket(self) -> Path:
        return self._served.own_routes_socket

    @property
    def own_routes_key(self) -> str:
        return self._served.own_routes_key

    @property
    def _served(self) -> VllmEngine | SglangEngine:
        assert not isinstance(self._engine, NativeEngine)
        return self._engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Api:
    """The daemon's API in front of ``engine``."""

    session: aiohttp.ClientSession
    url: str
    backend: Backend
    engine: VllmEngine | SglangEngine | NativeEngine

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        async with self.session.post(f"{self.url}{path}", json=body) as response:
            return response.status, await response.json()

    async def completion(self, **body: Any) -> dict[str, Any]:
        """Return the answer to a greedy request for 8 tokens after a fixed prompt."""
        status, answer = await self.post(
            "/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0, **body}
        )
        assert status == 200, answer
        found: dict[str, Any] = answer
        return found

    async def chat(self, **body: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": "Which colour?"}]
        status, answer = await self.post(
            "/v1/chat/completions", {"messages": messages, "max_tokens": 40, "temperature": 0, **body}
        )
        assert status == 200, answer
        found: dict[str, Any] = answer
        return found

    async def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Return what a stream sends before [DONE]."""
        async with self.session.post(f"{self.url}{path}", json={**body, "stream": True}) as response:
            assert response.headers["Content-Type"].startswith("text/event-stream")
            *events, done, rest = (await response.text()).split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    async def token(self, word: str) -> int:
        (token_id,) = (await self.backend.text.encode(word))[1:]  # after that of the beginning
        return token_id

    async def names(self, schema: str) -> set[str]:
        """Return the fields of a request model of the engine's own server."""
        assert not isinstance(self.engine, NativeEngine)
        async with own_server_of(self.engine) as session, session.get("/openapi.json") as response:
            return set((await response.json())["components"]["schemas"][schema]["properties"])

    async def becomes_idle(self) -> None:
        async def is_idle() -> bool:
            counters = await self.engine.counters()
            return counters.running + counters.waiting == 0

        await until(is_idle)
        assert self.backend.admission.requests_in_flight == 0


@asynccontextmanager
async def own_server_of(engine: VllmEngine | SglangEngine) -> AsyncIterator[aiohttp.ClientSession]:
    """Yield a session with the engine's own server, past the daemon."""
    headers = {"Authorization": f"Bearer {engine.own_routes_key}"}
    connector = aiohttp.UnixConnector(str(engine.own_routes_socket), force_close=True)  # theirs end when they like
    async with aiohttp.ClientSession("http://engine", connector=connector, headers=headers) as session:
        yield session


@asynccontextmanager
async def api_before(
    engine: VllmEngine | SglangEngine | NativeEngine, *, model: Path, tool_calls: ToolCalls | None = None
) -> AsyncIterator[Api]:
    """Serve ``engine``, which has been started, under the name that it has or that of the directory ``model``."""
    text = TextService(model=model)
    await text.start()
    supervisor = Supervisor(factory=lambda _pipeline, _epoch: cast("Engine", Started(engine)), pipeline=engine.pipeline)
    await supervisor.start()
    backend = Backend(
        model=model.name if isinstance(engine, NativeEngine) else engine.options.served_model_name,
        serving=supervisor,
        text=text,
        admission=Admission(limits=AdmissionLimits()),
        metrics=Metrics(),
        health=health_of(supervisor),
        tool_calls=tool_calls,
    )
    listener = listen_tcp("127.0.0.1", 0)
    url = url_of(listener)
    async with serving(create_app(backend), listener, shutdown_s=1.0), aiohttp.ClientSession() as session:
        yield Api(session=session, url=url, backend=backend, engine=engine)
    await supervisor.close()
    await text.close()
