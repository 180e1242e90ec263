"""What a daemon gives each of its models: some of it is shared by all, some is that model's own part."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from engines.parameters.keeper import ParameterKeeper
from flexpiped.api.metrics import Metrics
from flexpiped.device_sharing import Held
from flexpiped.events import Event, EventLog
from flexpiped.journal import Journal
from flexpiped.kv_of_models import KvOfModels
from flexpiped.survivors import Survivors


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonParts:
    """Given to one model.

    Args:
        events: Told what happens to it.
        journal: Its part of the daemon's.
        metrics: Of the model, also over a stop and a start.
        is_traced: Whether requests leave traces.
        parameters: Keeps some in the memory of the host, for all models.
        survivors: Its engines that were there before the daemon, and outlive it.
        numbers, planning: As ``Refactorings`` has them, of the daemon.
        held: What other models hold of the devices.
        kv_of_models: The KV caches of all models.
        is_name_taken: Whether requests that give a name mean a model, or another model's adapter.
        on_decision: Told each decision of automatic control, also one to keep everything as it is.
        on_progress: Told what the start is doing.
        on_given_up: Told that the model will not serve again, with the reason.
    """

    api_url: str
    events: EventLog
    journal: Journal
    metrics: Metrics
    is_traced: bool
    parameters: ParameterKeeper
    survivors: Survivors
    numbers: Iterator[int]
    planning: asyncio.Lock
    held: Callable[[], Held]
    kv_of_models: KvOfModels
    is_name_taken: Callable[[str], bool]
    on_decision: Callable[[Event], object]
    on_progress: Callable[[str], None]
    on_given_up: Callable[[str], None]
