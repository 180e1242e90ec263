"""Steps that have not ended: of one generation, and somebody may wait until there is none."""

import asyncio

from engines.native.batch import Batch
from engines.native.steps_in_flight import StepsInFlight


def of_two_steps() -> StepsInFlight:
    steps = StepsInFlight()
    for step_id in (1, 2):
        steps.dispatched(Batch(step_id, ()), now_s=float(step_id))
    return steps


def test_the_oldest_is_the_one_that_was_dispatched_first() -> None:
    steps = of_two_steps()
    assert (len(steps), steps.oldest_s) == (2, 1.0)

    assert steps.ended(1, generation=0) == Batch(1, ())
    assert (len(steps), steps.oldest_s) == (1, 2.0)

    steps.ended(2, generation=0)
    assert steps.oldest_s is None


def test_results_of_an_older_generation_are_void() -> None:
    steps = of_two_steps()
    steps.void()
    steps.dispatched(Batch(1, ()), now_s=3.0)

    assert steps.ended(1, generation=0) is None
    assert len(steps) == 1
    assert steps.ended(1, generation=steps.generation) == Batch(1, ())


async def test_who_waits_goes_on_when_the_last_step_has_ended() -> None:
    steps = of_two_steps()
    waiting = asyncio.create_task(steps.drained())
    await asyncio.sleep(1)
    steps.ended(2, generation=0)
    await asyncio.sleep(1)
    assert not waiting.done()

    steps.ended(1, generation=0)
    await waiting


async def test_who_waits_goes_on_when_all_steps_are_void() -> None:
    steps = of_two_steps()
    waiting = asyncio.create_task(steps.drained())
    await asyncio.sleep(1)

    steps.void()
    await waiting


async def test_nobody_waits_where_there_is_none() -> None:
    await asyncio.wait_for(StepsInFlight().drained(), timeout=1)
