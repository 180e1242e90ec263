"""What does not fit, over a real socket: the status, when to come back, the code, and what it counts as."""

import asyncio
import hashlib
from dataclasses import dataclass, field, replace

import aiohttp
import pytest

from flexpiped.admission import AdmissionLimits, OverloadReason
from flexpiped.keys import Client, KeyRing
from tests.support.http_app import FakeEngines, http_app, saying
from tests.support.until import until

pytestmark = pytest.mark.real_loop
COMPLETION = {"prompt": "Once", "max_tokens": 4}
KEY = {"Authorization": "Bearer secret"}
ALICE = Client(name="alice")
NO_LINE = AdmissionLimits(max_requests_queued=0)
ONE_AT_A_TIME = AdmissionLimits(max_requests_in_flight=1, max_requests_queued=1, queue_deadline_s=0.05)


@dataclass(frozen=True, slots=True, kw_only=True)
class Second:
    """Why a second request does not fit while the first is in flight, and what it is told."""

    reason: OverloadReason
    status: int
    outcome: str
    limits: AdmissionLimits = NO_LINE
    client: Client = ALICE
    headers: dict[str, str] = field(default_factory=dict)
    retry_after_s: range = range(1, 2)


CASES = [
    Second(
        reason=OverloadReason.TOO_MANY_REQUESTS,
        status=429,
        outcome="overloaded",
        limits=AdmissionLimits(max_requests_in_flight=1),
    ),
    Second(
        reason=OverloadReason.TOO_MANY_TOKENS,
        status=429,
        outcome="overloaded",
        limits=AdmissionLimits(max_tokens_in_flight=8),
    ),
    Second(
        reason=OverloadReason.KEY_CONCURRENCY,
        status=429,
        outcome="overloaded",
        client=replace(ALICE, max_requests_in_flight=1),
    ),
    Second(
        reason=OverloadReason.KEY_RATE,
        status=429,
        outcome="overloaded",
        client=replace(ALICE, requests_per_minute=0.5),
        retry_after_s=range(100, 121),  # two minutes, but for what has passed since the first
    ),
    Second(reason=OverloadReason.QUEUE_TIMEOUT, status=503, outcome="overloaded", limits=ONE_AT_A_TIME),
    Second(
        reason=OverloadReason.DEADLINE,
        status=503,
        outcome="late",
        limits=AdmissionLimits(max_requests_in_flight=1, max_requests_queued=1),
        headers={"X-Request-Deadline-Ms": "50"},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason.value)
async def test_what_does_not_fit_is_told_why_and_when_to_come_back(case: Second) -> None:
    ring = KeyRing(hashes=(hashlib.sha256(b"secret").digest(),), clients=(case.client,))
    engines = FakeEngines(next_token=saying("Once upon a time"))
    async with (
        http_app(engines=engines, limits=case.limits, keys=lambda: ring) as app,
        aiohttp.ClientSession(app.url, headers=KEY) as session,
    ):
        engines.last.hold()
        first = asyncio.create_task(session.post("/v1/completions", json=COMPLETION))
        await until(lambda: app.backend.admission.tokens_in_flight > 0)
        async with session.post("/v1/completions", json=COMPLETION, headers=case.headers) as answer:
            error = (await answer.json())["error"]
        engines.last.release()
        assert (await first).status == 200

        assert (answer.status, error["code"]) == (case.status, case.reason.value)
        assert int(answer.headers["Retry-After"]) in case.retry_after_s
        assert f"retry in {answer.headers['Retry-After']} s" in error["message"]
        shown = app.backend.metrics.render(None).decode().splitlines()
        assert f'flexpiped_requests_total{{endpoint="completions",outcome="{case.outcome}"}} 1.0' in shown
        await app.becomes_idle()


def test_every_reason_has_its_case() -> None:
    assert {case.reason for case in CASES} == set(OverloadReason)
