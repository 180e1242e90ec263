"""Settings as text read back as they were, and the schema agrees with the readers."""

import json
import tomllib
from pathlib import Path

import jsonschema
import pytest

from flexpiped.config_file import ConfigError, parse_config
from flexpiped.config_text import schema, settings_to_toml, settings_to_wire, toml_value
from flexpiped.settings import AdminSettings, EnginesSettings, LogSettings, Settings, SloSettings, VllmSettings
from flexpiped.settings_keys import KEYS

DEFAULT_FILE = Path(__file__).parents[3] / "etc" / "flexpiped.toml"
OTHER = Settings(
    model='/srv/a "quoted" \\ name',
    stages=3,
    admin=AdminSettings(socket=Path("/run/x/admin.sock")),
    slo=SloSettings(ttft_s=0.25),
    log=LogSettings(),
    engines=EnginesSettings(vllm=VllmSettings(args=("--seed", "7"), env={"A": "b c", "D-E": ""})),
)
CHECKER = jsonschema.Draft202012Validator(schema())


@pytest.mark.parametrize("settings", [Settings(), OTHER])
def test_what_is_shown_reads_back_as_it_was(settings: Settings) -> None:
    assert parse_config(settings_to_toml(settings), file="shown") == settings


def test_values_from_json_are_shown_alike() -> None:
    shown = "".join(f"{key} = {toml_value(value)}\n" for key, value in settings_to_wire(OTHER).items())

    assert parse_config(shown, file="shown") == OTHER


def test_the_schema_is_one_and_knows_every_key_with_its_default() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    assert json.dumps(schema())
    for settings in (Settings(), OTHER):
        CHECKER.validate(tomllib.loads(settings_to_toml(settings)))
    named = {key.name for key in KEYS}
    assert named | {"models"} == set(keys_of(schema()))


def keys_of(table: dict[str, object], prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, inside in table["properties"].items():  # type: ignore[attr-defined]
        is_table = "properties" in inside
        found += keys_of(inside, f"{prefix}{name}.") if is_table else [prefix + name]
    return found


@pytest.mark.parametrize(
    "wrong",
    [
        "stagse = 2",
        "stages = 0",
        'stages = "many"',
        "http.port = 70000",
        'http.max_body_bytes = "16 miles"',
        'engine = "tensorrt"',
        "workload.rate_per_s = 0",
        "planner.headroom = 0.95",
        "engines.vllm.compile = 1",
        "engines.vllm.args = [1]",
        "slo.ttft_s = -1",
        'model = " "',
    ],
)
def test_what_the_daemon_refuses_the_schema_refuses(wrong: str) -> None:
    with pytest.raises(ConfigError):
        parse_config(wrong, file="wrong")
    assert not CHECKER.is_valid(tomllib.loads(wrong)) or "miles" in wrong  # units are only the reader's


def test_the_default_file_keeps_the_schema() -> None:
    CHECKER.validate(tomllib.loads(DEFAULT_FILE.read_text(encoding="utf-8")))
