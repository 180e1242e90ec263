"""The start of one model: its engine with the text process beside it, and whether it could start at all."""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any

from engines.text.client import TextService
from flexpiped import log_events
from flexpiped.api.sampling_defaults import sampling_defaults
from flexpiped.device_sharing import Held
from flexpiped.engine_factory import Model, find_files
from flexpiped.engine_offers import EngineOffers
from flexpiped.engine_start import EngineStart
from flexpiped.native_interpreter import engine_python
from flexpiped.settings import SamplingDefaults, Settings


async def start_both(stack: AsyncExitStack, settings: Settings, model: Model, engine: EngineStart) -> TextService:
    """Start them at the same time, and return the text process; ``stack`` ends both, also after a failure.

    Raises:
        EngineError, PlannerError
    """
    text = TextService(
        model=model.tokenizer_directory,
        python=engine_python(settings),
        on_death=lambda reason: log_events.text_process_died(reason=reason),
    )
    stack.push_async_callback(text.close)
    try:
        async with asyncio.TaskGroup() as starting:
            starting.create_task(text.start())
            starting.create_task(engine.run(stack, model))
    except ExceptionGroup as group:  # the first that failed; the other was cancelled
        raise group.exceptions[0] from None
    return text


def check_start(settings: Settings, *, source: str, held: Callable[[], Held]) -> None:
    """Say whether a model could start as configured; starts nothing. Blocks.

    Raises:
        EngineError, PlannerError
    """
    model = find_files(settings, source=source)
    offers = EngineOffers(settings, source=source, model=model, held=held)
    offers.of(settings.engine.value).resolver.begin(settings.stages)


def sampling_defaults_of(settings: Settings, model: Model, *, on_odd: Callable[[str], object]) -> Mapping[str, Any]:
    """Return what the model's makers want of sampling, where that is to count; what is odd there does not."""
    if settings.sampling_defaults is SamplingDefaults.MODEL:
        try:
            return sampling_defaults(model.generation_config)
        except ValueError as error:
            on_odd(f"{error}; requests are sampled as OpenAI's API has it")
    return {}
