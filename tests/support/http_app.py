"""The HTTP application over a real socket, with the fake engine behind it."""

import math
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from aiohttp import web

from engines.fake import FAKE_CAPABILITIES, RICH_CAPABILITIES, FakeEngine
from engines.fake_batch import NextToken
from engines.protocol import EngineCapabilities, GenerationRequest
from engines.restarts import RestartPolicy
from engines.text.local import LocalText, PlainTokenizer
from engines.text.protocol import Text
from flexpiped.admission import Admission, AdmissionLimits
from flexpiped.api.app import create_app
from flexpiped.api.backend import Backend
from flexpiped.api.metrics import Metrics
from flexpiped.api.tool_syntax import ToolCalls
from flexpiped.connections import ConnectionLimits
from flexpiped.keys import KeyRing
from flexpiped.load_monitor import LoadSampler
from flexpiped.servers import listen_tcp, serving, url_of
from flexpiped.service import TRACED
from flexpiped.status import Health, ServiceState
from flexpiped.supervision import SupervisorState
from flexpiped.supervisor import Supervisor
from flexpiped.tracing import Handovers, Spans, TracedLoad, traced
from planner.layout import Pipeline, pipeline_of
from tests.support.fake_own_server import EngineWithServer, with_server
from tests.support.tiny_tokenizer import byte_level_tokenizer
from tests.support.until import until

_NONE: Final[Mapping[str, Any]] = MappingProxyType({})
MODEL = "tiny/model"
EOS_ID = 1
CREATED_UNIX_S = 1_700_000_000
CAPABILITIES = replace(
    FAKE_CAPABILITIES, vocab_size=byte_level_tokenizer().get_vocab_size(), eos_token_ids=(EOS_ID,), max_model_len=256
)
RICH = replace(CAPABILITIES, top_logprobs=True, engine_params=RICH_CAPABILITIES.engine_params)
ONE = pipeline_of(device_ids=["cpu:0"], cuts=[], num_decoders=8)


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(byte_level_tokenizer().encode(text, add_special_tokens=False).ids)


def saying(text: str, *, then: Sequence[int] = (EOS_ID,)) -> NextToken:
    """Return a token source that spells ``text`` and then gives ``then`` for ever, whatever the prompt."""
    spelled = (*ids_of(text), *then)

    def next_token(_request: GenerationRequest, position: int) -> int:
        return spelled[min(position, len(spelled) - 1)]

    return next_token


@dataclass(kw_only=True)
class FakeEngines:
    """Makes fake engines; ``next_token`` and ``step_s`` hold for those made from then on.

    ``own_socket`` is where the engines' own server listens, if they have one.
    """

    next_token: NextToken | None = None
    step_s: float = 0.0
    own_socket: Path | None = None
    args: tuple[str, ...] = ()
    capabilities: EngineCapabilities = CAPABILITIES
    made: list[FakeEngine] = field(default_factory=list)

    def make(self, pipeline: Pipeline, epoch: int) -> FakeEngine:
        engine = EngineWithServer(
            pipeline=pipeline,
            epoch=epoch,
            capabilities=with_server(self.capabilities, args=self.args) if self.own_socket else self.capabilities,
            next_token=self.next_token,
            step_s=self.step_s,
        )
        if self.own_socket:
            engine.own_routes_socket = self.own_socket
        self.made.append(engine)
        return engine

    @property
    def last(self) -> FakeEngine:
        return self.made[-1]


@dataclass(kw_only=True)
class HttpApp:
    """A server under test and what stands behind it."""

    url: str
    backend: Backend
    engines: FakeEngines
    app: web.Application

    async def is_idle(self) -> bool:
        """Nothing of any request is left, anywhere."""
        counters = await self.engines.last.counters()
        admission = self.backend.admission
        return (
            (counters.running, counters.waiting, counters.kv_blocks_used) == (0, 0, 0)
            and (admission.requests_in_flight, admission.tokens_in_flight, admission.requests_queued) == (0, 0, 0)
            and getattr(self.backend.text, "num_open", 0) == 0
        )

    async def becomes_idle(self, *, within_s: float = 10.0) -> None:
        await until(self.is_idle, timeout_s=within_s)


def health_of(supervisor: Supervisor) -> Callable[[], Health]:
    states = {
        SupervisorState.STARTING: ServiceState.STARTING,
        SupervisorState.READY: ServiceState.READY,
        SupervisorState.RECOVERING: ServiceState.RECOVERING,
        SupervisorState.FAILED: ServiceState.FAILED,
        SupervisorState.CLOSING: ServiceState.DRAINING,
    }
    return lambda: Health(state=states[supervisor.supervision.state], reason=supervisor.supervision.reason)


@asynccontextmanager
async def http_app(
    *,
    engines: FakeEngines | None = None,
    text: Text | None = None,
    limits: AdmissionLimits = AdmissionLimits(),
    policy: RestartPolicy = RestartPolicy(first_delay_s=0.0),
    max_body_bytes: int = 1 << 20,
    body_deadline_s: float = 60.0,
    keys: Callable[[], KeyRing | None] = lambda: None,
    spans: Spans | None = None,
    handovers: Handovers | None = None,
    sampling_defaults: Mapping[str, Any] = _NONE,
    tool_calls: ToolCalls | None = None,
    port: int = 0,
    send_deadline_s: float = math.inf,
    send_buffer_bytes: int | None = None,
) -> AsyncIterator[HttpApp]:
    """Serve on 127.0.0.1 while the scope lasts, at any free port if none is given.

    Seeds are 7, the time of creation is fixed. ``send_buffer_bytes``: the kernel's, of each connection.
    """
    engines = engines or FakeEngines(next_token=saying("Once upon a time"))
    supervisor = Supervisor(factory=engines.make, pipeline=ONE, policy=policy)
    await supervisor.start()
    backend = Backend(
        model=MODEL,
        serving=supervisor,
        text=text or LocalText(PlainTokenizer(byte_level_tokenizer())),
        admission=Admission(limits=limits),
        metrics=Metrics(listener=None if spans is None else TracedLoad(LoadSampler())),
        health=health_of(supervisor),
        keys=keys,
        body_deadline_s=body_deadline_s,
        sampling_defaults=sampling_defaults,
        tool_calls=tool_calls,
        new_seed=lambda: 7,
        wall_clock=lambda: float(CREATED_UNIX_S),
        created_unix_s=CREATED_UNIX_S,
        death_noticed_s=0.1,
    )
    listener = listen_tcp("127.0.0.1", port)
    if send_buffer_bytes is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    connections = ConnectionLimits(send_deadline_s=send_deadline_s)
    url = url_of(listener)
    outermost = () if spans is None else (traced(spans, handovers=handovers or Handovers(), paths=TRACED),)
    app: web.Application = create_app(backend, max_body_bytes=max_body_bytes, outermost=outermost)
    try:
        async with serving(app, listener, shutdown_s=1.0, limits=connections):
            yield HttpApp(url=url, backend=backend, engines=engines, app=app)
    finally:
        await supervisor.close()
