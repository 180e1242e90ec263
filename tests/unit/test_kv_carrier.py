"""KV caches that are carried to a second instance: loaded there, or computed again, and nothing lost either way."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from engines.closing import closing
from engines.fake import FAKE_CAPABILITIES, FakeEngine
from engines.fake_batch import hashed_tokens
from engines.fake_kv import FAKE_KV_FORM
from engines.offers import KvParcel
from engines.protocol import EngineCapabilities, GenerationRequest, SamplingParams
from flexpiped.kv_ahead import KvAhead
from flexpiped.kv_carrier import Carried, KvCarrier, copy_refusal
from flexpiped.replica_handover import ReplicaRunner
from flexpiped.supervisor import Supervisor
from planner.kv_route import KvPreference
from planner.layout import Pipeline
from tests.support.layouts import even_pipeline
from tests.support.until import until

STREAMS = 8
TOKENS = 200
KV = replace(FAKE_CAPABILITIES, kv_form=FAKE_KV_FORM)
DONE = "the second instance serves, "


def request(index: int) -> GenerationRequest:
    prompt = tuple(5 + (index * 37 + i) % 500 for i in range(3 + index % 7))
    return GenerationRequest(
        request_id=f"r{index}",
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=TOKENS, ignore_eos=True),
    )


def undisturbed(index: int) -> list[int]:
    next_token = hashed_tokens(KV.vocab_size)
    return [next_token(request(index), position) for position in range(TOKENS)]


class Rig:
    """A supervisor of fake engines that hand their KV caches over, and streams through it."""

    def __init__(self) -> None:
        self.engines: list[FakeEngine] = []
        self.capabilities = [KV]  # of the engines in order; the last for all that follow
        self.supervisor = Supervisor(factory=self._make, pipeline=even_pipeline(2), sleep=_at_once)
        self.got: list[list[int]] = [[] for _ in range(STREAMS)]
        self.tasks: list[asyncio.Task[None]] = []

    def _make(self, pipeline: Pipeline, epoch: int) -> FakeEngine:
        capabilities = self.capabilities[min(len(self.engines), len(self.capabilities) - 1)]
        self.engines.append(FakeEngine(pipeline=pipeline, epoch=epoch, capabilities=capabilities))
        return self.engines[-1]

    async def begin(self) -> None:
        self.tasks = [asyncio.create_task(self._read(index)) for index in range(STREAMS)]
        await until(lambda: all(len(tokens) >= 5 for tokens in self.got))

    async def _read(self, index: int) -> None:
        async with closing(self.supervisor.generate(request(index))) as chunks:
            async for chunk in chunks:
                self.got[index].extend(chunk.token_ids)

    async def hand_over(
        self, preference: KvPreference = KvPreference.COPY, *, at: Callable[[str], None] = lambda _message: None
    ) -> str:
        """Return the last word of the handover; ``at`` is told each one."""
        runner = ReplicaRunner(self.supervisor, even_pipeline(4), carrier=KvCarrier(preference=preference))
        message = ""
        async for report in runner.run():
            message = report.message
            at(message)
        return message

    async def assert_exact(self) -> None:
        await asyncio.gather(*self.tasks)
        assert self.got == [undisturbed(index) for index in range(STREAMS)]
        assert all(engine.kv.is_empty for engine in self.engines)


async def _at_once(_duration_s: float) -> None:
    await asyncio.sleep(0)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    await rig.supervisor.start()
    yield rig
    await rig.supervisor.close()


async def test_each_request_takes_its_kv_cache_along(rig: Rig) -> None:
    await rig.begin()
    with capture_logs() as logs:
        message = await rig.hand_over()
    assert message.startswith(f"{DONE}8 of 8 requests taken over: 8 KV copied (")
    assert rig.engines[1].kv.loaded_tokens_total > STREAMS * 5
    assert {log["route"] for log in logs} == {"copy"}
    await rig.assert_exact()


async def test_a_wrong_copy_is_seen(rig: Rig) -> None:
    """The control: if the streams were right with it, the test above would show nothing."""
    await rig.begin()
    rig.engines[0].kv.garbles = True
    await rig.hand_over()
    await asyncio.gather(*rig.tasks)
    assert all(tokens != undisturbed(index) for index, tokens in enumerate(rig.got))


@pytest.mark.parametrize(
    ("knob", "at", "reason"),
    [
        ("export_failure", 0, "its KV cache could not be copied: no room"),
        ("accept_failure", 1, "its KV cache could not be loaded: no room"),
    ],
)
async def test_what_cannot_be_copied_is_computed_again(rig: Rig, knob: str, at: int, reason: str) -> None:
    await rig.begin()

    def turn(message: str) -> None:
        if message == "0 of 8 requests taken over":
            setattr(rig.engines[at].kv, knob, "no room")

    with capture_logs() as logs:
        message = await rig.hand_over(at=turn)
    assert message.endswith("computed again")
    assert logs[-1]["route"] == "recompute"
    assert logs[-1]["reason"] == reason
    await rig.assert_exact()


async def test_the_first_request_is_copied_and_the_second_computed_again(rig: Rig) -> None:
    await rig.begin()
    with capture_logs() as logs:
        await rig.hand_over(KvPreference.AUTO)
    assert [log["route"] for log in logs][:2] == ["copy", "recompute"]
    assert "takes" in logs[-1]["reason"]
    await rig.assert_exact()


@pytest.mark.parametrize("victim", [0, 1], ids=["first", "second"])
async def test_one_of_both_dies_while_kv_caches_are_carried(rig: Rig, victim: int) -> None:
    await rig.begin()

    def kill(message: str) -> None:
        if message == "3 of 8 requests taken over":
            rig.engines[victim].kill("killed")

    message = await rig.hand_over(at=kill)
    assert f"{DONE}8 of 8 requests taken over: " in message
    await rig.assert_exact()


async def test_hang_ups_leave_no_kv_cache_behind(rig: Rig) -> None:
    await rig.begin()

    def hang_up(message: str) -> None:
        if message.endswith("requests taken over") and message[0] in "135":
            rig.tasks[int(message[0])].cancel()

    await rig.hand_over(at=hang_up)
    await asyncio.wait(rig.tasks)
    assert all(engine.kv.is_empty for engine in rig.engines)
    assert len(rig.supervisor.flights) == 0


async def test_instances_whose_kv_caches_differ_compute_again(rig: Rig) -> None:
    rig.capabilities.append(replace(KV, kv_form="another"))
    await rig.begin()
    with capture_logs() as logs:
        message = await rig.hand_over()
    assert message.endswith("8 of 8 requests taken over: 8 computed again")
    assert logs[0]["reason"] == "the KV caches differ: a fake prompt here, another there"
    await rig.assert_exact()


async def test_the_next_one_is_carried_before_its_turn_and_let_go_if_that_never_comes(rig: Rig) -> None:
    await rig.begin()
    first, second = rig.engines[0], FakeEngine(pipeline=even_pipeline(4), capabilities=KV)
    await second.start(on_progress=lambda _message: None)
    one, other, another, *_ = rig.supervisor.flights.at(first)
    ahead = KvAhead(KvCarrier(preference=KvPreference.COPY))
    ahead.begin(one, first=first, second=second)
    await until(lambda: not second.kv.is_empty)
    carried = await ahead.carry(one, first=first, second=second)
    assert carried.parcel is not None
    ahead.drop(carried, first=first, second=second)
    ahead.begin(other, first=first, second=second)
    carried = await ahead.carry(another, first=first, second=second)  # the other one has ended, say
    ahead.drop(carried, first=first, second=second)
    ahead.begin(other, first=first, second=second)
    await ahead.settle()
    assert first.kv.is_empty
    assert second.kv.is_empty
    await second.close()


def test_the_way_of_the_next_one_is_known_once_both_were_measured() -> None:
    carrier = KvCarrier(preference=KvPreference.AUTO)
    parcel = KvParcel(directory=Path("/dev/shm/x"), num_tokens=8, num_bytes=64)
    assert not carrier.can_look_ahead
    carrier.measured(Carried(reason="", num_tokens=8, parcel=parcel, took_s=0.1), waited_s=0.1)
    assert not carrier.can_look_ahead
    carrier.measured(Carried(reason="", num_tokens=8), waited_s=0.1)
    assert carrier.can_look_ahead


def test_why_no_kv_cache_is_copied() -> None:
    why: EngineCapabilities = replace(FAKE_CAPABILITIES, kv_refusal="no KV cache is copied with a draft model")
    assert copy_refusal(KV, KV) == ""
    assert copy_refusal(FAKE_CAPABILITIES, KV) == "the fake engine does not hand its KV cache over"
    assert copy_refusal(KV, why) == "no KV cache is copied with a draft model"
