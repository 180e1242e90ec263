"""The way of a new operator through a booted machine, by the README alone: each command of it stands there.

``FLEXPIPED_SCREENSHOTS=FOLDER`` keeps what the browser showed.
"""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packaging.test_service import CONFIG, ROOT, START_DEADLINE_S, events, package, pytestmark, shown
from tests.support.browser import browser_page
from tests.support.into_machine import port_of
from tests.support.machine import ENGINE_PYTHON, Machine, machine_in, until

__all__ = ["package", "pytestmark"]
README = re.sub(
    r"\s+", " ", (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Running it as a service\n")[2]
)
# What clients of the README do, for 200 tokens; it prints the text as it comes.
CLIENT = """
import openai
client = openai.OpenAI(base_url="http://127.0.0.1:8100/v1", api_key="none")
asked = {"model": "demo-model", "prompt": "Once", "max_tokens": 200, "seed": 7}
for chunk in client.completions.create(**asked, stream=True, extra_body={"ignore_eos": True}):
    print(chunk.choices[0].text, end="", flush=True)
"""
LATER = "max_model_len = 512  # waits for a restart\n"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, package: Path) -> Iterator[Machine]:
    """A machine as an operator has it: the package lies in dist/, and an environment with torch is there."""
    folder = tmp_path_factory.mktemp("machine")
    with machine_in(folder, bind=[f"--bind-ro={package.parent}:/root/dist"]) as machine:
        machine.boot()
        machine.write("/etc/apt/apt.conf.d/yes", 'APT::Get::Assume-Yes "true";\n')  # the operator's answers
        yield machine


def told(machine: Machine, command: str, *, code: int = 0, user: str = "root") -> str:
    """Run a command of the README in a login shell; return all that it says."""
    assert f"`{command}" in README or command.startswith("flexctl "), f"not in the README: {command}"
    words = command if user == "root" else f"su - {user} -c '{command}'"
    ran = machine.run("bash", "-lc", f"cd /root; {words}")
    assert ran.returncode == code, f"{command}: {ran.returncode}: {ran.stdout}{ran.stderr}"
    return ran.stdout + ran.stderr


def edit(machine: Machine, before: str, after: str) -> None:
    """Change the configuration as in an editor."""
    text = machine.do("cat", CONFIG)
    assert before in text
    machine.write(CONFIG, text.replace(before, after, 1))


def test_installed_it_is_configured_by_two_lines_and_serves(machine: Machine) -> None:
    told(machine, "apt install ./dist/flexpiped_*.deb")
    assert told(machine, "flexctl config check /etc/flexpiped/flexpiped.toml") == f"{CONFIG}: ok\n"
    edit(machine, "[engines.native]\n", f'[engines.native]\npython = "{ENGINE_PYTHON}"\n')
    assert told(machine, "flexctl config check /etc/flexpiped/flexpiped.toml") == f"{CONFIG}: ok\n"

    told(machine, "systemctl enable --now flexpiped")

    assert 'Status: "serving demo-model, ' in told(machine, "systemctl status flexpiped")
    assert "daemon ready" in told(machine, "journalctl -u flexpiped")
    assert "ready, up" in told(machine, "flexctl status")


def test_who_is_in_the_group_may_ask_it(machine: Machine) -> None:
    machine.do("useradd", "--create-home", "alice")
    refused = told(machine, "flexctl status", code=3, user="alice")
    assert "permission denied: only its owner and group may" in refused
    assert "usermod -aG flexpiped" in refused
    told(machine, "usermod -aG flexpiped alice")
    assert told(machine, "flexctl status", user="alice").startswith("demo-model   native")


def test_a_client_streams_while_layers_move(machine: Machine) -> None:
    alone = machine.do(ENGINE_PYTHON, "-c", CLIENT)
    with subprocess.Popen(machine.inside(ENGINE_PYTHON, "-c", CLIENT), stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        begun = client.stdout.read(20)
        assert "done in" in told(machine, "flexctl rebalance --stages 4 --wait")
        streamed = (begun + client.stdout.read()).decode()
    assert streamed == alone
    assert "handover" in told(machine, "flexctl status")
    assert "4 stages" in told(machine, "flexctl history")


def test_top_shows_it(machine: Machine) -> None:
    top = "TERM=xterm timeout --foreground -s INT -k 2 20 flexctl top"
    screen = machine.run("script", "--quiet", "--command", top, "/dev/null").stdout
    assert "demo-model" in screen
    assert "cpu:3" in screen


@pytest.mark.browser
@pytest.mark.real_loop
async def test_a_browser_shows_the_dashboard(machine: Machine, tmp_path: Path) -> None:
    assert "`http://127.0.0.1:8100/`" in README
    async with port_of(machine.leader, 8100) as url, browser_page(tmp_path) as page:
        await page.open(f"{url}/")
        await page.until("document.body.innerText.includes('demo-model')")
        await page.until("document.body.innerText.includes('cpu:3')")
        if folder := os.environ.get("FLEXPIPED_SCREENSHOTS"):
            await page.picture(Path(folder) / "walk.png", whole=True)
        assert page.problems == []


def test_it_is_tuned_and_reloaded(machine: Machine) -> None:
    edit(machine, "#max_requests_queued = 256\n", "max_requests_queued = 7\n")
    edit(machine, "\n[http]\n", f"\n{LATER}[http]\n")
    said = told(machine, "flexctl config diff")
    assert "admission.max_requests_queued  256 -> 7" in said
    assert "max_model_len" in said

    told(machine, "systemctl reload flexpiped")

    until(lambda: "configuration changed and applied" in events(machine), deadline_s=START_DEADLINE_S)
    assert "admission.max_requests_queued = 7" in told(machine, "flexctl config show")
    assert "max_model_len" in told(machine, "journalctl -u flexpiped")
    assert "max_model_len" in told(machine, "flexctl reload")


def test_a_wrong_file_makes_the_reload_fail_and_changes_nothing(machine: Machine) -> None:
    edit(machine, "max_requests_queued = 7\n", "max_requests_queud = 9\n")
    mistake = 'unknown key "admission.max_requests_queud"; did you mean "admission.max_requests_queued"?'
    assert mistake in told(machine, "flexctl config check /etc/flexpiped/flexpiped.toml", code=2)

    told(machine, "systemctl reload flexpiped", code=1)

    assert mistake in told(machine, "journalctl -u flexpiped")
    assert "admission.max_requests_queued = 7" in told(machine, "flexctl config show")
    assert shown(machine, "ActiveState") == "active"
    assert mistake in told(machine, "flexctl reload", code=4)
    assert mistake in told(machine, "flexctl config diff", code=2)


def test_it_is_removed_and_purged(machine: Machine) -> None:
    told(machine, "apt remove flexpiped")
    assert machine.run("test", "-e", CONFIG).returncode == 0
    told(machine, "apt purge flexpiped")
    assert machine.run("test", "-e", "/etc/flexpiped").returncode != 0
