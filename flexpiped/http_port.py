"""The daemon's HTTP port: at first it says "starting", then it is the API, here or in ingress processes, too."""

import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Final

from aiohttp import web
from prometheus_client.core import Metric

from flexpiped.api.backends import Backends
from flexpiped.connections import ConnectionLimits
from flexpiped.ingress.fleet import Fleet
from flexpiped.ingress.messages import Model
from flexpiped.ingress.opening import Live, ingresses, model_now
from flexpiped.servers import serving, url_of
from flexpiped.shared_parts import SharedParts
from flexpiped.starting_app import starting_app
from flexpiped.status import Health

_LAST_WORDS_S: Final = 1.0  # of handlers, once the time to finish is over
_INGRESS_DEADLINE_S: Final = 30.0  # for their text processes; until then the daemon answers for them


class HttpPort:
    """Used on one event loop: ``begin`` -> ``open_api`` -> ``end_gate`` -> ``until_serving``. The scope given ends it.

    Args:
        listener: Of the port; whoever has made it closes it in the end.
        ingress_socket: Where ingress processes have the daemon answer what they do not.
        health: Of the daemon; it and how many ``reloads`` there were are asked anew each time.
        tls: What handshakes go by; None: the port has no TLS.
        on_news: Told what happens to ingress processes, in words.
        on_given_up: Told that nobody can reach the models any more, with the reason.
    """

    def __init__(
        self,
        listener: socket.socket,
        *,
        ingress_socket: Path,
        shared: SharedParts,
        health: Callable[[], Health],
        reloads: Callable[[], int],
        tls: ssl.SSLContext | None,
        on_news: Callable[[str], object],
        on_given_up: Callable[[str], None],
    ) -> None:
        self._listener = listener
        self._ingress_socket = ingress_socket
        self._shared = shared
        self._health = health
        self._reloads = reloads
        self._tls = tls
        self._on_news = on_news
        self._on_given_up = on_given_up
        self._gate = AsyncExitStack()  # ends what says "starting"
        self._fleet: Fleet | None = None  # where others serve HTTP
        self.api_url = f"{url_of(listener, is_tls=tls is not None)}/v1"

    @property
    def in_words(self) -> str:
        """Return who serves HTTP, where that is not the daemon alone; else nothing."""
        if self._fleet is None:
            return ""
        count = self._fleet.num_listening
        return "1 ingress process" if count == 1 else f"{count} ingress processes"

    def families(self) -> Iterator[Metric]:
        """Yield what Prometheus is told of ingress processes."""
        if self._fleet is not None:
            yield from self._fleet.families()

    async def begin(self, stack: AsyncExitStack, further: Sequence[web.RouteDef]) -> None:
        """Say "starting" to all requests but those of ``further``."""
        await stack.enter_async_context(self._gate)
        app = starting_app(self._health, keys=self._shared.keys, further=further)
        await self._gate.enter_async_context(self._serving(app, shutdown_s=1.0))

    async def open_api(self, stack: AsyncExitStack, app: web.Application, backends: Backends) -> None:
        """Serve the API beside what says "starting".

        Raises:
            AdminSocketError, IngressFailed
        """
        if self._shared.settings().http.ingress_processes == 1:
            await stack.enter_async_context(self._serving(app, shutdown_s=_LAST_WORDS_S))
            return
        live = Live(
            settings=self._shared.settings,
            keys=self._shared.keys,
            models=self._models_now,
            are_named=lambda: self._shared.models().are_named,
            reloads=self._reloads,
        )
        self._fleet = await stack.enter_async_context(
            ingresses(
                app,
                backends,
                live,
                listener=self._listener,
                socket=self._ingress_socket,
                last_words_s=_LAST_WORDS_S,
                on_news=self._on_news,
                on_given_up=self._on_given_up,
            )
        )

    async def end_gate(self) -> None:
        """Say "starting" no longer."""
        if self._fleet is not None:
            self._listener.close()  # the gate's copy is the last: connections that come while it ends go to the others
        await self._gate.aclose()

    def push(self) -> None:
        """Have ingress processes told at once of what has changed."""
        if self._fleet is not None:
            self._fleet.push()

    async def until_serving(self) -> None:
        """Return when ingress processes answer for the models, or have had their time."""
        if self._fleet is not None:
            self._fleet.push()
            names = frozenset(each.name for each in self._models_now())
            await self._fleet.until_serving(names, within_s=_INGRESS_DEADLINE_S)

    def _models_now(self) -> tuple[Model, ...]:
        """Return the models for which others than the daemon may answer."""
        found = (
            model_now(each.name, each.backend, each.service)
            for each in self._shared.models().entries.values()
            if each.backend is not None and each.service is not None
        )
        return tuple(each for each in found if each is not None)

    def _serving(self, app: web.Application, *, shutdown_s: float) -> AbstractAsyncContextManager[None]:
        http = self._shared.settings().http
        return serving(
            app,
            self._listener.dup(),
            shutdown_s=shutdown_s,
            limits=ConnectionLimits(
                header_deadline_s=http.header_deadline_s,
                max_header_line_bytes=http.max_header_line_bytes,
                send_deadline_s=http.send_deadline_s,
            ),
            tls=self._tls,
        )
