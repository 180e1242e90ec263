"""``flexctl simulate`` as a process: figures, JSON, the report, and what cannot be simulated."""

import asyncio
import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

import pytest

from flexpiped.simulation.report import Line, chart
from tests.bench.openb import data_folder
from tests.unit.flexctl.test_command_line import ROOT, Ran, flexctl

pytestmark = pytest.mark.real_loop
SHORT = ("--rate", "4", "--duration", "60", "--prompt", "200", "--output", "40")
CLUSTER = data_folder()
DEMO = ROOT / "etc" / "demo-model"


async def simulate(*arguments: str) -> Ran:
    return await flexctl("simulate", *arguments)


async def test_figures_and_report(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    plain, as_json = await asyncio.gather(
        simulate(*SHORT, "--html", str(page)), simulate(*SHORT, "--json", "--system", "static", "--replicas", "2")
    )

    assert plain.code == 0, plain.err
    assert "devices reserved" in plain.out
    text = page.read_text()
    assert text.count("<svg") == 6
    assert re.findall(r"<h2>([^<]+) <small>", text) == CHARTS
    assert all(f"aria-label='{name}'" in text for name in CHARTS)
    for curve in (
        "4 stages",
        "rate",
        "CV",
        "without first token",
        "running",
        "first token",
        "whole request",
        "devices",
    ):
        assert f">{curve}</tspan>" in text
    assert "http" not in text  # no outside resource
    assert "<script" not in text
    found = json.loads(as_json.out)
    assert (as_json.code, found["figures"]["failed"]) == (0, 0)
    assert found["samples"][0]["replicas"] == {"4": 2}


async def test_a_seed_gives_the_same_again() -> None:
    first, again = await asyncio.gather(*(simulate(*SHORT, "--json", "--cv", "3") for _ in range(2)))

    assert first.code == 0
    assert [json.loads(each.out)["samples"] for each in (first,)] == [json.loads(again.out)["samples"]]


AZURE_HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens"
CHARTS = ["granularity", "arrivals", "CV of arrivals", "queue", "latency", "reserved devices"]


def write_traces(folder: Path) -> tuple[Path, Path]:
    """Write the same 40 requests in 20 s in both formats, Azure's first."""
    azure, mooncake = folder / "azure.csv", folder / "mooncake.jsonl"
    requests = [(index * 0.5, 100 + 10 * index, 10 + index) for index in range(40)]
    lines = [f"2023-11-16 18:17:{at_s:010.7f},{prompt},{output}" for at_s, prompt, output in requests]
    azure.write_text("\n".join([AZURE_HEAD, *lines]))
    wire = ({"timestamp": 1e3 * at_s, "input_length": n, "output_length": m} for at_s, n, m in requests)
    mooncake.write_text("".join(json.dumps(each) + "\n" for each in wire))
    return azure, mooncake


async def test_a_trace_is_simulated_in_either_format(tmp_path: Path) -> None:
    azure, mooncake = write_traces(tmp_path)
    first, second, shortened = await asyncio.gather(
        simulate("--trace", str(azure), "--json"),
        simulate("--trace", str(mooncake), "--json"),
        simulate("--trace", str(azure), "--json", "--duration", "5", "--speed", "2", "--max-output", "12"),
    )

    found = [json.loads(each.out) for each in (first, second, shortened)]
    assert [(each.code, each.err) for each in (first, second, shortened)] == [(0, "")] * 3
    assert [each["figures"]["requests"] for each in found] == [40, 40, 20]
    assert found[0]["samples"] == found[1]["samples"]
    assert found[0]["figures"]["failed"] == 0
    assert found[2]["simulated_s"] < found[0]["simulated_s"]


def on_terminal(*arguments: str) -> str:
    """Return all that flexctl writes to a terminal, control sequences included."""
    ours, its = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "flexpiped.flexctl", "simulate", *arguments],
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm", "PYTHONWARNINGS": "error"},
        stdin=subprocess.DEVNULL,
        stdout=its,
        stderr=subprocess.STDOUT,
    )
    os.close(its)
    seen = b""
    with suppress(OSError):  # Linux says so when the last one has closed the other end
        while piece := os.read(ours, 65536):
            seen += piece
    os.close(ours)
    assert process.wait(timeout=60) == 0, seen
    return seen.decode()


def test_on_a_terminal_a_bar_says_how_far_it_is_and_gives_way_to_the_figures() -> None:
    shown = on_terminal(*SHORT)

    assert re.search(r"simulating  [#.]{20}  \d+ s of 59 s   \d+ s", shown), shown
    assert "\r\x1b[K" in shown
    assert shown.index("simulating  ") < shown.index("devices reserved")
    assert "simulating" not in shown[shown.rindex("\r\x1b[K") :]


async def test_a_pipe_gets_no_bar() -> None:
    assert "simulating" not in (await simulate(*SHORT)).out


async def test_the_policy_goes_by_the_configuration(tmp_path: Path) -> None:
    config = tmp_path / "flexpiped.toml"
    config.write_text("[auto]\nmin_replicas = 2\nmax_replicas = 3\ninterval_s = 10.0\nwindows_s = [20.0]\n")
    model = ("--model", str(DEMO), "--topology", "8xl40s-pcie", "--json", *SHORT)
    by_default, configured, fewer, bad = await asyncio.gather(
        simulate(*model),
        simulate(*model, "--config", str(config)),
        simulate(*model, "--config", str(config), "--replicas", "1"),
        simulate(*model, "--config", str(tmp_path / "none.toml")),
    )

    found = [json.loads(each.out) for each in (by_default, configured, fewer)]
    assert [(each.code, each.err) for each in (by_default, configured, fewer)] == [(0, "")] * 3
    assert [sum(each["samples"][0]["replicas"].values()) for each in found] == [1, 2, 1]
    assert [each["samples"][0]["at_s"] for each in found] == [5.0, 10.0, 10.0]
    assert (bad.code, "none.toml: cannot be read" in bad.out) == (2, True)


async def test_a_model_on_a_topology() -> None:
    ran = await simulate(*SHORT, "--model", str(DEMO), "--topology", "8xl40s-pcie", "--json")

    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["figures"]["failed"] == 0


@pytest.mark.skipif(CLUSTER is None, reason="FLEXPIPED_CLUSTER_DATA names no folder with the openb trace")
async def test_neighbours_of_the_openb_cluster() -> None:
    ran = await simulate(*SHORT, "--cluster", str(CLUSTER), "--json")

    assert ran.code == 0, ran.err
    assert "neighbours hold" in json.loads(ran.out)["scenario"]["devices"]


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (("--stages", "5", "--system", "static"), 2, "5 is not among the granularities"),
        (("--occupancy", "1"), 2, "--occupancy"),
        (("--cluster", "/no/such/folder"), 2, "No such file"),
        (("--topology", "no-such-machine"), 2, "no-such-machine"),
        (("--system", "magic"), 2, "invalid choice"),
        (("--cluster", "/some", "--topology", "dgx-h100"), 2, "--cluster counts for nothing with --topology"),
        (("--devices", "4", "--model", "/some"), 2, "--devices counts for nothing with --model"),
        (("--hosts", "4", "--cluster", "/some"), 2, "--hosts counts for nothing with --cluster"),
        (("--occupancy", "0", "--config", "/some"), 2, "--occupancy counts for nothing with --config"),
        (("--stages", "8"), 2, "--stages counts for nothing with --system flexpiped"),
        (("--replicas", "2", "--system", "oracle"), 2, "--replicas counts for nothing with --system oracle"),
        (("--devices", "3"), 4, "no replica fits on 3 devices with"),
        (("--occupancy", "0.9999"), 4, "one needs 4 devices with"),
        (("--cv", "1e200"), 2, "a CV of 1e+200 cannot be drawn"),
        (("--html", "/no/such/folder/report.html", *SHORT), 1, "No such file"),
    ],
)
async def test_what_cannot_be_simulated(arguments: tuple[str, ...], code: int, reason: str) -> None:
    ran = await simulate(*arguments)

    assert (ran.code, reason in ran.err) == (code, True), ran.err
    assert "Traceback" not in ran.err


def test_a_chart_is_well_formed_and_keeps_peaks() -> None:
    points = [(float(at_s), None if at_s == 3 else float(at_s == 1777)) for at_s in range(5000)]
    drawn = chart("CV <of> arrivals", "", [Line(name="a & b", points=points, steps=True)])

    svg = ElementTree.fromstring(f"<body>{drawn}</body>")
    [path] = svg.iter("path")
    assert " 0.0" in path.attrib["d"]
    assert len(path.attrib["d"]) < 40_000
