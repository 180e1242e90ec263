"""Which engines of before a daemon goes on with, and what it does with the others."""

import asyncio
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from engines.errors import UnsupportedByEngine
from engines.found_process import boot_id, start_of
from engines.outliving import Outliving
from engines.records import EngineRecord, write_record
from flexpiped.settings import EngineKind, EnginesSettings, Settings
from flexpiped.survivors import Survivors, chosen, found_in_words, refuse_what_cannot_survive
from planner.layout import Pipeline, pipeline_of
from tests.unit.engines.test_records import PURPOSE, RECORD

SURVIVING = replace(Settings(), engines=EnginesSettings(survive_restart=True))


def on(*devices: str) -> Pipeline:
    return pipeline_of(device_ids=devices, cuts=tuple(range(1, len(devices))), num_decoders=8)


def test_each_replica_gets_the_engine_that_has_its_pipeline() -> None:
    one, two = on("cpu:0", "cpu:1"), on("cpu:2")
    assert chosen([two, one], [one, two]) == (one, two)


def test_one_whose_change_was_broken_off_stays_as_it_is() -> None:
    before, asked = on("cpu:0", "cpu:1"), on("cpu:0", "cpu:1", "cpu:2", "cpu:3")
    assert chosen([before], [asked]) == (before,)
    assert found_in_words([before], [asked]) == (
        "went on with the engines of before: 2 stages; a change to 4 stages was broken off by the daemon's end"
    )


def test_of_a_replica_handover_that_was_broken_off_the_second_instance_stays_if_it_served() -> None:
    first, second = on("cpu:0", "cpu:1"), on("cpu:4")
    assert chosen([first, second], [second]) == (second,)


def test_a_replica_without_an_engine_gets_a_new_one_where_its_devices_are_free() -> None:
    one, two, taken = on("cpu:0"), on("cpu:1"), on("cpu:0", "cpu:3")
    assert chosen([two], [one, two]) == (two, one)
    assert chosen([one], [one, taken]) == (one,)


def test_engines_that_cannot_outlive_the_daemon_are_refused_by_name() -> None:
    refuse_what_cannot_survive(SURVIVING)
    refuse_what_cannot_survive(replace(Settings(), engine=EngineKind.FAKE))
    for kind in (EngineKind.VLLM, EngineKind.SGLANG):
        refuse_what_cannot_survive(replace(SURVIVING, engine=kind))
    with pytest.raises(UnsupportedByEngine, match="survive_restart is not for engine 'fake'"):
        refuse_what_cannot_survive(replace(SURVIVING, engine=EngineKind.FAKE))


class Place:
    """Where survivors are looked for, with what was told of them."""

    def __init__(self, folder: Path) -> None:
        self.news: list[str] = []
        self.survivors = Survivors(
            SURVIVING,
            name="m",
            may_stay=lambda: True,
            served=lambda: frozenset(("m", "n")),
            admin_socket=folder / "admin.sock",
            state_folder=folder / "state",
            environment={},
            on_news=self.news.append,
        )

    def note(self, record: EngineRecord) -> Path:
        outliving = self.survivors.outliving_of(PURPOSE, on("cpu:0"))
        assert isinstance(outliving, Outliving)
        write_record(outliving.record, replace(record, socket=str(outliving.place.socket)))
        return outliving.record


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


async def sleeper() -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(sys.executable, "-c", "import time; time.sleep(600)")


@pytest.mark.real_loop
async def test_a_process_that_is_not_provably_its_own_is_left_alone(place: Place) -> None:
    process = await sleeper()
    file = place.note(replace(RECORD, pid=process.pid, start="1", boot=boot_id()))
    with capture_logs() as logs:
        assert await place.survivors.find(PURPOSE) == ()
    reason = f"process {process.pid} is another one by now"
    assert logs == [{"event": "engine not adopted", "pid": process.pid, "reason": reason, "log_level": "warning"}]
    assert place.news == [f"an engine of before was not adopted: {reason}"]
    assert (process.returncode, file.exists()) == (None, False)
    process.kill()
    await process.wait()


@pytest.mark.real_loop
@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        (replace(PURPOSE, options="other"), "it was started with other options"),
        (None, "the configuration asks for none that outlives the daemon (engines.survive_restart)"),
        (PURPOSE, "No such file or directory"),  # nobody listens at its socket
    ],
)
async def test_one_of_its_own_that_is_not_wanted_or_does_not_answer_is_ended(
    place: Place, wanted: object, reason: str
) -> None:
    process = await sleeper()
    file = place.note(replace(RECORD, pid=process.pid, start=start_of(process.pid), boot=boot_id()))
    assert await place.survivors.find(wanted) == ()  # type: ignore[arg-type]
    assert await process.wait() != 0
    [news] = place.news
    assert reason in news
    assert news.endswith(f"process {process.pid} was ended")
    assert not file.exists()


@pytest.mark.real_loop
async def test_an_engine_of_another_model_that_is_served_is_for_that_one(place: Place) -> None:
    mine = os.getpid()
    file = place.note(replace(RECORD, name="n", pid=mine, start=start_of(mine), boot=boot_id()))
    assert await place.survivors.find(PURPOSE) == ()
    assert (place.news, file.exists()) == ([], True)


@pytest.mark.real_loop
async def test_an_engine_of_a_model_that_is_not_served_any_more_is_ended(place: Place) -> None:
    process = await sleeper()
    place.note(replace(RECORD, name="gone", pid=process.pid, start=start_of(process.pid), boot=boot_id()))
    await place.survivors.find(PURPOSE)
    assert place.news == [
        f"an engine of before was not adopted: gone is not served any more; process {process.pid} was ended"
    ]
    await process.wait()
