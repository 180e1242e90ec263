"""The return to compiled code after a move: what is asked of whom, what is reported, and what keeps a rank eager."""

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.served.channel import CallFailed
from engines.vllm.recompile import LOAD_LIMIT_S, Compiled, Recompilation, Recompiler, why_eager

COUNTS = (5, 3)
LOADED = {"stall_s": 0.06, "load_s": 0.05}


class Rank:
    """Stands for the side channel of a rank that has fallen back, or not."""

    def __init__(self, seen: list[str], name: str, *, runs: str = "eager", **answer: Any) -> None:
        self._seen, self._name = seen, name
        self._status = {"runs": runs, "layers": answer.pop("layers", [1])}
        self._answer = {"compile_s": 3.0, "load_s": 0.05} | answer
        self.compiling = asyncio.Event()
        self.hold: asyncio.Event | None = None

    async def call(self, op: str, **fields: object) -> Any:
        if op == "status":
            return self._status
        self._seen.append(f"{op} {self._name}")
        if op == "compile":
            assert fields == {"counts": list(COUNTS)}
            self.compiling.set()
            if self.hold is not None:
                await self.hold.wait()
            if (error := self._answer.get("error")) is not None:
                raise CallFailed(str(error))
        return self._answer


class Core:
    """Stands for the engine core."""

    def __init__(self, seen: list[str], answer: Any) -> None:
        self._seen, self._answer = seen, answer

    async def core(self, method: str, *_arguments: object) -> Any:
        self._seen.append(method)
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


class Rig:
    def __init__(self, *, loaded: Any = None, deadline_s: float = 60.0, **second: Any) -> None:
        self.seen: list[str] = []
        self.ended: list[Recompilation] = []
        self.crashes: list[str] = []
        self.ranks: Any = {0: Rank(self.seen, "0"), 1: Rank(self.seen, "1", **second)}
        core: Any = Core(self.seen, LOADED if loaded is None else loaded)
        self.recompiler = Recompiler(
            core,
            self.ranks,
            on_end=self.ended.append,
            on_crash=self.crashes.append,
            deadline_s=deadline_s,
        )

    async def run(self) -> Recompilation:
        self.recompiler.begin(COUNTS)
        await self.recompiler.wait()
        return self.ended[-1]


async def test_it_goes_on_in_an_engine_that_was_there_before_the_daemon() -> None:
    rig = Rig(runs="compiled")
    await rig.recompiler.resume(COUNTS)
    await rig.recompiler.wait()
    assert rig.seen == ["stop_compiling 0", "stop_compiling 1", "compile 0", "load_compiled"]
    assert rig.ended[-1].compiled


async def test_ranks_compile_one_after_the_other_and_load_together() -> None:
    rig = Rig()
    ended = await rig.run()
    assert rig.seen == ["compile 0", "compile 1", "load_compiled"]
    assert (ended.compiled, ended.ranks, ended.compile_s, ended.stall_s) == (True, (0, 1), 6.0, 0.06)
    assert ended.message == (
        "ranks 0, 1: compiled again after 0.0 s (6.0 s of it compiling in helper processes),"
        " load stalled steps for 60 ms"
    )


@pytest.mark.parametrize("second", [{"runs": "compiled"}, {"runs": ""}, {"layers": []}])
async def test_a_rank_that_has_nothing_to_compile_is_left_alone(second: dict[str, Any]) -> None:
    rig = Rig(**second)
    assert (await rig.run()).ranks == (0,)
    assert rig.seen == ["compile 0", "load_compiled"]


async def test_a_load_that_would_stall_for_too_long_is_not_done() -> None:
    rig = Rig(load_s=1.4)
    ended = await rig.run()
    assert rig.seen == ["compile 0", "compile 1"]
    assert ended.message == "ranks 0, 1: stays eager: loading its code would stall steps for 1.4 s, more than 1 s"


async def test_after_a_load_that_took_too_long_later_moves_stay_eager() -> None:
    rig = Rig(loaded={"stall_s": 1.7, "load_s": 1.6})
    assert (await rig.run()).compiled  # the stall is paid
    rig.seen.clear()
    assert "has stalled steps for 1.7 s before" in (await rig.run()).reason
    assert rig.seen == []


@pytest.mark.parametrize("where", ["compile", "load"])
async def test_a_failure_keeps_all_eager_and_says_why(where: str) -> None:
    rig = Rig(error="no compiler") if where == "compile" else Rig(loaded=CallFailed("no such file"))
    ended = await rig.run()
    assert not ended.compiled
    assert ended.reason == ("no compiler" if where == "compile" else "no such file")


async def test_a_rank_that_does_not_answer_is_a_crash() -> None:
    rig = Rig(loaded={"crash": "a rank did not load"})
    rig.recompiler.begin(COUNTS)
    await rig.recompiler.wait()
    assert (rig.crashes, rig.ended) == (["a rank did not load"], [])


async def test_a_move_stops_what_is_being_compiled() -> None:
    rig = Rig()
    rig.ranks[1].hold = asyncio.Event()
    rig.recompiler.begin(COUNTS)
    await rig.ranks[1].compiling.wait()
    await rig.recompiler.stop()
    assert not rig.recompiler.under_way
    assert rig.seen == ["compile 0", "compile 1", "stop_compiling 0", "stop_compiling 1"]
    assert rig.ended == []
    rig.ranks[1].hold = None
    assert (await rig.run()).compiled


async def test_compiling_has_a_deadline() -> None:
    rig = Rig(deadline_s=0.01)
    rig.ranks[1].hold = asyncio.Event()
    assert (await rig.run()).reason == "not compiled within 0.01 s"
    assert rig.seen[-2:] == ["stop_compiling 0", "stop_compiling 1"]


@given(st.lists(st.floats(0, 10), max_size=5))
def test_the_slowest_rank_decides(loads: list[float]) -> None:
    done = [Compiled(compile_s=1.0, load_s=load_s) for load_s in loads]
    assert (why_eager(done, limit_s=LOAD_LIMIT_S) == "") == all(load_s <= LOAD_LIMIT_S for load_s in loads)
