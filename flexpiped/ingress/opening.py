"""Serving HTTP through ingress processes: what they are told, and the socket at which the daemon answers the rest."""

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aiohttp import web

from flexpiped.api.backend import Backend
from flexpiped.api.backends import Backends
from flexpiped.ingress.fleet import Fleet
from flexpiped.ingress.messages import Model, Now, Welcome
from flexpiped.keys import KeyRing
from flexpiped.model_service import ModelService
from flexpiped.servers import hold_address, serving_at
from flexpiped.settings import HttpSettings, Settings
from flexpiped.status import ServiceState

_TAKEN: Final = (ServiceState.READY, ServiceState.RECOVERING, ServiceState.ASLEEP)
_SOCKET_MODE: Final = 0o600
_LEAVING_S: Final = 2.0  # beyond the time that handlers have: for what else there is to end


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """What ingress processes are told of, as it is whenever asked."""

    settings: Callable[[], Settings]
    keys: Callable[[], KeyRing | None]
    models: Callable[[], tuple[Model, ...]]
    are_named: Callable[[], bool]
    reloads: Callable[[], int]

    def now(self) -> Now:
        """Return all of it."""
        settings = self.settings()
        http = settings.http
        return Now(
            models=self.models(),
            are_named=self.are_named(),
            keys=self.keys(),
            tls_certificate=None if http.tls_certificate is None else str(http.tls_certificate),
            tls_key=None if http.tls_key is None else str(http.tls_key),
            log_format=settings.log.format.value,
            log_level=settings.log.level.value,
            reloads=self.reloads(),
        )


def model_now(name: str, backend: Backend, service: ModelService) -> Model | None:
    """Return a model as an ingress process needs it; None: only the daemon can answer for it now."""
    capabilities = backend.serving.capabilities
    if capabilities is None or backend.health().state not in _TAKEN:
        return None
    return Model(
        name=name,
        serial=backend.serial,
        capabilities=capabilities,
        sampling_defaults=dict(backend.sampling_defaults),
        tool_format=service.tool_format,
        tokenizer_directory=str(service.text.model),
        python=service.text.python,
    )


@asynccontextmanager
async def ingresses(
    app: web.Application,
    backends: Backends,
    live: Live,
    *,
    listener: socket.socket,
    socket: Path,
    last_words_s: float,
    on_news: Callable[[str], object],
    on_given_up: Callable[[str], None],
) -> AsyncIterator[Fleet]:
    """Serve at the address of ``listener``, which is shared, while the scope lasts.

    Args:
        last_words_s: So long handlers may take at the end; requests have had their time by then.
        app: Of the daemon, which answers at ``socket`` what the others do not.

    Raises:
        AdminSocketError, IngressFailed
    """
    http = live.settings().http

    def welcome(number: int) -> Welcome:
        return _welcome(number, http, listener=address, socket=socket)

    async with serving_at(app, socket, shutdown_s=last_words_s, mode=_SOCKET_MODE):
        with closing(hold_address(listener)) as address:
            fleet = Fleet(
                http.ingress_processes,
                backends=backends,
                welcome=welcome,
                now=live.now,
                on_news=on_news,
                on_given_up=on_given_up,
            )
            try:
                await fleet.start()
                yield fleet
            finally:
                await fleet.close(within_s=last_words_s + _LEAVING_S)


def _welcome(number: int, http: HttpSettings, *, listener: socket.socket, socket: Path) -> Welcome:
    return Welcome(
        number,
        int(listener.family),
        listener.getsockname(),
        str(socket),
        http.drain_deadline_s,
        http.max_body_bytes,
        http.body_deadline_s,
        http.max_header_line_bytes,
        http.header_deadline_s,
        http.send_deadline_s,
    )
