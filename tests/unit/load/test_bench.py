"""``flexctl bench`` as a process, against the daemon's HTTP application with the fake engine, and against worse."""

import asyncio
import json
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from statistics import fmean, pstdev

import pytest

from tests.support.http_app import http_app
from tests.support.until import until
from tests.unit.flexctl.test_command_line import Ran, flexctl

pytestmark = pytest.mark.real_loop
FEW = ("--rate", "40", "--duration", "0.3", "--prompt", "8", "--output", "6", "--timeout", "20")
EVENT = b'data: {"choices": [{"text": "a"}]}\n\n'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


async def bench(url: str, *more: str) -> Ran:
    return await flexctl("bench", "--url", url, *FEW, *more)


@asynccontextmanager
async def server_that_answers(*answers: bytes) -> AsyncIterator[str]:
    """Serve on a free port; each connection gets the next of ``answers`` (the last one for ever) and is closed."""
    left = list(answers)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if length := re.search(rb"(?i)\r\ncontent-length: *(\d+)", head):
            await reader.readexactly(int(length[1]))  # what is unread when it is closed would make that a reset
        if head.startswith(b"GET"):
            body = b'{"data": [{"id": "m"}]}'
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        else:
            writer.write(left.pop(0) if len(left) > 1 else left[0])
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/v1"


async def test_figures_of_the_daemon(tmp_path: Path) -> None:
    details = tmp_path / "details"
    async with http_app() as app:
        plain, as_json = await asyncio.gather(
            bench(app.url, "--slo-ttft", "30", "--details", str(details)), bench(app.url, "--json", "--chat")
        )

    assert plain.code == 0, plain.err
    assert "TTFT" in plain.out
    assert "(100.0% within TTFT 30 s)" in plain.out
    found = json.loads(as_json.out)
    assert (as_json.code, found["failed"], found["failures"]) == (0, 0, {})
    assert found["requests"] == len(details.read_text().splitlines()) > 3
    assert found["ttft_s"]["percentiles"].keys() == {"p50", "p90", "p95", "p99", "p99_9"}


async def test_details_that_cannot_be_written_are_told_before_anything_is_sent(tmp_path: Path) -> None:
    async with server_that_answers(HEAD + EVENT) as url:
        ran = await bench(url, "--details", str(tmp_path / "none" / "details"))

    assert (ran.code, ran.out) == (1, "")
    assert ran.err == f"flexctl: {tmp_path}/none/details: No such file or directory\n"


async def test_an_interrupt_shows_what_had_ended() -> None:
    arguments = ("--rate", "200", "--duration", "600", "--prompt", "8", "--output", "6")
    async with http_app() as app:

        async def many_have_ended() -> bool:
            return (await app.engines.last.counters()).generated_tokens_total >= 60 * 6

        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "flexpiped.flexctl", "bench", "--url", app.url, *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        await until(many_have_ended)
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()

    assert process.returncode == 130
    assert b"TTFT" in out
    assert re.fullmatch(rb"flexctl: interrupted; only the \d+ requests that had ended are counted\n", err)


async def test_a_trace_is_replayed(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    lines = [f"2023-11-16 18:00:0{second}.5,20,{second + 1}" for second in range(4)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    async with http_app() as app:
        ran = await flexctl("bench", "--url", app.url, "--trace", str(trace), "--speed", "100", "--json")

    assert (ran.code, json.loads(ran.out)["requests"]) == (0, 4), ran.err


async def test_the_cv_of_the_arrivals_is_the_one_asked_for(tmp_path: Path) -> None:
    async def cv_of(name: str, *more: str) -> float:
        details = tmp_path / name
        drawn = ("--rate", "200", "--duration", "2", "--prompt", "4", "--output", "2", "--seed", "1")
        ran = await flexctl("bench", "--url", app.url, *drawn, *more, "--details", str(details))
        assert ran.code == 0, ran.err
        arrivals_s = [json.loads(line)["arrival_s"] for line in details.read_text().splitlines()]
        gaps_s = [after - before for before, after in pairwise(sorted(arrivals_s))]
        return pstdev(gaps_s) / fmean(gaps_s)

    async with http_app() as app:
        even, usual, bursty = [await cv_of(*each) for each in (("0", "--cv", "0"), ("1",), ("4", "--cv", "4"))]

    assert even == pytest.approx(0.0, abs=1e-6)
    assert usual == pytest.approx(1.0, rel=0.2)
    assert bursty > 2


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (HEAD + EVENT, "the stream broke off after 1 events"),
        (HEAD + b"data: {nonsense\n\n", "an event that cannot be read"),
        (b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\n\r\nbusy", "429: busy"),
        (b"", "ServerDisconnectedError"),
        (b"nothing of HTTP\r\n\r\n", "ClientResponseError|ClientOSError|ServerDisconnectedError"),
    ],
)
async def test_a_server_that_breaks_makes_it_fail_with_the_reason(answer: bytes, reason: str) -> None:
    async with server_that_answers(answer) as url:
        ran = await bench(url)

    assert ran.code == 1
    assert "failed" in ran.out
    assert any(each in ran.out for each in reason.split("|")), ran.out


async def test_what_is_served_counts_beside_what_fails() -> None:
    good = HEAD + EVENT * 6 + b"data: [DONE]\n\n"
    async with server_that_answers(HEAD, good) as url:
        found = json.loads((await bench(url, "--json")).out)

    assert (found["failed"], list(found["failures"].values())) == (1, [1])
    assert found["requests"] > 2


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (("--url", "nonsense"), 2, "a URL such as"),
        (("--url", "http://127.0.0.1:9/v1"), 3, "no server at http://127.0.0.1:9/v1"),
        (("--trace", "/no/such/file"), 2, "No such file"),
        (("--trace", __file__), 2, "neither Azure CSV"),
        (("--trace", __file__, "--rate", "2"), 2, "without --rate"),
        (("--rate", "-1"), 2, "a positive number"),
        (("--socket", "/no/such/socket"), 3, "no daemon"),
    ],
)
async def test_what_cannot_be_done(arguments: tuple[str, ...], code: int, reason: str) -> None:
    ran = await flexctl("bench", *arguments)

    assert (ran.code, reason in ran.err) == (code, True), ran.err
    assert "Traceback" not in ran.err
