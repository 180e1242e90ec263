"""The dashboard of a real daemon in a real Chromium, while layers of the demo model move under streams.

``FLEXPIPED_SCREENSHOTS=FOLDER`` keeps what the browser showed.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from tests.support.browser import Page, browser_page
from tests.support.daemon import Daemon, started
from tests.unit.dashboard.test_browser import CURVES, REASONS, TOO_FAINT

pytestmark = [
    *(pytest.mark.browser, pytest.mark.engine, pytest.mark.real_loop),
    pytest.mark.asyncio(loop_scope="module"),
]
CANARY = "A quokka named Zanzibar"
MORE = 'http.dashboard = "control"\n[auto]\nmode = "dry-run"\ninterval_s = 1.0\n'


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def daemon(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    async with started(tmp_path_factory.mktemp("daemon"), ready=True, engine="native", more=MORE) as daemon:
        yield daemon


async def answers(url: str, *, count: int, tokens: int) -> list[str]:
    """Return the texts of streams that run at the same time."""
    async with aiohttp.ClientSession() as session:

        async def one(number: int) -> str:
            body = {"prompt": f"{CANARY} {number}", "max_tokens": tokens, "seed": number, "temperature": 0.8}
            async with session.post(f"{url}/completions", json=body | {"ignore_eos": True}) as answer:
                return str((await answer.json())["choices"][0]["text"])

        return await asyncio.gather(*(one(number) for number in range(count)))


async def decided(daemon: Daemon) -> set[str]:
    """Return the reasons of all decisions so far, written as the page does."""
    code, out, err = await daemon.flexctl("decisions", "--json")
    assert code == 0, err
    events = [json.loads(line) for line in out.splitlines()]
    plain = [event["message"].replace(f"{event['fields']['verb']}: ", "", 1) for event in events]
    return {message.replace("->", "\N{RIGHTWARDS ARROW}") for message in plain}


async def shots(page: Page, name: str) -> None:
    """Keep what is shown at the widths and in the themes that people have, where that is asked for."""
    folder = os.environ.get("FLEXPIPED_SCREENSHOTS")
    if not folder:
        return
    for width, dark in ((1400, False), (1400, True), (320, False), (320, True), (2200, False)):
        await page.look(width=width, dark=dark)
        await page.picture(Path(folder) / f"{name}-{width}-{'dark' if dark else 'light'}.png", whole=True)
    await page.look(width=1400)


async def test_a_handover_is_seen_as_it_happens(daemon: Daemon, tmp_path: Path) -> None:
    url = (await daemon.ask("/status"))["api_url"]
    for _ in range(12):  # of load that is over, so that there are latencies and a CV
        await answers(url, count=1, tokens=8)
    async with browser_page(tmp_path) as page:
        await page.open(url.removesuffix("v1"))
        await page.until("document.querySelectorAll('.layer').length === 10")
        running = asyncio.create_task(answers(url, count=4, tokens=600))
        await shots(page, "load")
        await page.run("document.getElementById('stages-number').value = 4")
        await page.run("document.getElementById('wanted-stages').checked = true")
        await page.run("document.querySelector('#change button').click()")
        await page.until("document.getElementById('carry-out') && document.querySelector('#preview table')")
        planned = await page.run("document.querySelectorAll('.ghost').length")
        await shots(page, "preview")
        await page.run("document.getElementById('carry-out').click()")
        await page.until("document.querySelectorAll('.path.moving').length > 0")
        moving = await page.run("document.querySelectorAll('.path.moving').length")
        await shots(page, "handover")
        await page.until("document.querySelector('#handover .tag').textContent === 'done'")
        await page.until("document.querySelectorAll('.ghost').length === 0")
        texts = await running
        await page.until("document.querySelectorAll('#stages tbody tr').length === 4")
        await page.until("document.querySelectorAll('#decisions details').length > 0")
        await page.until(f"Object.values({CURVES}).length === 4 && Object.values({CURVES}).every((count) => count > 0)")
        reasons = await page.run(REASONS)
        shown = await page.run(
            "[...document.querySelectorAll('#stages tbody tr')].map((row) => row.cells[1].textContent)"
        )
        phases = await page.run("[...document.querySelectorAll('.phases li')].map((each) => each.dataset.is)")
        words = await page.run("document.documentElement.outerHTML")
        await shots(page, "after")
        faint = await page.run(TOO_FAINT)
        problems = page.problems
    assert planned == moving > 0
    assert shown == [stage["device_ids"][0] for stage in (await daemon.ask("/status"))["stages"]]
    assert phases == ["done"] * 4
    assert reasons != []
    assert {*reasons} <= await decided(daemon)
    assert CANARY not in words
    assert all(text[:40] not in words for text in texts)
    assert (faint, problems) == ([], [])
