"""The real ``flexctl plan`` as a process: with a daemon, and from files alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.admin import admin_stand
from tests.support.lone_flexctl import alone
from tests.support.published_models import LLAMA_3_70B
from tests.unit.flexctl.test_command_line import flexctl

pytestmark = pytest.mark.real_loop

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with nothing but the config.json of Llama-3-70B."""
    folder = tmp_path_factory.mktemp("Llama-3-70B")
    (folder / "config.json").write_text(json.dumps(LLAMA_3_70B.config), encoding="utf-8")
    return folder


async def test_a_daemon_is_asked_and_its_no_is_an_exit_code(tmp_path: Path) -> None:
    async with admin_stand(tmp_path) as stand:
        plain = await flexctl("plan", "--socket", str(stand.socket))
        as_json = await flexctl("plan", "--stages", "3", "--json", "--socket", str(stand.socket))

    assert plain.code == as_json.code == 4
    assert plain.out.splitlines()[0].startswith("infeasible: needs 141 GiB")
    assert json.loads(as_json.out)["state"] == "infeasible"


def test_no_daemon_and_no_files_is_said(tmp_path: Path) -> None:
    ran = alone(tmp_path, "plan")
    assert ran.returncode == 3
    assert "no daemon at" in ran.stderr


def test_the_demo_model_is_planned_on_this_host_without_a_daemon(tmp_path: Path) -> None:
    (tmp_path / "workload.toml").write_text("rate_per_s = 2.0\n[slo]\nttft_s = 1.0\n", encoding="utf-8")
    ran = alone(tmp_path, "plan", "--workload", str(tmp_path / "workload.toml"), "--explain")
    assert (ran.returncode, ran.stderr) == (0, "")
    lines = ran.stdout.splitlines()
    assert lines[0].startswith("chosen  1 stage on cpu:0 (optimal, ")
    assert any(line.startswith("workload  2 requests/s, CV 1, 256 tokens in, 128 out; targets: TTFT") for line in lines)
    assert "roofline estimate" in ran.stdout
    assert max(map(len, lines)) <= 80


def test_a_large_model_is_planned_on_a_machine_that_is_not_here(tmp_path: Path, llama: Path) -> None:
    ran = alone(tmp_path, "plan", "--topology", "dgx-h100", "--model", str(llama), "--engine", "vllm", "--json")
    assert ran.stderr == ""
    answer: dict[str, Any] = json.loads(ran.stdout)
    assert answer["state"] == "planned"
    chosen = next(each for each in answer["candidates"] if each["verdict"] == "chosen")
    needed = sum(each["weight_bytes"] * len(each["device_ids"]) for each in chosen["found"]["memory"])
    assert needed == pytest.approx(2 * LLAMA_3_70B.parameters, rel=0.001)
    assert all(each["needed_bytes"] <= each["usable_bytes"] for each in chosen["found"]["memory"])
    assert {each["degree"] for each in answer["candidates"]} == {1, 2, 4, 8}


def test_what_does_not_fit_says_how_much_is_missing(tmp_path: Path, llama: Path) -> None:
    ran = alone(tmp_path, "plan", "--topology", "2xa10-workstation", "--model", str(llama))
    assert ran.returncode == 4
    assert ran.stdout.startswith("infeasible: ")
    assert "GiB" in ran.stdout.splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--topology", "no-such-machine"), 2, "no-such-machine"),
        (("--model", "/no/such/model"), 4, "no such directory"),
        (("--workload", "/no/such/file"), 2, "flexctl: /no/such/file: No such file or directory\n"),
        (("--stages", "99", "--config", "etc/flexpiped.toml"), 4, "at most 8 stages"),
        (("--replicas", "0", "--config", "etc/flexpiped.toml"), 2, "--replicas: at least 1"),
        (("--config", "README.md"), 2, "README.md"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    ran = alone(tmp_path, "plan", *arguments)
    assert (ran.returncode, ran.stdout) == (code, "")
    assert said in ran.stderr
