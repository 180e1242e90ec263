"""What a configuration file may say, and how it is told off."""

from pathlib import Path

import pytest

from flexpiped.config_file import ConfigError, load_config, parse_config
from flexpiped.config_values import Auto
from flexpiped.model_settings import specs_of
from flexpiped.reload import changes_between
from flexpiped.settings import AutoMode, DType, EngineKind, LogFormat, Settings

MIB = 1 << 20


def problems(document: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(document, file="my.toml")
    return str(caught.value).splitlines()


def test_three_lines_are_enough() -> None:
    settings = parse_config('model = "org/name"\nengine = "native"\nstages = 4\n', file="my.toml")

    assert (settings.model, settings.engine, settings.stages) == ("org/name", EngineKind.NATIVE, 4)


def test_an_empty_file_gives_the_defaults() -> None:
    assert parse_config("", file="my.toml") == Settings()


def test_every_kind_of_value_is_read() -> None:
    settings = parse_config(
        """
        stages = "auto"
        dtype = "bfloat16"
        trust_remote_code = true
        http = { host = "::1", port = 0 }
        log.format = "json"
        revision = ""
        [devices]
        cpu_memory = "1.5 GiB"
        [engines.native]
        kv_cache = 1048576
        max_micro_batches = 2
        python = "/opt/venv/bin/python"
        [handover]
        sync_deadline_s = 3
        """,
        file="my.toml",
    )

    assert settings.stages is Auto.AUTO
    assert settings.dtype is DType.BFLOAT16
    assert settings.trust_remote_code
    assert (settings.http.host, settings.http.port) == ("::1", 0)
    assert settings.log.format is LogFormat.JSON
    assert settings.revision is None
    assert settings.devices.cpu_memory_bytes == 1536 * MIB
    assert settings.engines.native.kv_cache_bytes == MIB
    assert settings.engines.native.max_micro_batches == 2
    assert settings.engines.native.python == Path("/opt/venv/bin/python")
    assert settings.handover.sync_deadline_s == 3.0


def test_an_unknown_key_is_named_with_line_and_nearest_key() -> None:
    assert problems('\n\nstagse = 2\n[http]\nprot = 1\n[engine.native]\nnice = 1\nkv_cash = "1 MiB"') == [
        'my.toml:3: unknown key "stagse"; did you mean "stages"?',
        'my.toml:5: unknown key "http.prot"; did you mean "http.port"?',
        'my.toml:6: unknown table "engine.native"; did you mean "engines.native"?',
    ]


def test_a_key_in_the_wrong_table_is_led_home() -> None:
    assert problems('kv_cache = "64 MiB"') == [
        'my.toml:1: unknown key "kv_cache"; did you mean "engines.native.kv_cache"?'
    ]


def test_all_problems_are_reported_at_once_with_what_is_allowed() -> None:
    document = """
stages = 0
engine = "nativ"
dtype = 32
trust_remote_code = "yes"
model = ""
[http]
port = 99999
[engines.native]
kv_cache = "3 apples"
max_micro_batches = "many"
nice = 2.5
[handover]
sync_deadline_s = -1
"""

    assert problems(document) == [
        'my.toml:2: stages must be "auto" or a whole number of at least 1, not 0',
        'my.toml:3: engine must be "native" or "vllm" or "sglang" or "fake", not "nativ"',
        'my.toml:4: dtype must be "auto" or "float32" or "bfloat16" or "float16", not 32',
        'my.toml:5: trust_remote_code must be true or false, not "yes"',
        'my.toml:6: model must be a string that is not empty, not ""',
        "my.toml:8: http.port must be a whole number, 0 to 65535, not 99999",
        "my.toml:10: engines.native.kv_cache must be a size in bytes or with a unit, as in 67108864 or "
        '"64 MiB", not "3 apples"',
        'my.toml:11: engines.native.max_micro_batches must be "auto" or a whole number, 1 to 64, not "many"',
        "my.toml:12: engines.native.nice must be a whole number, 0 to 19, not 2.5",
        "my.toml:14: handover.sync_deadline_s must be a number of seconds above 0, not -1",
    ]


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ("http = 3", 'my.toml:1: "http" is a table: write [http] and its keys below'),
        ("[[http]]\nport = 1", 'my.toml:1: "http" is a table: write [http] and its keys below'),
        ("[stages]\ncount = 1", 'my.toml:1: stages must be "auto" or a whole number of at least 1, not a table'),
        ("[http]\nport = 99\nhost = [1]", "my.toml:3: http.host must be a string that is not empty, not an array"),
        ('[engines.native]\nkv_cache = "1 KiB"', "must be at least 64 KiB"),
        ("[engines.vllm]\nargs = 'x'", 'my.toml:2: engines.vllm.args must be an array of strings, not "x"'),
        (
            "[engines.vllm]\nargs = ['x', 2]",
            "my.toml:2: engines.vllm.args must be an array of strings, not an array with 2",
        ),
        ("[engines.vllm.env]\nA = 1", "my.toml:1: engines.vllm.env must be a table of strings, not a table with 1"),
        ("zzz = 1", 'my.toml:1: unknown key "zzz"; etc/flexpiped.toml lists every key'),
    ],
)
def test_wrong_shapes(document: str, problem: str) -> None:
    assert problem in problems(document)[0]


def test_broken_toml_is_placed() -> None:
    assert problems("a = 1\nb = = 2\n") == ["my.toml:2: not TOML: invalid value"]
    assert problems('model = "x') == ["my.toml:1: not TOML: unterminated string"]


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: No such file or directory"):
        load_config(tmp_path / "none.toml")


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "marked.toml").write_bytes(b"\xef\xbb\xbfstages = 3\n")
    assert load_config(tmp_path / "marked.toml").stages == 3


def test_a_model_beside_the_file_is_found_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "here.toml").write_text('model = "models/mine"')
    (tmp_path / "hub.toml").write_text('model = "org/name"')

    assert load_config(tmp_path / "here.toml").model == str(tmp_path / "models" / "mine")
    assert load_config(tmp_path / "hub.toml").model == "org/name"


def test_arguments_and_variables_of_an_engine() -> None:
    document = """
[engines.vllm]
args = [
    "--served=mine",
    "nice = 3",
]
env = { A = "1" }
"""
    vllm = parse_config(document, file="my.toml").engines.vllm
    assert (vllm.args, vllm.env) == (("--served=mine", "nice = 3"), {"A": "1"})
    as_table = parse_config('[engines.vllm.env]\nA = "1"', file="my.toml")
    assert as_table.engines.vllm.env == {"A": "1"}


def test_changed_keys_are_named_as_in_the_file() -> None:
    new = parse_config('stages = 3\n[engines.native]\nkv_cache = "1 MiB"', file="my.toml")

    names = [change.key.name for change in changes_between(Settings(), new)]
    assert names == ["stages", "engines.native.kv_cache"]
    assert changes_between(new, new) == ()


def test_values_that_cannot_be_together_are_named_with_their_line() -> None:
    with pytest.raises(ConfigError, match=r"my\.toml:2: auto\.target_load must be at most auto\.load_limit \(0\.5\)"):
        parse_config("[auto]\ntarget_load = 0.75\nload_limit = 0.5\n", file="my.toml")


MODELS = """
model = "/srv/top"
stages = 3
revision = "v1"
[models.a]
model = "/srv/a"
engine = "vllm"
engines.native.kv_cache = "8 MiB"
[models."org/b"]
model = "/srv/b"
stages = 1
[models."org/b".auto]
mode = "on"
"""


def test_a_table_of_a_model_says_what_is_another_one_than_at_the_top() -> None:
    top, a, b = specs_of(parse_config(MODELS, file="my.toml"))

    assert [each.table for each in (top, a, b)] == ["", "a", "org/b"]
    assert [each.settings.stages for each in (top, a, b)] == [3, 3, 1]
    assert [each.settings.engine for each in (top, a, b)] == [EngineKind.NATIVE, EngineKind.VLLM, EngineKind.NATIVE]
    assert [each.settings.revision for each in (top, a, b)] == ["v1", None, None]  # of the files at the top
    assert [each.settings.served_model_name for each in (top, a, b)] == [None, "a", "org/b"]
    assert a.settings.engines.native.kv_cache_bytes == 8 << 20
    assert b.settings.auto.mode is AutoMode.ON
    assert [each.table for each in specs_of(parse_config(MODELS.replace("/srv/top", "demo"), file=""))] == [
        "a",
        "org/b",
    ]


def test_what_is_wrong_in_tables_of_models_is_named_by_line_and_key() -> None:
    document = '[models.a]\nstagse = 1\nhttp.port = 1\n[models.c]\nmodel = "/srv/c"\nstages = 0\n[models]\nd = 1\n'
    with pytest.raises(ConfigError) as caught:
        parse_config(f'model = "/srv/c"\n{document}', file="my.toml")
    assert [str(problem).removeprefix("my.toml:") for problem in caught.value.problems] == [
        "2: [models.a] needs model: a directory or hub id",
        '3: models.a.stagse is unknown; did you mean "stages"?',
        "4: models.a.http.port is of the whole daemon, not of one model: it stands at the top of the file",
        "5: two models would be served as 'c': that of the top has this name, too",
        '7: models.c.stages must be "auto" or a whole number of at least 1, not 0',
        "9: models.d must be a table: [models.d]",
    ]


def test_adapters_fit_one_model_and_have_names_of_their_own() -> None:
    mine = "engines.native.adapters = { sql = '/a' }"
    two = f"model = '/m/top'\n{mine}\n[models.other]\nmodel = '/m/other'\n"
    top, other = specs_of(parse_config(two, file="my.toml"))
    assert (top.settings.engines.native.adapters, other.settings.engines.native.adapters) == ({"sql": "/a"}, {})

    [line] = problems(f"{two}[models.sql]\nmodel = '/m/third'\n")
    assert "engines.native.adapters: 'sql' is the name of a model or of another adapter, too" in line
    [line] = problems("model = '/m/sql'\n" + mine)
    assert "'sql' is the name of a model" in line
    both = problems(f"{two}engines.native.adapters = {{ sql = '/b' }}\n")
    assert len(both) == 2
