"""``flexctl config`` where no daemon is: it finds what a reload would refuse, and writes the schema for editors."""

import json
from pathlib import Path

import pytest

from flexpiped.config_text import schema
from flexpiped.reload import compare
from flexpiped.settings import Settings
from tests.support.certificates import make_certificate
from tests.support.lone_flexctl import alone


def written(folder: Path, text: str) -> Path:
    file = folder / "my.toml"
    file.write_text(text)
    return file


def test_a_certificate_with_its_key_is_right(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "daemon")
    config = written(tmp_path, f'http.tls_certificate = "{certificate}"\nhttp.tls_key = "{key}"\n')

    ran = alone(tmp_path, "config", "check", str(config))

    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"{config}: ok\n", "")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('http.tls_certificate = "{folder}/gone.crt"', "http.tls_certificate: {folder}/gone.crt: No such file"),
        (
            'http.tls_certificate = "{folder}/one.crt"\nhttp.tls_key = "{folder}/two.key"',
            "http.tls_certificate: {folder}/one.crt: no certificate with its key: KEY_VALUES_MISMATCH",
        ),
        ('http.api_keys = "{folder}/gone.toml"', "http.api_keys: {folder}/gone.toml: No such file"),
        ("stagse = 2", '{folder}/my.toml:1: unknown key "stagse"'),
    ],
    ids=["no certificate", "another key", "no keys", "no such key of the configuration"],
)
def test_what_a_reload_refuses_is_no_right_file(tmp_path: Path, line: str, said: str) -> None:
    for name in ("one", "two"):
        make_certificate(tmp_path, name)
    config = written(tmp_path, f"{line.format(folder=tmp_path)}\n")

    plain, as_json = (alone(tmp_path, "config", "check", str(config), *more) for more in ((), ("--json",)))

    assert (plain.returncode, plain.stdout, as_json.returncode) == (2, "", 2)
    assert plain.stderr.startswith(said.format(folder=tmp_path))
    assert plain.stderr.splitlines() == json.loads(as_json.stdout)["problems"]
    assert plain.stderr.splitlines() == list(compare(Settings(), config).problems)


def test_the_schema_is_written_for_editors(tmp_path: Path) -> None:
    ran = alone(tmp_path, "config", "schema")

    assert (ran.returncode, ran.stderr) == (0, "")
    assert json.loads(ran.stdout) == json.loads(json.dumps(schema()))
    assert {"model", "engine", "http", "auto"} <= json.loads(ran.stdout)["properties"].keys()
