"""A real Prometheus scrapes a real daemon with a key of scope read, and finds what alerts and dashboard ask for."""

import asyncio
import hashlib
import json
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.daemon import started
from tests.support.until import until

ETC = Path(__file__).parents[2] / "etc"
KEY, READING_KEY = "sk-flexpiped-Roo8eiph", "sk-flexpiped-Ahm3ooth"
REQUESTS = 3

pytestmark = [
    pytest.mark.real_loop,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
]


def keys_in(folder: Path) -> Path:
    file = folder / "keys.toml"
    lines = []
    for name, key, scope in (("client", KEY, "infer"), ("prometheus", READING_KEY, "read")):
        digest = hashlib.sha256(key.encode()).hexdigest()
        lines.append(f'[[keys]]\nname = "{name}"\nsha256 = "{digest}"\nscopes = ["{scope}"]\n')
    file.write_text("".join(lines))
    return file


def config_in(folder: Path, target: str) -> Path:
    """Return a configuration as the README has it; JSON is YAML, too."""
    file = folder / "prometheus.yml"
    job = {
        "job_name": "flexpiped",
        "static_configs": [{"targets": [target]}],
        "authorization": {"credentials": READING_KEY},
    }
    often = {"scrape_interval": "2s", "scrape_timeout": "2s", "evaluation_interval": "500ms"}  # a busy machine's, too
    rules = [str(ETC / "prometheus" / "flexpiped.rules.yml")]
    file.write_text(json.dumps({"global": often, "rule_files": rules, "scrape_configs": [job]}))
    return file


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@asynccontextmanager
async def prometheus(folder: Path, target: str) -> AsyncIterator[aiohttp.ClientSession]:
    """Run one that scrapes ``target``; yield a session with its API."""
    address = f"127.0.0.1:{free_port()}"
    with (folder / "prometheus.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *("prometheus", f"--config.file={config_in(folder, target)}", f"--web.listen-address={address}"),
            f"--storage.tsdb.path={folder / 'data'}",
            stdout=log,
            stderr=log,
        )
    try:
        async with aiohttp.ClientSession(f"http://{address}") as session:
            yield session
    finally:
        process.terminate()
        await process.wait()


async def asked(session: aiohttp.ClientSession, path: str, **query: str) -> Any:
    """Return the data of an answer, None where it does not answer yet."""
    try:
        async with session.get(path, params=query) as answer:
            if answer.status == 503:  # it listens before it is ready
                return None
            body = await answer.json()
    except aiohttp.ClientConnectionError:
        return None
    assert body.get("status") == "success", (query, body)
    return body["data"]


async def value_of(session: aiohttp.ClientSession, expression: str) -> float | None:
    found = await asked(session, "/api/v1/query", query=expression)
    return float(found["result"][0]["value"][1]) if found and found["result"] else None


async def has_alerts(session: aiohttp.ClientSession, *names: str) -> bool:
    """Say whether these alerts and no others fire, or will when what they tell of has lasted as long as they say."""
    alerts = (await asked(session, "/api/v1/alerts"))["alerts"]
    return sorted(alert["labels"]["alertname"] for alert in alerts) == sorted(names)


async def test_it_scrapes_and_every_rule_and_panel_can_be_evaluated(tmp_path: Path) -> None:
    panels = json.loads((ETC / "grafana" / "flexpiped.json").read_text(encoding="utf-8"))["panels"]
    more = f'http.api_keys = "{keys_in(tmp_path)}"\n'
    async with started(tmp_path, ready=True, engine="fake", stages=2, more=more) as daemon:
        url = (await daemon.ask("/status"))["api_url"]
        target = url.removeprefix("http://").removesuffix("/v1")
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as client:
            for _ in range(REQUESTS):
                async with client.post(f"{url}/completions", json={"prompt": "x", "max_tokens": 2}) as answer:
                    assert answer.status == 200, await answer.text()
        async with prometheus(tmp_path, target) as session:

            async def has_scraped() -> bool:
                return await value_of(session, "sum(flexpiped_requests_total)") == REQUESTS

            async def has_evaluated() -> bool:
                rules = [rule for group in (await asked(session, "/api/v1/rules"))["groups"] for rule in group["rules"]]
                assert len(rules) > 5
                return all(rule["health"] != "unknown" for rule in rules)

            async def is_up() -> bool:
                (scraped,) = (await asked(session, "/api/v1/targets"))["activeTargets"]
                return await value_of(session, "up") == 1 and (scraped["health"], scraped["lastError"]) == ("up", "")

            await until(has_scraped)
            await until(has_evaluated)
            await until(is_up)  # a scrape may have come too late
            assert await value_of(session, 'flexpiped_state{state="ready"}') == 1
            groups = (await asked(session, "/api/v1/rules"))["groups"]
            assert {(rule["health"], rule.get("lastError", "")) for each in groups for rule in each["rules"]} == {
                ("ok", "")
            }
            await until(lambda: has_alerts(session))  # none, once rules were evaluated after the first scrape
            for expression in [part["expr"] for panel in panels for part in panel["targets"]]:
                assert await asked(session, "/api/v1/query", query=expression.replace("$__rate_interval", "1m"))
            daemon.process.kill()
            await until(lambda: has_alerts(session, "FlexpipedDown"))
