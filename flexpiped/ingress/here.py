"""The models for which an ingress process answers by itself: those that serve, once their text process is there.

Text is made here, for tokenizers and chat templates are no state: each ingress has a text process of its own for each
model, so that there are as many of them as there are processes that wait for them.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from engines.text.client import TextService
from engines.text.errors import TextStartFailed
from engines.text.protocol import Text
from flexpiped import log_events
from flexpiped.api.backend import Backend
from flexpiped.api.backends import Served
from flexpiped.api.tool_syntax import tool_calls_of
from flexpiped.ingress.link import Link
from flexpiped.ingress.messages import Model
from flexpiped.ingress.remote import RemoteAdmission, RemoteMetrics, RemoteServing
from flexpiped.keys import KeyRing
from flexpiped.status import Health, ServiceState

_READY = Health(state=ServiceState.READY, reason="")


class OwnText(Text, Protocol):
    """A ``Text`` that is started and ended here."""

    async def start(self) -> None:
        """Raises: TextStartFailed."""

    async def close(self) -> None: ...


MakeText = Callable[[Model], OwnText]


def text_service(model: Model) -> OwnText:
    """Return the text process for a model, not started yet."""
    return TextService(
        model=Path(model.tokenizer_directory),
        python=model.python,
        on_death=lambda reason: log_events.text_process_died(reason=reason),
    )


class _Taken:
    """One model: what the daemon says of it now, and its text."""

    def __init__(self, model: Model, text: OwnText, link: Link, keys: Callable[[], KeyRing | None]) -> None:
        self.model = model
        self.text = text
        self.is_loaded = False
        self.metrics = RemoteMetrics(link, model=model.name)
        self.backend = Backend(
            model=model.name,
            serving=RemoteServing(
                link, model=model.name, serial=model.serial, capabilities=lambda: self.model.capabilities
            ),
            text=text,
            admission=RemoteAdmission(link, model=model.name, serial=model.serial),
            metrics=self.metrics,
            health=lambda: _READY,  # one that is not is not taken here
            keys=keys,
        )

    def use(self, model: Model) -> None:
        """Take what the daemon says now; requests under way keep what they began with."""
        self.model = model
        about = self.text.about
        self.backend = replace(
            self.backend,
            sampling_defaults=model.sampling_defaults,
            tool_calls=tool_calls_of(
                model.tool_format, chat_template=about.chat_template, added_tokens=about.added_tokens
            ),
        )


class Here:
    """Used on one event loop.

    Args:
        on_change: Told the names of the models that are taken here now.
    """

    def __init__(
        self,
        link: Link,
        *,
        keys: Callable[[], KeyRing | None],
        on_change: Callable[[tuple[str, ...]], None],
        make_text: MakeText = text_service,
    ) -> None:
        self._link = link
        self._keys = keys
        self._on_change = on_change
        self._make_text = make_text
        self._taken: dict[str, _Taken] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._told: tuple[str, ...] | None = None
        self._unstarted = 0
        self._is_closed = False
        self._settled = asyncio.Event()

    def models(self) -> Mapping[str, Served]:
        """Return the models that are taken here, as ``Backends`` wants them."""
        return {
            name: Served(health=_READY, backend=each.backend, metrics=each.metrics)
            for name, each in self._taken.items()
            if each.is_loaded and each.text.failure is None
        }

    def use(self, models: Iterable[Model]) -> None:
        """Take these models and no others from now on; nothing once it is closed."""
        if self._is_closed:
            return
        wanted = {model.name: model for model in models}
        for name, taken in tuple(self._taken.items()):
            if name not in wanted or taken.model.serial != wanted[name].serial:
                del self._taken[name]
                self._run(self._leave(taken), name=f"leave-{name}")
        for name, model in wanted.items():
            if name not in self._taken:
                self._taken[name] = _Taken(model, self._make_text(model), self._link, self._keys)
                self._unstarted += 1
                self._run(self._load(self._taken[name]), name=f"load-{name}")
            elif self._taken[name].is_loaded and self._taken[name].model != model:
                self._taken[name].use(model)
            else:
                self._taken[name].model = model
        self._tell()

    async def settled(self) -> None:
        """Return once no model's text process is starting."""
        await self._settled.wait()

    async def close(self) -> None:
        """End all text processes. The daemon may still tell of models meanwhile."""
        self._is_closed = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for taken in self._taken.values():
            await taken.text.close()
        self._taken.clear()

    async def _load(self, taken: _Taken) -> None:
        try:
            await taken.text.start()
        except TextStartFailed as error:  # then the daemon answers for it
            log_events.ingress_without_text(model=taken.model.name, reason=str(error))
            return
        finally:
            self._unstarted -= 1
            self._tell()
        taken.is_loaded = True
        taken.use(taken.model)
        self._tell()

    async def _leave(self, taken: _Taken) -> None:
        """End its text process once no request uses it."""
        try:
            await taken.backend.uses.idle()
        finally:
            await taken.text.close()

    def _run(self, work: "asyncio._CoroutineLike[None]", *, name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _tell(self) -> None:
        if self._unstarted:
            self._settled.clear()
        else:
            self._settled.set()
        names = tuple(self.models())
        if names != self._told:
            self._told = names
            self._on_change(names)
