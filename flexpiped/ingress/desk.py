"""The daemon's side of one ingress process: does what it asks, and keeps what it has under way.

Each lease, stream and question is a task, which ``End`` cancels; each request that is counted is an open scope. When
the connection ends, all of them end, so nothing of an ingress that died is left.
"""

import asyncio
import math
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from typing import Any
from weakref import WeakValueDictionary

from engines.closing import closing
from engines.errors import EngineError
from flexpiped import log_events
from flexpiped.admission import Lease, Overloaded
from flexpiped.api.backend import Backend, own_routes_of
from flexpiped.api.backends import Backends
from flexpiped.api.errors import ApiError, ErrorType, from_engine_error, from_overloaded, unavailable
from flexpiped.api.metrics import Metrics, Observation
from flexpiped.ingress.messages import (
    Admit,
    Arrived,
    AwaitDeath,
    Began,
    Board,
    Boarded,
    Done,
    Down,
    End,
    Finished,
    Generate,
    Reserve,
    Up,
    Waited,
    refused,
    tokens_of,
)

Work = Admit | Reserve | Generate | Board | AwaitDeath
_BUG = "the server failed at this request; its log says where"


class Desk:
    """Used on one event loop. ``send`` is given what goes to the ingress, in order."""

    def __init__(self, backends: Backends, *, send: Callable[[Down], None]) -> None:
        self._backends = backends
        self._send = send
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._leases: dict[int, Lease] = {}
        self._observed: dict[int, tuple[Observation, ExitStack]] = {}
        self._engines: WeakValueDictionary[int, Any] = WeakValueDictionary()  # that it knows by number
        self._last_engine = 0
        self._is_closed = False

    @property
    def requests_in_flight(self) -> int:
        """How many requests of it are admitted."""
        return len(self._leases)

    @property
    def num_open(self) -> int:
        """Everything that it has under way."""
        return len(self._tasks) + len(self._observed)

    def take(self, message: Up) -> None:
        """Take what the ingress says."""
        if self._is_closed:
            return
        match message:
            case Admit() | Reserve() | Generate() | Board() | AwaitDeath():
                self._begin(message)
            case End(id=number):
                if (task := self._tasks.get(number)) is not None:
                    task.cancel()
            case Arrived():
                self._arrived(message)
            case Waited(id=number):
                if number in self._observed:
                    self._observed[number][0].admitted()
            case Began(id=number):
                if number in self._observed:
                    self._observed[number][0].began()
            case Finished():
                self._finished(message)
            case _:
                pass  # the business of whoever holds the connection

    async def close(self) -> None:
        """End all that it has under way, and return when it has ended. Idempotent."""
        self._is_closed = True
        tasks = tuple(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for _, scope in self._observed.values():
            scope.close()  # counted as requests whose clients have gone
        self._observed.clear()

    # --- what it asks ---

    def _begin(self, work: Work) -> None:
        task = asyncio.create_task(self._answered(work), name=f"ingress-{type(work).__name__.lower()}-{work.id}")
        self._tasks[work.id] = task
        task.add_done_callback(lambda ended: self._ended(work.id, ended))

    def _ended(self, number: int, task: asyncio.Task[None]) -> None:
        del self._tasks[number]
        if not task.cancelled() and (error := task.exception()) is not None:  # a mistake of ours
            log_events.background_task_failed(task=task.get_name(), error=error)
            self._send(refused(number, ApiError(status=500, type=ErrorType.INTERNAL, message=_BUG)))

    async def _answered(self, work: Work) -> None:
        try:
            await self._work(work)
        except ApiError as error:
            self._send(refused(work.id, error))
        except Overloaded as error:
            self._send(refused(work.id, from_overloaded(error)))
        except EngineError as error:
            self._send(refused(work.id, from_engine_error(error)))

    def _work(self, work: Work) -> Coroutine[Any, Any, None]:
        match work:
            case Admit():
                return self._admit(work)
            case Reserve():
                return self._reserve(work)
            case Generate():
                return self._generate(work)
            case Board():
                return self._board(work)
            case AwaitDeath():
                return self._await_death(work)

    async def _admit(self, asked: Admit) -> None:
        """Hold the place until the task is cancelled."""
        backend = self._same(asked.model, asked.serial)
        backend.ensure_serving()
        now_s = asyncio.get_running_loop().time()
        deadline_s = math.inf if asked.within_s is None else now_s + asked.within_s
        async with backend.admission.admit(asked.client, deadline_s=deadline_s) as lease:
            self._leases[asked.id] = lease
            try:
                self._send(Done(asked.id))
                await asyncio.get_running_loop().create_future()
            finally:
                del self._leases[asked.id]

    async def _reserve(self, asked: Reserve) -> None:
        if (lease := self._leases.get(asked.lease)) is not None:  # else it has been ended meanwhile
            await self._backends.admission.reserve(lease, tokens=asked.tokens)
        self._send(Done(asked.id))

    async def _generate(self, asked: Generate) -> None:
        backend = self._same(asked.model, asked.serial)
        async with closing(backend.serving.generate(asked.request)) as chunks:
            async for chunk in chunks:
                self._send(tokens_of(asked.id, chunk))

    async def _board(self, asked: Board) -> None:
        before = self._engines.get(asked.other_than)
        engine = await self._backend(asked.model).serving.ready_engine(other_than=before)
        number = next((each for each, known in self._engines.items() if known is engine), 0)
        if not number:
            self._last_engine = number = self._last_engine + 1
            self._engines[number] = engine
        socket = key = ""  # the kind of engine may have been changed since the ingress was told
        if (own := own_routes_of(engine)) is not None:
            socket, key = str(own.own_routes_socket), own.own_routes_key
        self._send(Boarded(asked.id, number, engine.capabilities.name, socket, key))

    async def _await_death(self, asked: AwaitDeath) -> None:
        engine = self._engines.get(asked.engine)
        if engine is not None and self._backend(asked.model).serving.is_in_force(engine):
            await engine.died()
        self._send(Done(asked.id))

    def _backend(self, model: str) -> Backend:
        """Raises: ApiError."""
        return self._backends.of(model)

    def _same(self, model: str, serial: int) -> Backend:
        """Return the backend that the ingress means, and not one that has taken its place. Raises: ApiError."""
        backend = self._backend(model)
        if backend.serial != serial:
            raise unavailable("the model has just been replaced", code="starting", retry_after_s=1)
        return backend

    # --- what it counts ---

    def _metrics(self, model: str) -> Metrics:
        """Return those of a model that is gone, too: they are nobody's then."""
        models = self._backends.models()
        if not self._backends.are_named() and models:
            return next(iter(models.values())).metrics
        return models[model].metrics if model in models else self._backends.unnamed

    def _arrived(self, told: Arrived) -> None:
        scope = ExitStack()
        observation = scope.enter_context(self._metrics(told.model).observe(told.endpoint, ago_s=told.ago_s))
        served = self._backends.models().get(told.model)
        if served is not None and served.backend is not None:
            scope.enter_context(served.backend.uses.one())
        observation.asks()
        self._observed[told.id] = observation, scope

    def _finished(self, told: Finished) -> None:
        if told.id in self._observed:
            observation, scope = self._observed.pop(told.id)
        else:
            scope = ExitStack()
            observation = scope.enter_context(self._metrics(told.model).observe(told.endpoint, ago_s=told.ago_s))
        with scope:
            observation.outcome = told.outcome
            observation.prompt_tokens = told.prompt_tokens
            if told.completion_tokens:
                observation.tokens(told.completion_tokens, in_a_row=told.in_a_row, ago_s=told.since_last_s)
