"""What the service watches for as long as it serves: the text process, and the devices of this host."""

import asyncio
from collections.abc import Callable
from typing import Final

from engines.text.client import TextService
from flexpiped.events import EventKind, EventLog
from flexpiped.hardware import Hardware

_TEXT_PERIOD_S: Final = 1.0
_HARDWARE_PERIOD_S: Final = 15.0


async def watch_text(text: TextService, *, on_failure: Callable[[str], object]) -> None:
    """Return once it has been given up; until then it is started again whenever it dies."""
    while text.failure is None:  # noqa: ASYNC110  it is a property, not an event
        await asyncio.sleep(_TEXT_PERIOD_S)
    on_failure(text.failure)


async def watch_hardware(hardware: Hardware, events: EventLog) -> None:
    """Tell of GPUs that come, leave or get worse; ends where there is no driver to ask."""
    while hardware.may_change:
        for change in await asyncio.to_thread(hardware.news):
            events.publish(EventKind.DEVICES, change.sentence, change=change.kind.value, device=change.device_id)
        await asyncio.sleep(_HARDWARE_PERIOD_S)
