"""The product as a user runs it: the daemon with the native engine and the demo model, flexctl, the openai client."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
import pytest_asyncio

from tests.native.test_failures import alive
from tests.support.daemon import Daemon, rebalanced_to_its_plan, started
from tests.support.hanging_up import LEVELS, leave_at_random
from tests.support.metrics import metrics_of
from tests.support.secrets import DEBUG, assert_not_logged
from tests.support.until import until

pytestmark = [pytest.mark.engine, pytest.mark.real_loop, pytest.mark.asyncio(loop_scope="module")]

Json = dict[str, Any]
CANARY = "A quokka named Zanzibar whispered"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def daemon(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    async with started(tmp_path_factory.mktemp("daemon"), ready=True, engine="native", more=DEBUG) as daemon:
        yield daemon


@pytest_asyncio.fixture(loop_scope="module")
async def client(daemon: Daemon) -> AsyncIterator[openai.AsyncOpenAI]:
    url = (await daemon.ask("/status"))["api_url"]
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


async def stream(client: openai.AsyncOpenAI, **options: Any) -> list[str]:
    arguments = {"model": "demo-model", "prompt": "Once", "max_tokens": 400, "temperature": 0.8, "seed": 11} | options
    chunks = await client.completions.create(stream=True, **arguments)
    return [chunk.choices[0].text async for chunk in chunks if chunk.choices]


async def post(url: str, body: Json) -> bytes:
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as answer:
        return await answer.read()


async def until_counted(daemon: Daemon, condition: Callable[[Json], bool]) -> Json:
    """Return the counters of the engine once they are as wanted."""
    async with asyncio.timeout(60.0):
        while not condition(counters := (await daemon.ask("/status"))["engine_counters"]):  # noqa: ASYNC110  another process
            await asyncio.sleep(0.01)  # to ask all the time would hold up what is waited for
    return dict(counters)


async def test_a_stream_goes_on_as_if_nothing_had_happened(daemon: Daemon, client: openai.AsyncOpenAI) -> None:
    undisturbed = "".join(await stream(client))
    running = asyncio.create_task(stream(client))
    for stages in (8, 1, 3, 2):
        code, out, err = await daemon.flexctl("rebalance", "--stages", str(stages), "--wait")
        assert code == 0, err
        assert "done in" in out
        assert "commit" in out
    assert "".join(await running) == undisturbed
    assert len((await daemon.ask("/status"))["stages"]) == 2


async def test_the_openai_client_gets_choices_log_probabilities_and_json(client: openai.AsyncOpenAI) -> None:
    two = await client.completions.create(
        model="demo-model", prompt="Once", n=2, seed=3, max_tokens=8, temperature=1.0, logprobs=2, echo=True
    )
    alone = await client.completions.create(
        model="demo-model", prompt="Once", seed=4, max_tokens=8, temperature=1.0, presence_penalty=0.0
    )
    assert two.choices[1].text == "Once" + alone.choices[0].text
    told = two.choices[0].logprobs
    assert told is not None
    assert told.token_logprobs is not None
    assert told.token_logprobs[0] is None
    assert len(told.token_logprobs) == two.usage.prompt_tokens + 8  # type: ignore[union-attr]
    question: Any = [{"role": "user", "content": "What is 3 + 4?"}]
    schema = {"type": "object", "properties": {"sum": {"type": "integer", "maximum": 99}}, "required": ["sum"]}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}}
    answer = await client.chat.completions.create(
        model="demo-model",
        messages=question,
        response_format=wanted,
        logprobs=True,
        top_logprobs=1,
        extra_body={"structured_outputs": None},
        max_tokens=60,
        logit_bias={},
    )
    assert answer.choices[0].logprobs is not None
    if answer.choices[0].finish_reason == "stop":
        assert "sum" in json.loads(answer.choices[0].message.content or "")
    wanted["json_schema"]["schema"] = {"type": "nonsense"}
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="demo-model", messages=question, response_format=wanted)
    assert (caught.value.param, caught.value.code) == ("response_format", "invalid_grammar")


async def test_neither_prompts_nor_answers_are_in_the_log(daemon: Daemon, client: openai.AsyncOpenAI) -> None:
    streaming = asyncio.create_task(stream(client, prompt=CANARY, max_tokens=600, extra_body={"ignore_eos": True}))
    for stages in (4, 2):
        code, _, err = await daemon.flexctl("rebalance", "--stages", str(stages), "--wait")
        assert code == 0, err
    completed = "".join(await streaming)
    question: Any = [{"role": "user", "content": CANARY}]
    answer = await client.chat.completions.create(
        model="demo-model", messages=question, max_tokens=60, extra_body={"ignore_eos": True}
    )
    with pytest.raises(openai.BadRequestError):
        await stream(client, prompt=CANARY, temperature=-1)
    assert_not_logged(daemon, CANARY, completed, answer.choices[0].message.content or "")


async def test_the_openai_client_chats(client: openai.AsyncOpenAI) -> None:
    question: Any = [{"role": "user", "content": "What is 3 + 4?"}]
    answer = await client.chat.completions.create(model="demo-model", messages=question, temperature=0)
    assert answer.choices[0].finish_reason == "stop"
    assert "7" in (answer.choices[0].message.content or "")
    chunks = await client.chat.completions.create(
        model="demo-model", messages=question, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    parts = [chunk async for chunk in chunks]
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == answer.choices[0].message.content
    usage = parts[-1].usage
    assert usage is not None
    assert answer.usage is not None
    assert usage.prompt_tokens == answer.usage.prompt_tokens
    assert usage.completion_tokens == answer.usage.completion_tokens
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == (usage.prompt_tokens - 1) // 16 * 16  # it was asked before


async def test_a_client_that_hangs_up_frees_its_request_within_a_second(
    daemon: Daemon, client: openai.AsyncOpenAI
) -> None:
    """The fastest of three: other processes of the machine must not decide this."""
    url = (await daemon.ask("/status"))["api_url"]
    for max_tokens, prompt in ((3000, "Once"), (200, "Once upon a time " * 500)):  # decoding, and in prefill
        body = {"prompt": prompt, "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
        assert min([await hang_up(daemon, f"{url}/completions", body) for _ in range(3)]) < 1.0
    assert await stream(client, max_tokens=3)


async def hang_up(daemon: Daemon, url: str, body: Json) -> float:
    """Leave a request that runs, and return the seconds until nothing is left of it."""
    request = asyncio.create_task(post(url, body))
    await until_counted(daemon, lambda counters: counters["running"] > 0)
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    left_s = time.perf_counter()
    counters = await until_counted(daemon, lambda counters: counters["running"] + counters["waiting"] == 0)
    assert counters["kv_blocks_used"] == 0
    return time.perf_counter() - left_s


async def test_clients_that_hang_up_at_random_moments_leave_nothing_behind(daemon: Daemon) -> None:
    await hang_up_at_random(daemon, clients=150)


@pytest.mark.long
async def test_10000_clients_that_hang_up_at_random_moments_leave_nothing_behind(daemon: Daemon) -> None:
    await hang_up_at_random(daemon, clients=10_000)


async def hang_up_at_random(daemon: Daemon, *, clients: int) -> None:
    """More at once than the engine computes: some wait there."""
    url = (await daemon.ask("/status"))["api_url"].removesuffix("/v1")
    before, files = await metrics_of(url), open_files(daemon.process.pid)

    await leave_at_random(url, clients=clients, at_once=100, max_tokens=60)

    async with asyncio.timeout(30.0):
        after = await metrics_of(url)
        while any(after[level] for level in LEVELS):
            after = await metrics_of(url)
    assert after["flexpiped_requests_total"] - before["flexpiped_requests_total"] > 0.7 * clients
    assert open_files(daemon.process.pid) <= files + 2  # of this test's own connections


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def test_flexctl_says_what_a_user_needs(daemon: Daemon) -> None:
    code, out, _ = await daemon.flexctl("status", "--json")
    status = json.loads(out)
    assert (code, status["engine"], status["state"]) == (0, "native", "ready")
    code, out, err = await daemon.flexctl("rebalance", "--stages", "12")
    assert code == 4
    assert "at most 8 stages" in out + err
    code, out, _ = await daemon.flexctl("rebalance", "--stages", "4", "--dry-run")
    assert code == 0
    assert "2 -> 4 stages" in out
    code, out, _ = await daemon.flexctl("events", "--json")
    kinds = {json.loads(line)["kind"] for line in out.splitlines()}
    assert code == 0
    assert kinds


async def test_what_is_planned_is_what_runs(daemon: Daemon) -> None:
    assert await rebalanced_to_its_plan(daemon, "--stages", "4") == 4
    assert await rebalanced_to_its_plan(daemon) == 4  # calm traffic is served: nothing is better than to stay
    code, out, err = await daemon.flexctl("plan", "--explain")
    assert code == 0, err
    assert "best of 5 candidates" in " ".join(out.split())
    assert await rebalanced_to_its_plan(daemon, "--stages", "2") == 2


async def test_status_answers_fast_on_an_idle_machine(daemon: Daemon) -> None:
    """The fastest of at most twenty: other processes of the machine must not decide this."""
    seconds = [await status_s(daemon)]
    while seconds[-1] >= 0.3 and len(seconds) < 20:
        seconds.append(await status_s(daemon))
    assert min(seconds) < 0.3


async def status_s(daemon: Daemon) -> float:
    start = time.perf_counter()
    code, _, err = await daemon.flexctl("status")
    assert code == 0, err
    return time.perf_counter() - start


async def test_the_daemon_has_no_torch_and_its_end_leaves_no_process(daemon: Daemon) -> None:
    """The last of that daemon."""
    assert "libtorch" not in memory_maps(daemon.process.pid)
    family = descendants(daemon.process.pid)
    assert len(family) == 10  # text process, core, eight workers
    daemon.process.kill()
    await daemon.process.wait()
    await until(lambda: all_ended(family), timeout_s=60.0)


async def all_ended(pids: list[int]) -> bool:
    return not any(alive(pid) for pid in pids)


def memory_maps(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def descendants(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [pid for child in children for pid in descendants(child)]
