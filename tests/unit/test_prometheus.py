"""Prometheus: promtool has nothing to say, alerts fire as they should, and nobody asks for a metric that is none."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from engines.parameters.keeper import ParameterKeeper
from flexpiped.admission import Admission, AdmissionLimits
from flexpiped.api.app import create_app
from flexpiped.api.backends import Backends
from flexpiped.api.metrics import Endpoint, Levels, Metrics
from flexpiped.api.outcomes import Outcome
from flexpiped.loop_lag import LoopLag
from flexpiped.servers import listen_tcp, serving, url_of
from flexpiped.status import Health, ServiceState
from tests.support.metrics import COUNTERS, STAGE
from topology.device import cpu_devices

ETC = Path(__file__).parents[2] / "etc"
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def exposition() -> str:
    metrics = Metrics()
    with metrics.observe(Endpoint.CHAT) as observation:
        observation.tokens(3)
        observation.outcome = Outcome.DONE
    for result in ("done", "aborted", "failed"):
        phases = {"prepare": 0.1, "roll back": 0.04}
        progress = {"commit_pause_s": 0.003}
        metrics.handover_ended({"result": result, "duration_s": 0.2, "phases_s": phases, "progress": progress})
    metrics.handover_ended({"result": "failed", "duration_s": 0.1, "phases_s": {}, "progress": None})
    metrics.decided("keep")
    metrics.planned(0.02)
    levels = Levels(state=ServiceState.READY, requests_queued=2, tokens_in_flight=40)
    devices = cpu_devices(count=2, memory_bytes=1 << 20)
    return metrics.render(
        COUNTERS,
        levels,
        stages=[STAGE, replace(STAGE, index=1, busy=None)],
        devices=devices,
        parameters=ParameterKeeper(1 << 20).figures,
        processes=LoopLag().families(),
    ).decode()


def promtool(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["promtool", *arguments], cwd=ETC / "prometheus", input=stdin, capture_output=True, text=True, check=False
    )


def version() -> str:
    """Return which promtool it is, as newer ones may find more."""
    return promtool("--version").stdout.partition("\n")[0]


def test_handovers_and_levels_are_shown() -> None:
    shown = exposition().splitlines()

    assert 'flexpiped_handovers_total{result="failed"} 2.0' in shown
    assert "flexpiped_handover_commit_pause_seconds_count 3.0" in shown
    assert 'flexpiped_handover_phase_seconds_count{phase="roll_back"} 3.0' in shown
    assert 'flexpiped_handover_phase_seconds_bucket{le="0.05",phase="prepare"} 0.0' in shown
    assert "flexpiped_requests_queued 2.0" in shown
    assert 'flexpiped_state{state="ready"} 1.0' in shown
    assert 'flexpiped_state{state="failed"} 0.0' in shown


def test_stages_devices_decisions_and_plans_are_shown() -> None:
    shown = exposition().splitlines()

    assert 'flexpiped_stage_busy_ratio{stage="0"} 0.5' in shown
    assert not any(line.startswith('flexpiped_stage_busy_ratio{stage="1"}') for line in shown)
    assert 'flexpiped_stage_weights_bytes{stage="1"} 1000.0' in shown
    assert 'flexpiped_stage_kv_mapped_bytes{stage="0"} 200.0' in shown
    assert 'flexpiped_stage_decoders{stage="0"} 3.0' in shown
    assert 'flexpiped_device_memory_bytes{device="cpu:1"} 1.048576e+06' in shown
    assert 'flexpiped_device_memory_usable_bytes{device="cpu:1"} 1.048576e+06' in shown
    assert 'flexpiped_decisions_total{verb="keep"} 1.0' in shown
    assert "flexpiped_planner_duration_seconds_count 1.0" in shown


@needs_promtool
def test_promtool_has_nothing_to_say_about_the_metrics() -> None:
    ran = promtool("check", "metrics", stdin=exposition())

    assert (ran.returncode, ran.stderr) == (0, ""), version()


@needs_promtool
def test_alerts_fire_when_they_should() -> None:
    checked, tested = (
        promtool("check", "rules", "flexpiped.rules.yml"),
        promtool("test", "rules", "flexpiped.rules.test.yml"),
    )

    said = checked.stderr + tested.stdout + tested.stderr
    assert (checked.returncode, tested.returncode) == (0, 0), f"{version()}: {said}"


async def probed(state: ServiceState) -> int:
    """Return what ``/readyz`` answers in a state."""
    backends = Backends(
        models=dict,
        are_named=lambda: False,
        health=lambda: Health(state=state),
        admission=Admission(limits=AdmissionLimits()),
    )
    listener = listen_tcp("127.0.0.1", 0)
    async with (
        serving(create_app(backends), listener, shutdown_s=1.0),
        aiohttp.ClientSession(url_of(listener)) as session,
        session.get("/readyz") as answer,
    ):
        return answer.status


@pytest.mark.real_loop
async def test_the_alert_and_the_probe_agree_on_who_serves() -> None:
    rules = (ETC / "prometheus" / "flexpiped.rules.yml").read_text(encoding="utf-8")
    [states] = re.findall(r'flexpiped_state\{state=~"([a-z|]+)"\}', rules)

    ready = {state.value for state in ServiceState if await probed(state) == 200}
    assert ready == set(states.split("|"))


@pytest.mark.parametrize("file", ["prometheus/flexpiped.rules.yml", "grafana/flexpiped.json"])
def test_only_metrics_that_exist_are_asked_for(file: str) -> None:
    text = (ETC / file).read_text(encoding="utf-8")
    if file.endswith(".json"):
        text = " ".join(target["expr"] for panel in json.loads(text)["panels"] for target in panel["targets"])
    asked = set(re.findall(r"\bflexpiped_\w+", text))

    assert asked
    assert asked <= {re.split(r"[{ ]", line)[0] for line in exposition().splitlines() if not line.startswith("#")}
