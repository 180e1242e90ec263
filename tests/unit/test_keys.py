"""API keys: a file of hashes, and what is wrong with one is said."""

import hashlib
import sys
import tomllib
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from flexpiped.keys import Client, KeyFileError, KeyRing, Scope, load_keys
from tests.support.lone_flexctl import alone

HASH = hashlib.sha256(b"secret").hexdigest()
KEY = f'[[keys]]\nname = "alice"\nsha256 = "{HASH}"\nscopes = ["infer"]\n'


def written(folder: Path, text: str) -> Path:
    file = folder / "keys.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_key_is_found_by_its_hash(tmp_path: Path) -> None:
    more = KEY.replace("alice", "bob").replace(HASH, "0" * 64) + "priority = 3\nrequests_per_minute = 60.0\n"
    ring = load_keys(written(tmp_path, more + KEY))

    client = ring.client_of("secret")
    assert client is not None
    assert (client.name, client.may(Scope.INFER), client.may(Scope.READ)) == ("alice", True, False)
    assert ring.client_of("Secret") is None
    assert ring.client_of("") is None
    assert ring.client_of("\udcff") is None  # a byte of a header that is no text
    assert (ring.clients[0].priority, ring.clients[0].requests_per_minute) == (3, 60.0)


class Digest(bytes):
    """What a file has of a key. Two of them are never compared by what stops at the first byte that differs."""

    def __eq__(self, other: object) -> bool:
        raise AssertionError("compared by ==")

    __hash__ = None  # type: ignore[assignment]


def lines_run_by(ring: KeyRing, presented: str) -> tuple[int, str]:
    """Return how many lines of Python it takes to find whose key it is, and whose it is."""
    lines = 0

    def count(_frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        client = ring.client_of(presented)
    finally:
        sys.settrace(before)
    return lines, client.name if client else ""


def test_how_long_it_takes_says_nothing_of_a_key() -> None:
    """It is compared with each of the file to the end, by what takes as long wherever two differ."""
    names = [f"key{index}" for index in range(8)]
    ring = KeyRing(
        hashes=tuple(Digest(hashlib.sha256(name.encode()).digest()) for name in names),
        clients=tuple(Client(name=name) for name in names),
    )
    found = [lines_run_by(ring, name) for name in names]
    assert [name for _, name in found] == names
    assert len({lines for lines, _ in found}) == 1
    assert lines_run_by(ring, "none of them") == (found[0][0] - 1, "")  # but for the line that notes whose it is


def test_admin_opens_everything(tmp_path: Path) -> None:
    client = load_keys(written(tmp_path, KEY.replace("infer", "admin"))).client_of("secret")

    assert client is not None
    assert all(client.may(scope) for scope in Scope)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("keys = 1", "Expected `array`"),
        ("[[keys", "Expected"),
        (KEY.replace(HASH, "secret"), "matching regex"),
        (KEY.replace("infer", "everything"), "Invalid enum value 'everything'"),
        (KEY.replace('["infer"]', "[]"), "length >= 1"),
        (KEY + "max_requests_in_flight = 0\n", ">= 1"),
        (KEY + 'key = "secret"\n', "unknown field `key`"),
        (KEY + KEY, "two keys have the name alice"),
        (KEY + KEY.replace("alice", "bob"), "two keys have the sha256"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(KeyFileError, match=r"keys\.toml: ") as caught:
        load_keys(written(tmp_path, text))
    assert reason in str(caught.value)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="No such file"):
        load_keys(tmp_path / "keys.toml")


def test_flexctl_makes_a_key_that_fits_its_entry(tmp_path: Path) -> None:
    ran = alone(tmp_path, "key", "alice", "--scope", "infer", "--scope", "read")

    assert ran.returncode == 0, ran.stderr
    made = ran.stdout.splitlines()[0].rpartition(" ")[2]
    assert "secret" not in tomllib.loads(ran.stdout)
    client = load_keys(written(tmp_path, ran.stdout)).client_of(made)
    assert client is not None
    assert (client.name, client.scopes) == ("alice", {Scope.INFER, Scope.READ})
    assert made not in alone(tmp_path, "key", "alice").stdout


@pytest.mark.parametrize("name", ["", "alice smith", "a" * 65, "älice"])
def test_flexctl_makes_no_key_of_a_name_that_the_file_cannot_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(KeyFileError, match="matching regex"):
        load_keys(written(tmp_path, KEY.replace("alice", name)))

    ran = alone(tmp_path, "key", name)

    assert (ran.returncode, ran.stdout) == (2, "")
    assert "a name of 1 to 64 letters" in ran.stderr


def test_flexctl_config_check_reads_the_file_of_keys_too(tmp_path: Path) -> None:
    keys, config = written(tmp_path, KEY), tmp_path / "my.toml"
    config.write_text(f'http.api_keys = "{keys}"\n')
    right = alone(tmp_path, "config", "check", str(config))
    keys.write_text(KEY + KEY)
    wrong = alone(tmp_path, "config", "check", str(config))

    assert (right.returncode, right.stdout) == (0, f"{config}: ok\n")
    assert (wrong.returncode, wrong.stderr) == (2, f"http.api_keys: {keys}: two keys have the name alice\n")
