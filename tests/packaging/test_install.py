"""``make install`` puts everything where a host looks for it, and it runs; ``make uninstall`` leaves nothing."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = (
    "usr/bin/flexctl",
    "usr/bin/flexpiped",
    "usr/lib/flexpiped/bin/python",
    "usr/lib/systemd/system/flexpiped.service",
    "usr/lib/systemd/system/flexpiped-engine.socket",
    "usr/lib/systemd/system/flexpiped-engine@.service",
    "usr/lib/sysusers.d/flexpiped.conf",
    "usr/lib/tmpfiles.d/flexpiped.conf",
    "usr/share/bash-completion/completions/flexctl",
    "usr/share/doc/flexpiped/README.md",
    "usr/share/flexpiped/demo-model/config.json",
    "usr/share/flexpiped/topologies/dgx-h100.json",
    "usr/share/man/man1/flexctl.1",
    "usr/share/man/man8/flexpiped.8",
    "usr/share/zsh/site-functions/_flexctl",
    "etc/flexpiped/flexpiped.toml",
)

pytestmark = pytest.mark.long  # pip installs the daemon's libraries: half a minute to a minute


def run(*command: object) -> str:
    ran = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, cwd="/")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def make(target: str, place: Path) -> str:
    return make_in(target, place, prefix="/usr")


def make_in(target: str, place: Path, *, prefix: str) -> str:
    return run("make", "--no-print-directory", "-C", ROOT, target, f"DESTDIR={place}", f"prefix={prefix}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install, and move it to where it was not installed."""
    made = tmp_path_factory.mktemp("install") / "made"
    make("install", made)
    return made.rename(made.with_name("moved"))


def test_everything_is_where_a_host_looks_for_it(place: Path) -> None:
    assert [name for name in FILES if not (place / name).exists()] == []
    unit = (place / "usr/lib/systemd/system/flexpiped.service").read_text()
    assert "ExecStart=/usr/bin/flexpiped --config /etc/flexpiped/flexpiped.toml\n" in unit
    engine = (place / "usr/lib/systemd/system/flexpiped-engine@.service").read_text()
    assert "ExecStart=/usr/lib/flexpiped/bin/python -P -m engines.unit_launcher\n" in engine


def test_it_runs_from_where_it_is(place: Path) -> None:
    assert run(place / "usr/bin/flexctl", "--version").startswith("flexctl ")
    assert run(place / "usr/bin/flexctl", "topology", "--topology", "dgx-h100").startswith("dgx-h100")
    config = place / "etc/flexpiped/flexpiped.toml"
    assert run(place / "usr/bin/flexpiped", "--check-config", "--config", config) == f"{config}: ok\n"


def test_the_dashboard_is_in_it(place: Path) -> None:
    source = ROOT / "flexpiped" / "dashboard" / "static"
    (installed,) = (path for path in place.rglob("dashboard/static") if path.is_dir())

    assert {path.name for path in installed.iterdir()} == {path.name for path in source.iterdir()}


def test_nothing_in_it_names_the_place_where_it_was_made(place: Path) -> None:
    places = ("-e", place.with_name("made"), "-e", "lib/flexpiped.new")  # where it was installed; where it was built
    named = subprocess.run(["grep", "-rlF", *places, place], capture_output=True, text=True, check=False)

    assert named.stdout == ""


def test_an_upgrade_that_fails_leaves_what_is_there(place: Path) -> None:
    command = ["make", "-C", ROOT, "install", f"DESTDIR={place}", "prefix=/usr"]
    environment = {**os.environ, "PIP_FLAGS": "--no-such-flag"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert (ran.returncode, "no such option: --no-such-flag" in ran.stderr) == (2, True), ran.stderr
    assert run(place / "usr/bin/flexctl", "--version").startswith("flexctl ")
    assert environments_in(place) == ["flexpiped"]


def test_an_upgrade_takes_the_place_of_what_is_there(place: Path) -> None:
    config, of_before = place / "etc/flexpiped/flexpiped.toml", place / "usr/lib/flexpiped/of-before"
    shipped = config.read_text()
    config.write_text(shipped + "# changed\n")
    of_before.touch()

    make("install", place)

    assert config.read_text() == shipped + "# changed\n"
    assert not of_before.exists()
    assert run(place / "usr/bin/flexctl", "--version").startswith("flexctl ")
    assert environments_in(place) == ["flexpiped"]
    config.write_text(shipped)


def environments_in(place: Path) -> list[str]:
    return [path.name for path in (place / "usr/lib").glob("flexpiped*")]


def test_uninstall_leaves_nothing_but_a_configuration_that_was_changed(place: Path) -> None:
    config = place / "etc/flexpiped/flexpiped.toml"
    shipped = config.read_text()
    config.write_text(shipped + "# changed\n")

    assert make("uninstall", place) == f"{config} was changed, and stays\n"
    assert [path for path in place.rglob("*") if not path.is_dir()] == [config]

    config.write_text(shipped)
    make("uninstall", place)
    assert list(place.iterdir()) == []
