"""The README names every metric that there is, with its labels and what values those have; and no other one."""

from typing import NoReturn

from engines.parameters.keeper import ParameterKeeper
from flexpiped.admission import Admission, AdmissionLimits
from flexpiped.api.backends import Backends
from flexpiped.api.exposition import exposition, labelled
from flexpiped.api.metrics import Endpoint, Levels, Metrics, daemon_families, model_states
from flexpiped.api.outcomes import Outcome
from flexpiped.handover_records import HandoverResult
from flexpiped.ingress.fleet import Fleet
from flexpiped.loop_lag import LoopLag
from flexpiped.status import Health, ServiceState
from planner.handover import HandoverPhase
from planner.policy_state import Verb
from tests.support.metrics import (
    COUNTERS,
    STAGE,
    documented_metrics,
    documented_values,
    shown_metrics,
    shown_of_models,
    shown_values,
    undocumented,
)
from topology.device import cpu_devices


def of_a_model() -> Metrics:
    """Return metrics with every value of every label."""
    metrics = Metrics()
    for endpoint in Endpoint:
        for outcome in Outcome:
            with metrics.observe(endpoint) as observation:
                observation.outcome = outcome
    for result in HandoverResult:
        phases = {phase.value: 0.1 for phase in HandoverPhase}
        metrics.handover_ended({"result": result.value, "duration_s": 0.2, "phases_s": phases, "progress": None})
    for verb in Verb:
        metrics.decided(verb.value)
    return metrics


def ingresses() -> Fleet:
    """Return two ingress processes that nobody starts."""
    backends = Backends(
        models=dict,
        are_named=lambda: True,
        health=lambda: Health(state=ServiceState.READY),
        admission=Admission(limits=AdmissionLimits()),
    )
    return Fleet(2, backends=backends, welcome=never, now=never, on_news=never, on_given_up=never)


def never(*_: object) -> NoReturn:
    raise AssertionError("this fleet is not started")


def everything(*, models: tuple[str, ...] = ("chat", "code")) -> str:
    """Return what a daemon with these models and two ingress processes tells, put together as ``GET /metrics`` does."""
    parts = [labelled(of_a_model().families(COUNTERS, stages=[STAGE]), name) for name in models]
    if len(models) > 1:
        parts += [Metrics().families(None), model_states(dict.fromkeys(models, ServiceState.READY))]
    of_daemon = daemon_families(
        Levels(state=ServiceState.READY, requests_queued=2, tokens_in_flight=40),
        devices=cpu_devices(count=2, memory_bytes=1 << 20),
        parameters=ParameterKeeper(1 << 20).figures,
        processes=[*LoopLag().families(), *ingresses().families()],
    )
    return exposition(*parts, of_daemon).decode()


def test_the_readme_names_every_metric_with_its_labels_and_no_other_one() -> None:
    documented = documented_metrics()

    assert shown_metrics(everything()) == {name: labels - {"model"} for name, labels in documented.items()}
    assert shown_of_models(everything()) == {*documented_metrics(of_models=True), "flexpiped_model_state"}
    assert documented["flexpiped_model_state"] == {"model", "state"}


def test_one_model_alone_has_the_same_without_the_label() -> None:
    alone = everything(models=("",))

    assert shown_metrics(alone).keys() == documented_metrics().keys() - {"flexpiped_model_state"}
    assert shown_of_models(alone) == set()
    assert undocumented(alone) == []


def test_labels_have_the_values_that_the_readme_lists() -> None:
    shown, listed = shown_values(everything()), documented_values()

    assert listed == {name: shown[name] for name in ("endpoint", "outcome", "state", "result", "phase", "verb")}
    assert shown.keys() - listed.keys() == {"le", "model", "device", "stage", "ingress"}


def test_what_is_not_documented_is_found() -> None:
    text = 'flexpiped_steps 1\nflexpiped_state{state="lost"} 1\nflexpiped_requests_in_flight{key="alice"} 1\n'

    assert undocumented(text) == ["flexpiped_steps[]", "flexpiped_requests_in_flight['key']", "state lost"]
