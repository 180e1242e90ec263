"""Of several models the dashboard shows the one that is chosen: two fake engines in a real daemon, a real Chromium.

``FLEXPIPED_SCREENSHOTS=FOLDER`` keeps what the browser showed.
"""

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from flexpiped.models import demo_model_places
from tests.support.browser import Page, browser_page
from tests.support.daemon import Daemon, started
from tests.unit.dashboard.test_browser import TOO_FAINT, tab_to

pytestmark = [pytest.mark.browser, pytest.mark.real_loop, pytest.mark.asyncio(loop_scope="module")]
DEMO = demo_model_places()[0]
TWO = f'''http.dashboard = "control"
[models."first of two, with a name that is a good deal longer than names of models are"]
model = "{DEMO}"
[models.other]
model = "{DEMO}"
stages = 3
'''
FIRST = "first of two, with a name that is a good deal longer than names of models are"
STAGES = "document.querySelectorAll('#stages tbody tr').length"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def daemon(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    async with started(tmp_path_factory.mktemp("daemon"), ready=True, stages=1, more=TWO) as daemon:
        yield daemon


@pytest_asyncio.fixture(loop_scope="module")
async def page(tmp_path: Path) -> AsyncIterator[Page]:
    async with browser_page(tmp_path) as page:
        yield page


async def root_of(daemon: Daemon) -> str:
    return str((await daemon.ask("/status"))["api_url"]).removesuffix("v1")


async def shots(page: Page, name: str) -> None:
    if folder := os.environ.get("FLEXPIPED_SCREENSHOTS"):
        for width, dark in ((1400, False), (320, True), (320, False)):
            await page.look(width=width, dark=dark)
            await page.picture(Path(folder) / f"{name}-{width}-{'dark' if dark else 'light'}.png", whole=True)


async def test_a_model_is_chosen_and_changed_by_the_keyboard_alone(daemon: Daemon, page: Page) -> None:
    root = await root_of(daemon)
    await page.open(root, width=320)
    await page.until(f"{STAGES} === 1")
    assert await page.run("document.getElementById('model').textContent") == FIRST
    await tab_to(page, "model-choice")
    await page.press("ArrowDown")
    await page.until(f"document.getElementById('model').textContent === 'other' && {STAGES} === 3")
    assert await page.run("location.search") == "?model=other"
    await shots(page, "two-models")
    await page.look(width=320)
    assert await page.run("document.documentElement.scrollWidth") <= 320
    assert (await page.run(TOO_FAINT), page.problems) == ([], [])

    await page.open(f"{root}?model=other")  # the address remembers it
    await page.until(f"{STAGES} === 3 && document.getElementById('model-choice').value === 'other'")
    await tab_to(page, "stages-number")
    await page.run("document.activeElement.select()")
    await page.write("2")
    await page.press("Enter")
    await page.until("document.getElementById('carry-out')")
    await tab_to(page, "carry-out")
    await page.press("Enter")
    await page.until(f"{STAGES} === 2 && document.querySelector('#handover .tag').textContent === 'done'")
    told = [json.loads(line) for line in daemon.output.read_text().splitlines() if "refactoring started" in line]
    assert [each["model"] for each in told] == ["other"]
    models = (await daemon.ask("/models"))["models"]
    assert {each["name"]: each["stages"] for each in models} == {FIRST: 1, "other": 2}
    await tab_to(page, "model-choice")
    await page.press("ArrowUp")
    await page.until(f"document.getElementById('model').textContent !== 'other' && {STAGES} === 1")
    assert page.problems == []
