"""Changes of the models of a daemon: what is asked for by hand, and what a reload of the configuration means.

One change of a model at a time, each told of by events: begun, progress, ended.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

from engines.errors import UnsupportedByEngine
from flexpiped.api.metrics import Metrics
from flexpiped.events import EventKind, EventLog
from flexpiped.journal import Journal, JournalError, ModelState
from flexpiped.model_entry import NOT_STARTED, STOPPED, Entry, name_of
from flexpiped.model_errors import ModelBusy, ModelRefused, UnknownModel, WhichModel
from flexpiped.model_lives import ModelLives, Tell
from flexpiped.model_settings import ModelSpec, needs_a_new_start
from flexpiped.status import ServiceState
from planner.errors import NoFeasiblePlan

_REFUSALS = (UnsupportedByEngine, NoFeasiblePlan)  # of a model that is none, or for which there is no room
Work = Callable[[Tell], Awaitable[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A change that has begun: its number, and the event after which its progress follows."""

    number: int
    since: int


class ModelChanges:
    """The one writer of ``entries``. Used on one event loop."""

    def __init__(self, entries: dict[str, Entry], *, lives: ModelLives, journal: Journal, events: EventLog) -> None:
        self._entries = entries
        self._lives = lives
        self._journal = journal
        self._events = events
        self._numbers = count(1)
        self._wanted: Sequence[ModelSpec] | None = None
        self._reconciling: asyncio.Task[None] | None = None
        self.may_begin = asyncio.Event()  # set once the daemon has started what it starts with

    def add(self, spec: ModelSpec) -> Entry:
        """Return a model that is known from now on, and does not run yet."""
        entry = Entry(name=name_of(spec), configured=spec, spec=spec, metrics=Metrics())
        self._entries[entry.name] = entry
        return entry

    def entry(self, name: str | None) -> Entry:
        """Return a model; without a name the only one. Raises ``UnknownModel``, ``WhichModel``."""
        if name is None and len(self._entries) == 1:
            return next(iter(self._entries.values()))
        if name is None:
            raise WhichModel(f"which model? there are: {', '.join(self._entries) or 'none'}; say --model NAME")
        if name not in self._entries:
            raise UnknownModel(f"there is no model {name!r} here; there are: {', '.join(self._entries) or 'none'}")
        return self._entries[name]

    # --- by hand ---

    def start(self, name: str) -> Begun:
        """Begin to start a model that does not run. Raises ``ModelError``."""
        entry = self._free(name)
        if entry.service is not None and not entry.has_given_up:
            raise ModelRefused(f"model {name} runs already: {entry.health.state.value}")
        return self._begin(entry, f"start {name}", lambda tell: self._lives.start(entry, entry.spec, tell))

    def stop(self, name: str, *, deadline_s: float | None = None) -> Begun:
        """Begin to stop a model: its streams have until the deadline to finish. Raises ``ModelError``."""
        entry = self._free(name)
        if not entry.is_to_serve:
            raise ModelRefused(f"model {name} is stopped already")
        return self._begin(entry, f"stop {name}", lambda _tell: self._lives.stop(entry, deadline_s))

    def swap(self, name: str, *, path: str) -> Begun:
        """Begin to serve other files under a model's name. Raises ``ModelError``."""
        entry = self._free(name)
        if path == entry.spec.settings.model and entry.service is not None:
            raise ModelRefused(f"model {name} is {path} already")
        same = path == entry.configured.settings.model
        spec = entry.configured if same else entry.configured.with_path(path)
        return self._begin(entry, f"swap {name} to {path}", lambda tell: self._lives.swap(entry, spec, tell))

    def _free(self, name: str) -> Entry:
        entry = self.entry(name)
        if not self.may_begin.is_set():
            raise ModelBusy("busy: the daemon is starting")
        if entry.change:
            raise ModelBusy(f"busy: {entry.change} is under way")
        return entry

    def _begin(self, entry: Entry, what: str, work: Work) -> Begun:
        number, since = next(self._numbers), self._events.last_sequence
        entry.change = what
        self._tell(entry, number, what, state="begun")
        entry.task = asyncio.create_task(self._carry_out(entry, number, what, work), name=f"model-change-{number}")
        return Begun(number=number, since=since)

    async def _carry_out(self, entry: Entry, number: int, what: str, work: Work) -> None:
        result, message = "failed", f"{what}: broken off"
        try:
            said = await work(lambda news: self._tell(entry, number, f"{entry.name}: {news}", state="progress"))
            await self._keep(entry)
            result, message = "done", f"{what}: {said}"
        except NOT_STARTED as error:
            result = "refused" if isinstance(error, _REFUSALS) else "failed"
            message = f"{what}: {result}: {error}"
        finally:
            entry.change = ""
            self._tell(entry, number, message, state="ended", result=result)

    def _tell(self, entry: Entry, number: int, message: str, **fields: Any) -> None:
        self._events.publish(EventKind.MODEL, message, model=entry.name, change=number, **fields)

    # --- by a reload ---

    def reconcile(self, specs: Sequence[ModelSpec]) -> None:
        """Begin to make the models what the configuration says now; what is under way is waited for."""
        self._wanted = specs
        if self._reconciling is None or self._reconciling.done():
            self._reconciling = asyncio.create_task(self._reconcile(), name="models-reconcile")

    async def _reconcile(self) -> None:
        await self.may_begin.wait()
        while (specs := self._wanted) is not None:
            self._wanted = None
            named = {name_of(spec): spec for spec in specs}
            for entry in [each for name, each in self._entries.items() if name not in named]:
                await self._carried_out(entry, f"remove {entry.name}", self._stopping(entry))
                del self._entries[entry.name]
            for name, spec in named.items():
                if name in self._entries:
                    await self._follow(self._entries[name], spec)
                    continue
                entry = self.add(spec)
                await self._carried_out(entry, f"add {name}", partial(self._lives.start, entry, spec))

    def _stopping(self, entry: Entry) -> Work:
        return lambda _tell: self._lives.stop(entry)

    async def _follow(self, entry: Entry, spec: ModelSpec) -> None:
        """Give a model the settings of now: those that are live at once, the others by a swap."""
        before, entry.configured = entry.configured, spec
        if needs_a_new_start(before.settings, spec.settings):
            if entry.health.state is ServiceState.STOPPED:
                entry.spec = spec
                return
            await self._carried_out(entry, f"change {entry.name}", lambda tell: self._lives.swap(entry, spec, tell))
        elif entry.service is not None:
            entry.spec = spec if entry.spec is before else spec.with_path(entry.spec.settings.model)
            entry.service.use(entry.spec.settings)

    async def _carried_out(self, entry: Entry, what: str, work: Work) -> None:
        if entry.task is not None and not entry.task.done():
            await asyncio.wait([entry.task])
        self._begin(entry, what, work)
        assert entry.task is not None, "it has begun"
        await asyncio.wait([entry.task])

    async def close(self) -> None:
        """Break off what is under way."""
        for task in (self._reconciling, *(each.task for each in self._entries.values())):
            if task is not None and not task.done():
                task.cancel()
                await asyncio.wait([task])

    # --- over restarts ---

    async def _keep(self, entry: Entry) -> None:
        """Keep what was asked for by hand, as far as it differs from the configuration."""
        configured, path = entry.configured.settings.model, entry.spec.settings.model
        other = "" if path == configured else path
        state = ModelState(is_stopped=not entry.is_to_serve, path=other, configured=configured)
        await asyncio.to_thread(self._journal.of_model(entry.configured.table).keep_state, state)

    def recall(self, entry: Entry) -> None:
        """Take up what was asked for by hand before a restart. Blocks. The configuration has the last word."""
        journal = self._journal.of_model(entry.configured.table)
        if not entry.configured.settings.journal.restore or journal.failure:
            return
        try:
            state = journal.state()
        except JournalError:
            return  # told of where the layout is restored
        if state is None or state.configured != entry.configured.settings.model:
            return
        if state.path:
            entry.spec = entry.configured.with_path(state.path)
        if state.is_stopped:
            entry.health_apart = STOPPED
