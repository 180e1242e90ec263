"""What `make test` runs, in which order, and what it says about the rest."""

import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

from tests.support.lanes import lane

ROOT = Path(__file__).parents[2]
INSTALLERS = ("tests.engines.install_vllm", "tests.engines.install_sglang")
NO_TESTS = 5  # are left
NAMED = ("FLEXPIPED_VLLM_PYTHON=", "FLEXPIPED_SGLANG_PYTHON=")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def collect(*arguments: str) -> list[str]:
    argv = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode in (0, NO_TESTS), done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("engines", "marks", "installs"),
    [
        ((), "not long and not gpu", True),
        (("ENGINES=all",), "not long and not gpu", True),
        (("ENGINES=native",), "not long and not gpu and not vllm and not sglang", False),
        (("ENGINES=none",), "not long and not gpu and not vllm and not sglang and not engine", False),
    ],
)
def test_make_test_builds_engines_only_where_they_are_needed(
    engines: tuple[str, ...], marks: str, installs: bool
) -> None:
    commands = make("test", "MAKEFLAGS=", *engines).stdout

    assert re.findall(r'-m "(.*?) ?" --part=(\w+)', commands) == [(marks, "others"), (marks, "engines")]
    without, with_engines = commands.split("--part=others")
    assert not any(word in without for word in (*INSTALLERS, *NAMED))
    assert [word in with_engines for word in (*INSTALLERS, *NAMED)] == [installs] * 4


def test_an_unknown_choice_of_engines_is_refused() -> None:
    refused = make("test", "ENGINES=sglang")

    assert refused.returncode != 0
    assert 'ENGINES is all, native or none, not "sglang"' in refused.stderr


def test_the_gate_is_exactly_make_test() -> None:
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "exec make test"


def test_cheap_tests_come_first_and_one_served_engine_is_alive_at_a_time() -> None:
    lines = [line for line in collect("tests/contract", "tests/sglang", "tests/vllm") if "::" in line]
    files = [file for file, _ in groupby(line.partition("::")[0] for line in lines)]

    assert files[:3] == ["tests/contract/test_fake.py", "tests/contract/test_native.py", "tests/contract/test_vllm.py"]
    # Of each one serves many tests; those before it boot others, and the last test ends it.
    of_vllm = ["moves", "routes", "death"]
    of_sglang = ["contract", "logprobs", "moves", "own_server", "recovery", "resuming", "contract"]
    shared = [f"tests/vllm/test_{name}.py" for name in of_vllm], [f"tests/sglang/test_{name}.py" for name in of_sglang]
    first_of_sglang = next(place for place, file in enumerate(files) if file.startswith("tests/sglang/"))
    assert files[first_of_sglang - len(of_vllm) : first_of_sglang] == shared[0]
    assert files[-len(of_sglang) :] == shared[1]


def test_tests_with_an_engine_run_in_two_lanes_in_each_of_which_one_is_alive_at_a_time() -> None:
    _, with_engines = make("test", "MAKEFLAGS=").stdout.split("--part=others")

    assert "--part=engines -n auto --maxprocesses 2" in with_engines
    for marks, kept_behind in (("vllm and not sglang", "vllm"), ("sglang", "native, then sglang")):
        of_marks = ("-m", f"not long and not gpu and {marks}", "tests/contract", "tests/sglang", "tests/vllm")
        assert {lane(line) for line in collect("--part=engines", *of_marks) if "::" in line} == {kept_behind}
    assert lane("tests/native/test_moves.py::test_one") == lane("tests/sglang/test_moves.py::test_one")


def test_what_is_left_out_of_a_part_is_counted_with_its_reason() -> None:
    without = "not engine and not vllm and not sglang"
    lines = collect("--part", "engines", "-m", without, "tests/contract", "tests/sglang/test_contract.py")
    told = [re.sub(r"\d+", "N", line) for line in lines if line.startswith("left out")]

    assert told == [
        "left out: N tests (boot real SGLang: ENGINES=all)",
        "left out: N tests (boot real vLLM: ENGINES=all)",
        "left out: N tests (boot the native engine: ENGINES=native or all)",
    ]
    assert not [line for line in lines if "::" in line]


def test_the_other_part_boots_no_engine() -> None:
    lines = collect("--part", "others", "tests/contract")
    assert {line.partition("::")[0] for line in lines if "::" in line} == {"tests/contract/test_fake.py"}
    assert not [line for line in lines if line.startswith("left out")]
