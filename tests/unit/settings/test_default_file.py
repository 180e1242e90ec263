"""``etc/flexpiped.toml`` lists exactly every key, with the default that the code has."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from flexpiped.config_file import load_config, parse_config
from flexpiped.settings import Settings
from flexpiped.settings_keys import KEYS

FILE = Path(__file__).parents[3] / "etc" / "flexpiped.toml"
UNCOMMENTED = re.sub(r"^#(?=\w+ = )", "", FILE.read_text(encoding="utf-8"), flags=re.MULTILINE)


NAMES = {key.name for key in KEYS}


def keys_in(tree: dict[str, object], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict) and prefix + name not in NAMES:  # a table may also be a value
            yield from keys_in(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_it_is_usable_as_it_is() -> None:
    assert load_config(FILE) == Settings()


def test_it_lists_exactly_every_key_in_order() -> None:
    assert list(keys_in(tomllib.loads(UNCOMMENTED))) == [key.name for key in KEYS]


def test_every_default_it_shows_is_the_real_one() -> None:
    assert parse_config(UNCOMMENTED, file="flexpiped.toml") == Settings()


def test_every_key_is_explained() -> None:
    lines = FILE.read_text(encoding="utf-8").splitlines()
    shown = [index for index, line in enumerate(lines) if re.match(r"#\w+ = ", line)]

    assert len(shown) == len(KEYS)
    for index in shown:
        above = next(line for line in reversed(lines[:index]) if not re.match(r"#\w+ = ", line))
        assert above.startswith("# "), lines[index]
