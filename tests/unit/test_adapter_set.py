"""LoRA adapters come and go over all engines of a model, with the fake engine: also those that come later."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from engines.errors import AdapterRefused, EngineStartFailed, InvalidRequest, UnsupportedByEngine
from engines.fake import FAKE_CAPABILITIES, FakeEngine
from engines.protocol import EngineCapabilities
from flexpiped.adapter_set import AdapterSet, ServedAdapter
from flexpiped.flight import Flights
from flexpiped.replicas import Replicas
from flexpiped.supervision import Supervision
from flexpiped.supervisor import EngineFactory, Supervisor
from planner.layout import Pipeline
from tests.support.until import until
from tests.unit.test_replicas import Stand
from tests.unit.test_supervisor import ONE, REQUEST, TWO, undisturbed

CONFIGURED = replace(FAKE_CAPABILITIES, adapters=("sql",))
WITH_DE = replace(REQUEST, sampling=replace(REQUEST.sampling, adapter="de"))


class AdaptedStand(Stand):
    """Replicas whose engines are brought into line with a set of adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.capabilities = CONFIGURED
        self.news: list[str] = []
        self.adapters = AdapterSet(
            replicas=lambda: self.replicas, is_taken=lambda name: name == "a-model", tell=self.news.append
        )
        self.replicas = Replicas(make=self.make, leaving=lambda: self.adapters.leaving)

    def engine_for(self, pipeline: Pipeline, epoch: int) -> FakeEngine:
        engine = FakeEngine(pipeline=pipeline, epoch=epoch, capabilities=self.capabilities)
        self.workshop.engines.append(engine)
        return engine

    def make(
        self,
        *,
        factory: EngineFactory,
        pipeline: Pipeline,
        flights: Flights,
        on_change: Callable[[Supervision], None],
        on_progress: Callable[[str], None],
    ) -> Supervisor:
        del factory, on_progress
        return Supervisor(
            factory=self.engine_for,
            on_change=on_change,
            pipeline=pipeline,
            policy=self.policy,
            sleep=self.workshop.sleep,
            flights=flights,
            bring_into_line=self.adapters.bring_into_line,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may name."""
        assert self.replicas.capabilities is not None
        return self.replicas.capabilities.adapters


@pytest.fixture
async def stand() -> AsyncIterator[AdaptedStand]:
    stand = AdaptedStand()
    await stand.add(ONE)
    yield stand
    await stand.adapters.close()
    await stand.replicas.close()


async def test_one_that_comes_is_there_in_every_engine_and_in_those_to_come(stand: AdaptedStand) -> None:
    await stand.add(TWO)
    await stand.adapters.load("de", "/srv/de")
    await stand.add(ONE)
    assert [engine.capabilities.adapters for engine in stand.workshop.engines] == [("sql", "de")] * 3
    assert stand.names == ("sql", "de")
    assert await stand.tokens(WITH_DE) == await undisturbed()
    assert stand.adapters.device_bytes == sum(engine.adapter_bytes for engine in stand.workshop.engines) > 0
    await stand.adapters.unload("de")
    assert stand.adapters.device_bytes == 0


async def test_the_engine_that_takes_a_dead_ones_place_has_what_was_changed(stand: AdaptedStand) -> None:
    await stand.adapters.load("de", "/srv/de")
    await stand.adapters.unload("sql")
    stand.engine(0).kill("killed by a test")
    await until(lambda: len(stand.replicas.engines) == 1 and len(stand.workshop.engines) == 2)
    assert stand.engine(1).capabilities.adapters == ("de",)
    assert stand.names == ("de",)


async def test_requests_under_way_finish_with_one_that_leaves_and_no_other_may_name_it(stand: AdaptedStand) -> None:
    await stand.adapters.load("de", "/srv/de")
    counts: list[int] = []
    stream = asyncio.create_task(stand.tokens(WITH_DE, then=counts.append))
    await until(lambda: bool(counts))
    stand.engine(0).hold()
    assert await stand.adapters.unload("de") == 1
    assert stand.names == ("sql",)
    assert stand.engine(0).adapters.announced == {"de"}
    leaving = ServedAdapter(name="de", directory="/srv/de", requests=1, is_leaving=True)
    assert stand.adapters.all() == (ServedAdapter(name="sql", directory="", requests=0, is_leaving=False), leaving)
    with pytest.raises(AdapterRefused, match="1 requests still go on with it"):
        await stand.adapters.load("de", "/srv/another")

    stand.engine(0).kill("killed by a test")  # the request under way goes on at the next one
    assert await stream == await undisturbed()
    assert stand.engine(1).adapters.announced == {"de"}
    await until(lambda: stand.engine(1).capabilities.adapters == ("sql",))
    with pytest.raises(InvalidRequest):
        await stand.tokens(WITH_DE)
    await stand.adapters.load("de", "/srv/another")
    assert stand.engine(1).adapter_directories["de"] == "/srv/another"


async def test_a_change_goes_on_when_who_asked_for_it_leaves(stand: AdaptedStand) -> None:
    """Else engines would have what no request can name and nobody can unload."""
    slow = SlowEngine(pipeline=ONE, capabilities=CONFIGURED)
    await slow.start(on_progress=lambda _message: None)
    await stand.adapters.bring_into_line(slow, must=True)
    for change, names in (
        (lambda: stand.adapters.load("de", "/srv/de"), ("sql", "de")),
        (lambda: stand.adapters.unload("de"), ("sql",)),
    ):
        slow.goes_on.clear()
        asked = asyncio.create_task(change())
        await slow.is_asked.wait()
        asked.cancel()
        await asyncio.wait([asked])
        assert asked.cancelled()
        slow.goes_on.set()
        await until(lambda names=names: slow.capabilities.adapters == names == stand.names)
        await until(lambda names=names: tuple(each.name for each in stand.adapters.all()) == names)
        slow.is_asked.clear()
    await slow.close()


class SlowEngine(FakeEngine):
    """Takes its time to load and to unload."""

    def __init__(self, *, pipeline: Pipeline, capabilities: EngineCapabilities) -> None:
        super().__init__(pipeline=pipeline, capabilities=capabilities)
        self.is_asked, self.goes_on = asyncio.Event(), asyncio.Event()

    async def load_adapter(self, name: str, directory: str) -> None:
        self.is_asked.set()
        await self.goes_on.wait()
        await super().load_adapter(name, directory)

    async def unload_adapter(self, name: str) -> None:
        self.is_asked.set()
        await self.goes_on.wait()
        await super().unload_adapter(name)


async def test_what_cannot_be_is_refused_and_changes_nothing(stand: AdaptedStand) -> None:
    await stand.add(TWO)
    for name, path, words in (
        ("sql", "/srv/sql", "loaded already"),
        ("a-model", "/srv/de", "the name of a model"),
        ("\x1b[31mde", "/srv/de", "cannot be shown"),
        ("de", "/srv/broken", "there is none"),
    ):
        with pytest.raises(AdapterRefused, match=words):
            await stand.adapters.load(name, path)
    with pytest.raises(AdapterRefused, match="not loaded"):
        await stand.adapters.unload("de")
    assert [engine.capabilities.adapters for engine in stand.workshop.engines] == [("sql",)] * 2


async def test_one_that_only_some_engines_can_read_is_in_none(stand: AdaptedStand) -> None:
    class Picky(FakeEngine):
        async def load_adapter(self, name: str, directory: str) -> None:
            raise AdapterRefused(f"{name} is not to be read in {directory} here")

    picky = Picky(pipeline=ONE, capabilities=CONFIGURED)
    await picky.start(on_progress=lambda _message: None)
    await stand.adapters.bring_into_line(picky, must=True)
    with pytest.raises(AdapterRefused, match="not to be read"):
        await stand.adapters.load("de", "/srv/de")
    assert stand.names == ("sql",)
    await picky.close()


async def test_one_that_cannot_be_read_again_keeps_a_replica_away_but_not_the_service(stand: AdaptedStand) -> None:
    await stand.adapters.load("de", "/srv/de")
    stand.adapters._known()["de"] = "/srv/broken"  # its files have gone
    with pytest.raises(EngineStartFailed, match="there is none"):
        await stand.add(TWO)
    stand.engine(0).kill("killed by a test")
    await until(lambda: len(stand.replicas.engines) == 1 and stand.replicas.engine is not stand.engine(0))
    assert stand.names == ("sql",)
    assert stand.news[-1] == "lost: adapter 'de' in /srv/broken: there is none"


async def test_an_engine_that_cannot_change_them_says_so() -> None:
    stand = AdaptedStand()
    stand.capabilities = replace(CONFIGURED, changes_adapters=False)
    await stand.add(ONE)
    with pytest.raises(UnsupportedByEngine, match="the fake engine does not change its adapters"):
        await stand.adapters.load("de", "/srv/de")
    await stand.replicas.close()
