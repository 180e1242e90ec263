"""Which replicas come back after a restart: those that still can be, and of the others why not."""

from dataclasses import replace

import pytest

from flexpiped.engine_factory import find_files
from flexpiped.engine_offers import EngineOffers
from flexpiped.intent import FRUITLESS_STARTS, Intent, basis_of
from flexpiped.journal import Stored
from flexpiped.models import model_source
from flexpiped.restore import Beginning, restored
from flexpiped.settings import Settings
from planner.layout import Pipeline, pipeline_of
from tests.support.layouts import even_pipeline

SETTINGS = Settings()
BASIS = basis_of(SETTINGS)
MAIN = even_pipeline(2)
SECOND = pipeline_of(device_ids=["cpu:2"], cuts=[], num_decoders=8)


@pytest.fixture(scope="module")
def offers() -> EngineOffers:
    source = model_source(SETTINGS)
    return EngineOffers(SETTINGS, source=source, model=find_files(SETTINGS, source=source))


def beginning(offers: EngineOffers, *pipelines: Pipeline, fruitless_starts: int = 0) -> tuple[Beginning | None, str]:
    intent = Intent(engine="native", pipelines=pipelines, basis=BASIS, reason="asked for", since_unix_s=1.0)
    stored = Stored(intent=intent, fruitless_starts=fruitless_starts)
    return restored(stored, offers, basis=BASIS, num_decoders=8)


def test_all_replicas_come_back(offers: EngineOffers) -> None:
    third = replace(SECOND, stages=(replace(SECOND.stages[0], device_ids=("cpu:3",)),))
    found, _ = beginning(offers, MAIN, SECOND, third)
    assert found is not None
    assert (found.pipeline, found.further, found.left_out) == (MAIN, (SECOND, third), ())


def test_one_that_cannot_be_is_left_out_with_its_reason(offers: EngineOffers) -> None:
    elsewhere = pipeline_of(device_ids=["cpu:77"], cuts=[], num_decoders=8)
    shorter = pipeline_of(device_ids=["cpu:4"], cuts=[], num_decoders=6)
    found, _ = beginning(offers, MAIN, even_pipeline(1), elsewhere, shorter, SECOND)
    assert found is not None
    assert found.further == (SECOND,)
    held, unknown, other_model = found.left_out
    assert held == "replica on cpu:0: cpu:0 taken by another replica"
    assert unknown.startswith("replica on cpu:77: ")
    assert other_model == "replica on cpu:4: it is for 6 decoder layers, and the model has 8"


def test_without_the_main_one_the_configuration_decides(offers: EngineOffers) -> None:
    found, against = beginning(offers, pipeline_of(device_ids=["cpu:0"], cuts=[], num_decoders=6), SECOND)
    assert (found, against) == (None, "it is for 6 decoder layers, and the model has 8")
    found, against = beginning(offers, MAIN, SECOND, fruitless_starts=FRUITLESS_STARTS)
    assert (found, against) == (None, "3 starts with it in a row did not get ready")
