"""The HTTP API of a real daemon over TLS with API keys: what schemathesis finds, and what is in the log afterwards."""

import asyncio
import hashlib
import ssl
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.support.certificates import make_certificate
from tests.support.daemon import Daemon, started
from tests.support.schemathesis import cases_in, run_schemathesis

pytestmark = [pytest.mark.real_loop, pytest.mark.asyncio(loop_scope="module")]
KEY, WRONG_KEY = "sk-flexpiped-Zu4ohqu3", "sk-flexpiped-Aen7iegh"
PROMPT = "a quokka whispered"
GENERATING = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")


@dataclass(frozen=True, slots=True, kw_only=True)
class Api:
    daemon: Daemon
    session: aiohttp.ClientSession
    url: str
    certificate: Path

    async def post(self, path: str, body: Any, *, key: str = KEY) -> tuple[int, str]:
        data = body if isinstance(body, bytes) else None
        headers = {"Authorization": f"Bearer {key}"}
        async with self.session.post(
            f"{self.url}{path}", json=None if data else body, data=data, headers=headers
        ) as response:
            return response.status, await response.text()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Api]:
    """A short context, so that answers of any length are short."""
    folder = tmp_path_factory.mktemp("api")
    certificate, key = make_certificate(folder, "daemon")
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    (folder / "keys.toml").write_text(f'[[keys]]\nname = "tester"\nsha256 = "{digest}"\nscopes = ["admin"]\n')
    more = (
        f'max_model_len = 64\nlog.level = "debug"\nhttp.api_keys = "{folder / "keys.toml"}"\n'
        f'http.tls_certificate = "{certificate}"\nhttp.tls_key = "{key}"\n'
    )
    async with started(folder, ready=True, engine="fake", stages=1, more=more) as daemon:
        url = (await daemon.ask("/status"))["api_url"].removesuffix("/v1")
        trust = aiohttp.TCPConnector(ssl=ssl.create_default_context(cafile=certificate))
        async with aiohttp.ClientSession(connector=trust) as session:
            yield Api(daemon=daemon, session=session, url=url, certificate=certificate)


async def schemathesis(api: Api, *arguments: str) -> tuple[int, str]:
    """Run it against the daemon with every check; return its exit code and output."""
    header = ("--header", f"Authorization: Bearer {KEY}", "--tls-verify", str(api.certificate))
    return await run_schemathesis(api.url, *header, *arguments, folder=api.daemon.config.parent)


async def test_schemathesis_finds_no_violation(api: Api) -> None:
    code, output = await schemathesis(api, "--phases", "fuzzing", "--max-examples", "8")
    assert code == 0, output[-8000:]
    assert cases_in(output) > 100, output[-2000:]


# What generates, tokenizes or takes text has the cases; the rest of the operations are in the short form.
@pytest.mark.long
@pytest.mark.parametrize("path", GENERATING)
async def test_schemathesis_finds_no_violation_in_ten_thousand_cases(api: Api, path: str) -> None:
    """A quarter of them for each path, so that each part has an end of its own."""
    arguments = ("--include-path", path, "--phases", "examples,coverage,fuzzing", "--max-examples", "2500")
    code, output = await schemathesis(api, *arguments)
    assert code == 0, output[-8000:]
    assert cases_in(output) >= 2_500, output[-2000:]


def requests_good_and_bad() -> Iterator[tuple[str, Any, int]]:
    """Yield path, body and status of requests, each with the prompt somewhere."""
    chat = [{"role": "user", "content": PROMPT}]
    yield "/v1/completions", {"prompt": PROMPT, "max_tokens": 8}, 200
    yield "/v1/completions", {"prompt": PROMPT, "max_tokens": 8, "stream": True}, 200
    yield "/v1/chat/completions", {"messages": chat, "max_tokens": 8, "stop": [PROMPT]}, 200
    yield "/tokenize", {"prompt": PROMPT}, 200
    yield "/v1/completions", {"prompt": PROMPT * 60}, 400
    yield "/v1/completions", {"prompt": PROMPT, "stop": [PROMPT, ""]}, 400
    yield "/v1/completions", {"prompt": [PROMPT, [5]]}, 400
    yield "/v1/completions", {"prompt": "x", PROMPT: PROMPT}, 400
    yield "/v1/completions", {"prompt": "x", "model": PROMPT}, 404
    yield "/v1/completions", f'{{"prompt": "{PROMPT}"'.encode(), 400
    yield "/v1/completions", f'{{"prompt": "{PROMPT}'.encode() + b"\xff", 400
    yield "/v1/chat/completions", {"messages": [{"role": PROMPT, "content": PROMPT}]}, 400
    yield "/v1/embeddings", {"input": PROMPT}, 404
    yield f"/v1/{PROMPT.replace(' ', '-')}", {"prompt": PROMPT}, 404


async def test_no_key_prompt_or_text_is_in_the_log(api: Api) -> None:
    """At level debug, of requests good and bad; what schemathesis sent before this test is in that log, too."""
    texts = []
    for path, body, status in requests_good_and_bad():
        found, text = await api.post(path, body)
        assert found == status, (path, body, text)
        if path == "/v1/completions" and found == 200 and text.startswith("{"):
            texts.append(text.partition('"text":"')[2].partition('"')[0])
    for wrong in (WRONG_KEY, PROMPT):
        assert (await api.post("/v1/completions", {"prompt": PROMPT}, key=wrong))[0] == 401
    reader, writer = await asyncio.open_connection(
        *api.url.removeprefix("https://").split(":"), ssl=ssl.create_default_context(cafile=api.certificate)
    )
    writer.write(f"GET / HTTP/1.1\r\nHost: x\r\nBad\x00{KEY}: {PROMPT}\r\n\r\n".encode())
    assert b" 400 Bad Request" in await reader.read()
    writer.close()
    log = api.daemon.output.read_text()
    assert "daemon ready" in log
    (answered,) = texts
    assert len(answered) > 5
    for secret in (
        KEY,
        WRONG_KEY,
        hashlib.sha256(KEY.encode()).hexdigest(),
        PROMPT,
        PROMPT.replace(" ", "-"),
        answered,
    ):
        assert secret not in log


async def test_a_certificate_is_replaced_by_a_reload(api: Api) -> None:
    new, _key = make_certificate(api.daemon.config.parent, "daemon")  # in the same files
    code, out, err = await api.daemon.flexctl("reload")
    assert code == 0, out + err
    trust = aiohttp.TCPConnector(ssl=ssl.create_default_context(cafile=new))
    async with (
        aiohttp.ClientSession(connector=trust) as session,
        session.get(f"{api.url}/healthz") as response,
    ):
        assert response.status == 200
