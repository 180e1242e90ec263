"""The dashboard in a real Chromium, with the fake engine behind it."""

import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from engines.closing import closing
from engines.protocol import GenerationRequest, SamplingParams
from flexpiped.events import EventKind
from flexpiped.flexctl.status_lines import layers_text
from flexpiped.flexctl.text import format_age, format_duration, format_latency
from flexpiped.keys import Client, KeyRing, Scope
from flexpiped.settings import DashboardMode
from tests.support.browser import Page, browser_page
from tests.support.dashboard import DashboardStand, dashboard_stand
from topology.units import format_bytes

pytestmark = [pytest.mark.browser, pytest.mark.real_loop, pytest.mark.asyncio(loop_scope="module")]
WIDTHS = (320, 375, 768, 1080, 1400, 2200)
IS_LIVE = "document.getElementById('live').dataset.live === 'yes' && document.querySelectorAll('.layer').length === 10"
SCRIPTS_OF_PAGE = "import('/dashboard/app/{name}').then(({{ {functions} }}) => {expression})"
# By the title of a plot: how many of its curves can be seen.
CURVES = """
Object.fromEntries([...document.querySelectorAll("#plots .plot")].map((plot) => [
  plot.querySelector("h3").textContent,
  [...plot.querySelectorAll("path.curve")].filter((curve) => curve.getTotalLength() > 0).length,
]))
"""
LABELS = "[...document.querySelectorAll('#plots svg')].map((plot) => plot.getAttribute('aria-label'))"
# Newest first, without the verb.
REASONS = "[...document.querySelectorAll('#decisions li > p:not(.meta)')].map((each) => each.textContent)"
# The contrast of each text with what is behind it, where it is less than WCAG 2 AA asks for.
TOO_FAINT = """
(() => {
  const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    const style = getComputedStyle(element);
    if (!own || !element.checkVisibility() || element.closest(".hidden, .skip, noscript, title, :disabled")) continue;
    const cell = element.closest(".layer")?.querySelector("rect");
    const front = parse(element instanceof SVGElement ? style.fill : style.color);
    const back = cell ? parse(getComputedStyle(cell).fill) : ground(element);
    const [low, high] = [luminance(front), luminance(back)].sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) found.push(`${element.tagName} ${element.getAttribute("class")} ${element.textContent} ${ratio}`);
  }
  return found;
})()
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def page(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Page]:
    async with browser_page(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest_asyncio.fixture(loop_scope="module")
async def stand(tmp_path: Path, page: Page) -> AsyncIterator[DashboardStand]:
    """A dashboard on a port of its own, so of an origin that the browser knows nothing of."""
    page.problems.clear()
    page.requested.clear()
    async with dashboard_stand(tmp_path, period_s=0.1) as stand:
        yield stand
        await page.send("Page.navigate", url="about:blank")


async def test_it_shows_what_there_is_without_a_complaint(page: Page, stand: DashboardStand) -> None:
    await page.open(f"{stand.url}/")
    await page.until(IS_LIVE)
    assert await page.run("document.getElementById('model').textContent") == "demo"
    assert await page.run("document.getElementById('state').textContent") == "ready"
    rows = await page.run("[...document.querySelectorAll('#stages tbody tr')].map((row) => row.cells[2].textContent)")
    assert rows == ["embedding, 0-3", "4-7, head"]
    label = await page.run("document.querySelector('#layout-drawing svg').getAttribute('aria-label')")
    assert label == "stage 0 with decoders 0 to 3 on cpu:0; stage 1 with decoders 4 to 7 on cpu:1"
    assert [problem for problem in page.problems if "favicon" not in problem] == []
    assert {url for url in page.requested if not url.startswith(stand.url)} == set()


async def test_the_policy_is_in_force(page: Page, stand: DashboardStand) -> None:
    """A browser that ignored it would let these do something."""
    await page.open(f"{stand.url}/")
    await page.until(IS_LIVE)
    refused = """(() => { try { document.body.innerHTML = "<b>no</b>"; return false; } catch { return true; } })()"""
    assert await page.run(refused)
    inline = "(() => { const made = document.createElement('script'); try { made.text = 'window.ran = 1'; } catch {}"
    assert not await page.run(f"{inline} document.head.append(made); return window.ran === 1; }})()")
    assert not await page.run("fetch('http://127.0.0.1:1/').then(() => true, () => false)")
    assert any("Content Security Policy" in problem for problem in page.problems)


@pytest.mark.parametrize("dark", [False, True])
async def test_it_fits_every_width_and_can_be_read(page: Page, stand: DashboardStand, dark: bool) -> None:
    await page.open(f"{stand.url}/", dark=dark)
    await page.until(IS_LIVE)
    for width in WIDTHS:
        await page.look(width=width, dark=dark)
        await page.until(f"innerWidth === {width}")
        await page.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        wide = "[...document.querySelectorAll('body *')].filter((each) => !each.closest('.scroll, .skip, .hidden')"
        over = await page.run(
            f"{wide} && each.getBoundingClientRect().right > {width} + 1).map((each) => each.outerHTML)"
        )
        assert over == [], f"{width} px"
        assert await page.run("document.documentElement.scrollWidth") <= width
        assert await page.run(TOO_FAINT) == [], f"{width} px, {'dark' if dark else 'light'}"


async def some_load(stand: DashboardStand) -> None:
    """Twenty requests at uneven times, 50 ms to each one's first token and 10 ms to every other."""
    await stand.status.sample()
    sampling = SamplingParams(max_tokens=50, ignore_eos=True)
    request = GenerationRequest(request_id="load", prompt_token_ids=(1, 2, 3), sampling=sampling)
    async with closing(stand.engine.generate(request)) as chunks:
        async for _ in chunks:
            pass
    await stand.status.sample()
    for number in range(20):
        stand.load_clock.now_s += 0.5 if number % 2 else 1.5
        stand.load.arrived(number)
        stand.load_clock.now_s += 0.05
        stand.load.first_token(number)
        stand.load.ended(number, prompt_tokens=3, output_tokens=50, tpot_s=0.01)


async def test_after_some_load_every_plot_has_its_curves_and_says_what_they_are(
    page: Page, stand: DashboardStand
) -> None:
    await page.open(f"{stand.url}/")
    await page.until(IS_LIVE)
    assert await page.run(CURVES) == {
        "Time to first token": 0,
        "Time per output token": 0,
        "Tokens per second": 0,
        "CV of the arrivals": 0,
    }
    await page.until(f"({LABELS})[0] === 'Time to first token: mean not measured yet, p99 not measured yet'")

    await some_load(stand)
    await page.until(f"Object.values({CURVES}).every((count) => count > 0)")
    assert await page.run(CURVES) == {
        "Time to first token": 2,
        "Time per output token": 1,
        "Tokens per second": 1,
        "CV of the arrivals": 3,
    }
    labels = await page.run(LABELS)
    assert [*labels[:2], labels[3]] == [
        "Time to first token: mean 50 ms, p99 50 ms",
        "Time per output token: mean 10 ms",
        "CV of the arrivals: 30 s 0.49, 3 min 0.49, 30 min 0.49",
    ]


async def test_decisions_say_their_reason_in_words(page: Page, stand: DashboardStand) -> None:
    said = "keep: 2 stages serve what comes, CV 0.49 (180 s)"
    stand.decisions.publish(EventKind.DECISION, said, verb="keep", mode="on", numbers={"cv": 0.49})
    await page.open(f"{stand.url}/")
    await page.until(IS_LIVE)
    assert await page.run(REASONS) == [said.removeprefix("keep: ")]
    stand.decisions.publish(EventKind.DECISION, "change: 2 -> 4 stages, CV 4", verb="change", mode="on", numbers={})
    await page.until(f"{REASONS}.length === 2")
    assert (await page.run(REASONS))[0] == "2 \N{RIGHTWARDS ARROW} 4 stages, CV 4"
    assert await page.run("document.querySelector('#decisions .tag').textContent") == "change"


async def focused(page: Page) -> str:
    return str(await page.run("document.activeElement.id || document.activeElement.tagName"))


async def tab_to(page: Page, name: str) -> None:
    for _ in range(60):
        await page.press("Tab")
        if await focused(page) == name:
            return
    raise AssertionError(f"{name} is not reached by the keyboard")


async def preview_four_stages(page: Page, stand: DashboardStand) -> None:
    """Open the page and ask for it by the keyboard alone."""
    await page.open(f"{stand.url}/")
    await page.until(IS_LIVE)
    await tab_to(page, "stages-number")
    await page.run("document.activeElement.select()")
    await page.write("4")
    await page.press("Enter")


async def test_a_layout_is_previewed_and_carried_out_by_the_keyboard_alone(page: Page, stand: DashboardStand) -> None:
    await preview_four_stages(page, stand)
    await page.until("document.querySelectorAll('.ghost').length === 7")
    assert stand.engine.epoch == 0
    assert (
        await page.run("document.getElementById('layout-note').textContent")
        == "preview: 2 \N{RIGHTWARDS ARROW} 4 stages"
    )
    await page.until("document.getElementById('carry-out')")
    await tab_to(page, "carry-out")
    await page.press("Enter")
    await page.until("document.querySelectorAll('#stages tbody tr').length === 4")
    await page.until("document.querySelector('#handover .tag').textContent === 'done'")
    assert stand.engine.epoch == 1
    assert page.problems == []


async def test_without_rights_it_says_how_else(page: Page, stand: DashboardStand) -> None:
    stand.mode = DashboardMode.ON
    await preview_four_stages(page, stand)
    await page.until("document.querySelector('.command')?.textContent === 'flexctl rebalance --stages 4'")
    assert await page.run("document.getElementById('carry-out')") is None


async def test_it_asks_for_a_key_and_keeps_it_in_the_tab(page: Page, stand: DashboardStand) -> None:
    stand.ring = KeyRing(
        hashes=(hashlib.sha256(b"reader's key").digest(),),
        clients=(Client(name="reader", scopes=frozenset({Scope.READ})),),
    )
    await page.open(f"{stand.url}/")
    await page.until("document.getElementById('key-dialog').open")
    await page.write("not the key")
    await page.press("Enter")
    await page.until("document.getElementById('key-said').textContent.startsWith('the API key is not known here')")
    await page.until("document.activeElement.id === 'key-input'")
    await page.write("reader's key")
    await page.press("Enter")
    await page.until(IS_LIVE)
    assert await page.run("document.querySelector('#change button').disabled")
    await page.send("Page.reload")
    await page.until(IS_LIVE)
    assert await page.run("JSON.stringify([localStorage.length, location.href])") == json.dumps(
        [0, f"{stand.url}/"], separators=(",", ":")
    )
    assert [url for url in page.requested if "key" in url.partition("/dashboard/app/")[0]] == []


async def test_a_theme_that_is_chosen_stays(page: Page, stand: DashboardStand) -> None:
    await page.open(f"{stand.url}/", dark=True)
    await page.until(IS_LIVE)
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = await page.run(ground)
    await page.run("document.getElementById('theme').click()")  # system -> light
    assert await page.run(ground) != dark
    await page.send("Page.reload")
    await page.until(IS_LIVE)
    assert await page.run(ground) != dark
    assert await page.run("document.getElementById('theme').textContent") == "Theme: light"


async def test_it_comes_back_after_the_daemon(page: Page, stand: DashboardStand) -> None:
    await page.open(f"{stand.url}/")
    await page.until(IS_LIVE)
    stand.feed.end_streams("it serves now")
    await page.until("document.getElementById('notice').textContent.startsWith('it serves now')")
    await page.until(IS_LIVE)
    await page.until("document.getElementById('notice').hidden")


async def test_it_writes_values_as_flexctl_does(page: Page, stand: DashboardStand) -> None:
    await page.open(f"{stand.url}/")
    await page.until(IS_LIVE)
    times = [0.0, 0.0021, 0.00994, 0.00996, 0.0994, 0.0996, 0.5, 0.994, 0.996, 2.44, 59.9, 61, 3700, 90061, 9.999, 12]
    sizes = [0, 1, 1023, 1024, 1536, 10 * 1024 - 60, 812 * 1024, 4_404_019, 96 << 20, (1 << 30) - 1, 3 << 40]
    expected = {
        "duration": [format_duration(each) for each in times],
        "latency": [format_latency(each) for each in times],
        "age": [format_age(each) for each in times],
        "bytes": [format_bytes(each) for each in sizes],
    }
    for name, texts in expected.items():
        values = sizes if name == "bytes" else times
        script = SCRIPTS_OF_PAGE.format(name="format.js", functions=name, expression=f"{values}.map({name})")
        assert await page.run(script) == texts, name


async def test_layers_have_the_same_names_as_in_flexctl(page: Page, stand: DashboardStand) -> None:
    await page.open(f"{stand.url}/")
    await page.until(IS_LIVE)
    stages = [(0, 4), (4, 5), (5, 5), (5, 8)]
    for index, (first, end) in enumerate(stages):
        stage: dict[str, Any] = {"first_decoder": first, "end_decoder": end}
        ends = (index == 0, index == len(stages) - 1)
        expression = f"layersText({json.dumps(stage)}, {json.dumps(ends[0])}, {json.dumps(ends[1])})"
        script = SCRIPTS_OF_PAGE.format(name="format.js", functions="layersText", expression=expression)
        assert await page.run(script) == layers_text(stage, is_first=ends[0], is_last=ends[1])


async def test_a_stream_that_is_cut_anywhere_is_read_whole(page: Page, stand: DashboardStand) -> None:
    await page.open(f"{stand.url}/")
    await page.until(IS_LIVE)
    text = 'event: status\ndata: {"a":"b\\nc"}\n\n: a comment\n\nevent: bye\ndata: 1\n\n'
    script = (
        "(() => { const found = new Set(); for (let at = 0; at <= text.length; at += 1) {"
        " const reader = new EventReader();"
        " found.add(JSON.stringify([...reader.take(text.slice(0, at)), ...reader.take(text.slice(at))])); }"
        " return [...found]; })()"
    ).replace("text", json.dumps(text))
    found = await page.run(SCRIPTS_OF_PAGE.format(name="sse.js", functions="EventReader", expression=script))
    assert [json.loads(each) for each in found] == [
        [{"topic": "status", "data": {"a": "b\nc"}}, {"topic": "bye", "data": 1}]
    ]
