"""What all tests share: their order, and a word at the end about those that were left out, and why."""

import signal
from collections import Counter
from typing import Any

import pytest
from hypothesis import settings

from tests.engines.install_sglang import SGLANG
from tests.engines.install_vllm import VLLM
from tests.engines.interpreter import ensure_there
from tests.support.browser import ensure_chromium

# Machines that run tests are shared: how long one example takes says nothing.
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")

PARTS = ("all", "engines", "others")

# A test counts for the first of its marks.
REASONS = {
    "long": "too long for the gate: make test-long",
    "gpu": "need a CUDA device",
    "vllm": "boot real vLLM: ENGINES=all",
    "sglang": "boot real SGLang: ENGINES=all",
    "engine": "boot the native engine: ENGINES=native or all",
}
LEFT_OUT = pytest.StashKey[Counter[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part",
        choices=PARTS,
        default="all",
        help="tests that boot a real engine, in two lanes where there are several processes, or all others",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = Counter()
    # Whoever runs this in the background may have interrupts ignored, and so would the processes that tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put what is cheap first, so that what is wrong shows early: no engine, the native one, vLLM, SGLang."""
    part = config.getoption("--part")
    items[:] = sorted((each for each in items if part in ("all", "engines" if cost(each) else "others")), key=cost)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object | None:
    """Have tests with engines run in their lanes, however many processes there are; others as --dist says."""
    if config.getoption("--part") != "engines":
        return None
    from tests.support.lanes import TwoLanes

    return TwoLanes(config, log)


def cost(item: pytest.Item) -> int:
    return next(
        (rank for mark, rank in (("sglang", 3), ("vllm", 2), ("engine", 1)) if item.get_closest_marker(mark)), 0
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip at one place what needs an engine or browser that is not here, so that one line says how many and why."""
    if item.get_closest_marker("vllm"):
        ensure_there(VLLM)
    if item.get_closest_marker("sglang"):
        ensure_there(SGLANG)
    if item.get_closest_marker("browser"):
        ensure_chromium()


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        reason = next((REASONS[name] for name in REASONS if item.get_closest_marker(name)), "not asked for")
        item.config.stash[LEFT_OUT][reason] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the process that prints the summary what was left out, where tests run in processes of their own."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(session.config.stash[LEFT_OUT])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Each of these processes has collected the same tests, and left out the same."""
    if left_out := getattr(node, "workeroutput", {}).get("left_out"):
        node.config.stash[LEFT_OUT] = Counter(left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for reason, count in sorted(config.stash[LEFT_OUT].items()):
        terminalreporter.write_line(f"left out: {count} tests ({reason})")
