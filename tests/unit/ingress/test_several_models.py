"""Two models behind two ingress processes: each is reached through both, which learn of one that stops or comes."""

import os
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.support.doors import Door, ingresses_of
from tests.support.metrics import metrics_series
from tests.support.until import until
from tests.unit.test_models import DEMO, TWO, daemon

pytestmark = [pytest.mark.real_loop, pytest.mark.long]  # each ingress starts a text process for each model
PROCESSES = "http.ingress_processes = 2\n"
THREE = f'{PROCESSES}{TWO}[models.c]\nmodel = "{DEMO}"\n'


async def test_each_is_reached_through_both_which_learn_of_what_changes(tmp_path: Path) -> None:
    async with daemon(tmp_path, PROCESSES + TWO) as stand:
        url = stand.service.api_url.removesuffix("/v1")
        doors = [Door(url, pid) for pid in sorted(ingresses_of(os.getpid()))]
        assert len(doors) == 2
        await all_answer(doors, a="200", b="200", c="404 model_not_found")
        for model in ("a", "b"):
            await until_taken_by_both(url, doors, model)

        assert (await stand.change("stop", model="a"))["fields"]["result"] == "done"
        await all_answer(doors, a="503 stopped", b="200")
        assert (await stand.change("start", model="a"))["fields"]["result"] == "done"
        await all_answer(doors, a="200", b="200")
        stand.reload(THREE)
        await stand.becomes(a="ready", b="ready", c="ready")
        await all_answer(doors, a="200", b="200", c="200")  # the daemon does until they have its tokenizer
        for model in ("a", "b", "c"):
            await until_taken_by_both(url, doors, model)
        stand.reload(PROCESSES + TWO)
        await stand.becomes(a="ready", b="ready")
        await all_answer(doors, a="200", b="200", c="404 model_not_found")


async def all_answer(doors: list[Door], **expected: str) -> None:
    """Each model is answered for like this through each of them, and so is a request that names none."""
    for door in doors:
        assert {model: await answer(door, model) for model in expected} == expected
        assert await answer(door, None) == "400 missing_model"


async def answer(door: Door, model: str | None) -> str:
    """Return the status, and of a refusal its code."""
    status, said = await door.answer("POST", "/v1/completions", {"model": model, "prompt": "x", "max_tokens": 2})
    return f"{status} {said['error']['code']}" if "error" in said else str(status)


async def until_taken_by_both(url: str, doors: list[Door], model: str) -> None:
    """Wait until each of them answers for a model by itself, and nothing is left of what was asked for that."""

    async def is_taken() -> bool:
        body = {"model": model, "prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
        async with AsyncExitStack() as stack:
            for door in doors:
                await stack.enter_async_context(door.asked("POST", "/v1/completions", body))
            found = [value for _, value in await metrics_series(url, "flexpiped_ingress_requests")]
        await until(is_idle)
        return found == [1, 1]

    async def is_idle() -> bool:
        return all(value == 0 for _, value in await metrics_series(url, "flexpiped_requests_in_flight"))

    await until(is_taken)
