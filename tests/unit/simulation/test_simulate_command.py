"""``flexctl simulate`` as a process: figures, JSON, the report, and what cannot be simulated."""

import asyncio
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from flexpiped.simulation.report import Line, chart
from tests.bench.openb import data_folder
from tests.unit.flexctl.test_command_line import Ran, flexctl

pytestmark = pytest.mark.real_loop
SHORT = ("--rate", "4", "--duration", "60", "--prompt", "200", "--output", "40")
CLUSTER = data_folder()


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
    assert "http" not in text  # no outside resource
    assert "<script" not in text
    found = json.loads(as_json.out)
    assert (as_json.code, found["figures"]["failed"]) == (0, 0)
    assert found["samples"][0]["replicas"] == {"4": 2}


async def test_a_seed_gives_the_same_again() -> None:
    first, again = await asyncio.gather(*(simulate(*SHORT, "--json", "--cv", "3") for _ in range(2)))

    assert first.code == 0
    assert [json.loads(each.out)["samples"] for each in (first,)] == [json.loads(again.out)["samples"]]


async def test_a_model_on_a_topology() -> None:
    model = Path(__file__).parents[3] / "etc" / "demo-model"
    ran = await simulate(*SHORT, "--model", str(model), "--topology", "8xl40s-pcie", "--json")

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
        (("--stages", "5"), 2, "5 is not among the granularities"),
        (("--occupancy", "1"), 2, "--occupancy"),
        (("--cluster", "/no/such/folder"), 2, "No such file"),
        (("--topology", "no-such-machine"), 2, "no-such-machine"),
        (("--system", "magic"), 2, "invalid choice"),
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
