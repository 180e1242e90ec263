"""Tests with engines in two lanes, one process each: vLLM's, and the native engine's and then SGLang's.

To start, a vLLM or SGLang imports in one process after the other, which leaves a second core idle. Two lanes take about
as long, and of each engine no more than one that is shared is alive at a time. pytest-xdist can group by marks
(``loadgroup``), but not with pytest 9.2, whose node ids it cannot change.
"""

from xdist.scheduler import LoadScopeScheduling


class TwoLanes(LoadScopeScheduling):
    """Gives each process a lane."""

    def _split_scope(self, nodeid: str) -> str:
        return lane(nodeid)


def lane(nodeid: str) -> str:
    """Return what a test keeps behind."""
    file = nodeid.partition("::")[0]
    return "vllm" if file.startswith("tests/vllm/") or file.endswith("/test_vllm.py") else "native, then sglang"
