"""``make install`` in a machine that a real systemd has booted, set up as the README says; then ``make uninstall``."""

from collections.abc import Iterator

import pytest

from tests.packaging.test_install import ROOT, make_in
from tests.packaging.test_service import CONFIG, completion, pytestmark, shown
from tests.support.machine import ENGINE_PYTHON, Machine, machine_in

__all__ = ["pytestmark"]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("machine")
    with machine_in(folder, bind=[f"--bind-ro={ROOT}:/srv/source"]) as machine:
        make_in("install", folder / "root", prefix="/usr/local")
        machine.boot()
        yield machine


def ours(machine: Machine) -> list[str]:
    """Return what of ours is where ``make install`` puts things."""
    found = machine.do("find", "/usr", "/etc", "-xdev", "(", "-name", "*flexpiped*", "-o", "-name", "*flexctl*", ")")
    return [name for name in found.splitlines() if not name.startswith("/usr/local/lib/flexpiped/")]


def test_set_up_as_the_readme_says_it_serves(machine: Machine) -> None:
    machine.do("systemd-sysusers")
    machine.do("systemd-tmpfiles", "--create")
    machine.write(CONFIG, f'engine = "native"\nstages = 2\n[engines.native]\npython = "{ENGINE_PYTHON}"\n')
    assert machine.do("stat", "-c", "%a %U %G", CONFIG).split() == ["640", "root", "flexpiped"]

    machine.do("systemctl", "enable", "--now", "flexpiped")

    assert shown(machine, "StatusText") == "serving demo-model, 8 decoder layers in 2 stages"
    assert completion(machine).strip()
    assert machine.do("/usr/local/bin/flexctl", "status").startswith("demo-model   native")


def test_uninstalled_only_the_changed_configuration_is_left(machine: Machine) -> None:
    machine.do("systemctl", "disable", "--now", "flexpiped", "flexpiped-engine.socket")
    assert len(ours(machine)) > 10

    said = machine.do("/srv/source/packaging/install.sh", "uninstall")  # what make does, and there is no make

    assert said == f"{CONFIG} was changed, and stays\n"
    assert ours(machine) == ["/etc/flexpiped", CONFIG]
