"""The models behind one port: which of them a request is for.

1. Where there is one model only, and it has no table in the configuration: that one, which judges the name itself.
2. Else the model that the request names, or the only one. Who names none, or an unknown one, is told the names.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from aiohttp import web
from prometheus_client.core import Metric

from engines.parameters.figures import CacheFigures
from flexpiped.api.backend import Admits, Backend
from flexpiped.api.errors import ApiError, ErrorType, invalid, unavailable
from flexpiped.api.metrics import Metrics
from flexpiped.keys import KeyRing
from flexpiped.status import Health
from topology.device import Device


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One model: ``backend`` None while it does not serve, and ``health`` says why. ``metrics`` are kept meanwhile."""

    health: Health
    backend: Backend | None
    metrics: Metrics

    @property
    def adapters(self) -> tuple[str, ...]:
        """Of the engine in force; none while there is no engine."""
        capabilities = None if self.backend is None else self.backend.serving.capabilities
        return () if capabilities is None else capabilities.adapters


@dataclass(frozen=True, slots=True, kw_only=True)
class Backends:
    """All models, as they are whenever asked.

    Args:
        models: By their names.
        are_named: Whether requests have to name one.
        health: Of all together.
        admission, keys, devices, body_deadline_s: As a backend has them, of the whole port.
        created_unix_s: Of models that do not serve.
    """

    models: Callable[[], Mapping[str, Served]]
    are_named: Callable[[], bool]
    health: Callable[[], Health]
    admission: Admits
    keys: Callable[[], KeyRing | None] = lambda: None
    devices: Callable[[], Sequence[Device]] = lambda: ()
    parameters: Callable[[], CacheFigures | None] = lambda: None  # that stay in host memory
    processes: Callable[[], Iterable[Metric]] = lambda: ()  # how the daemon itself fares
    body_deadline_s: Callable[[], float] = lambda: 60.0
    unnamed: Metrics = field(default_factory=Metrics)  # of requests that are for none of them
    created_unix_s: int = field(default_factory=lambda: int(time.time()))

    def of(self, name: object) -> Backend:
        """Return the backend of the model that a request names.

        Raises:
            ApiError: 404, there is no such model; 400, none is named; 503, it does not serve now.
        """
        models = self.models()
        if not self.are_named() or (name is None and len(models) == 1):
            served = next(iter(models.values()))
        elif name is None:
            raise invalid(f"model is required: this server has {_names(models)}", param="model", code="missing_model")
        elif not isinstance(name, str):
            raise invalid("model must be a string", param="model", code="invalid_type")
        else:
            served = _named(name, models)
        if served.backend is None:
            state = served.health.state.value
            raise unavailable(f"the model does not serve now: {served.health.reason or state}", code=state)
        return served.backend


def _named(name: str, models: Mapping[str, Served]) -> Served:
    """Return the model of that name, or the one of which it names an adapter that the engine has loaded."""
    if name in models:
        return models[name]
    for known, served in models.items():
        capabilities = None if served.backend is None else served.backend.serving.capabilities
        own = None if capabilities is None else capabilities.own_server
        if name in served.adapters:
            return served
        if own is not None and own.adapter_mark and name.startswith(known + own.adapter_mark):
            return served
    raise no_such_model(name, models)


def only(backend: Backend) -> Backends:
    """Return one model without a table as all that there is."""
    return Backends(
        models=lambda: {backend.model: Served(health=backend.health(), backend=backend, metrics=backend.metrics)},
        are_named=lambda: False,
        health=backend.health,
        admission=backend.admission,
        keys=backend.keys,
        devices=backend.devices,
        body_deadline_s=lambda: backend.body_deadline_s,
    )


def no_such_model(name: str, models: Mapping[str, object]) -> ApiError:
    return ApiError(
        status=404,
        type=ErrorType.NOT_FOUND,
        message=f"the model {name!r} does not exist here; this server has {_names(models)}",
        param="model",
        code="model_not_found",
    )


def _names(models: Mapping[str, object]) -> str:
    return ", ".join(map(repr, models)) or "none"


BACKENDS: Final = web.AppKey("backends", Backends)
