"""The engine changes between native, SGLang and vLLM while requests stream over HTTP: greedy text in fp32 stays.

While SGLang is in force, a user moves its layers.
"""

import json
import re
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from flexpiped.models import demo_model_places
from tests.engines.install_vllm import VLLM
from tests.engines.interpreter import ensure_there
from tests.support.checkpoints import make_untied
from tests.support.daemon import Daemon, started
from tests.support.engine_change import PROMPTS, TAKEN, Client, changed
from tests.support.secrets import DEBUG, assert_not_logged
from tests.support.sglang import interpreter

pytestmark = [pytest.mark.engine, pytest.mark.sglang, pytest.mark.real_loop]
CUTS = (7, 1, 4)  # of the first stage's decoders, one after the other


async def through(folder: Path, *engines: str, more: str, ranks: int = 0) -> None:
    """Begin with the first engine and change to each of the others under streams, whose text stays the same.

    In the end an instance of the last with so many ``ranks`` takes over, unless 0.
    """
    # of a head that is tied to the embedding, as the demo model has it, SGLang makes no several pipeline ranks
    model = make_untied(folder / "untied", of=demo_model_places()[0])
    more = f'model = "{model}"\ndtype = "float32"\nmax_model_len = 2048\n{DEBUG}{more}'
    async with (
        started(folder, ready=True, engine=engines[0], more=more) as daemon,
        aiohttp.ClientSession() as session,
    ):
        client = Client(session, (await daemon.ask("/status"))["api_url"])
        expected = await client.texts()
        for engine in engines[1:]:
            async with client.busy(expected):
                assert re.fullmatch(TAKEN, await changed(daemon, engine))
            if engine == "sglang":
                async with client.busy(expected):
                    await move_in_place(daemon)
        if ranks:
            async with client.busy(expected):
                await take_more_ranks(daemon, ranks)
        assert await client.complete("Once", min_p=0.1) == (200, expected["Once"])  # it changes nothing that is greedy
        assert_not_logged(daemon, PROMPTS[1], *expected.values())


async def move_in_place(daemon: Daemon) -> None:
    """Have a user move layers between the two ranks, back and forth; the engine stays the same process."""
    before = await daemon.ask("/status")
    devices = [stage["device_ids"] for stage in before["stages"]]
    file = daemon.config.with_name("layout.json")
    for cut in CUTS:
        bounds = ((0, cut), (cut, 8))
        stages = [{"devices": d, "decoders": list(b)} for d, b in zip(devices, bounds, strict=True)]
        file.write_text(json.dumps({"stages": stages}))
        code, out, err = await daemon.flexctl("rebalance", "--layout", str(file), "--wait")
        assert (code, "done in" in out, "commit" in out) == (0, True, True), out + err
    after = await daemon.ask("/status")
    assert after["epoch"] == before["epoch"] + len(CUTS)
    assert [pids_of(stage) for stage in after["stages"]] == [pids_of(stage) for stage in before["stages"]]


async def take_more_ranks(daemon: Daemon, ranks: int) -> None:
    """Have a user ask for more stages than there are ranks: a second instance takes the streams over."""
    code, out, err = await daemon.flexctl("rebalance", "--stages", str(ranks), "--wait")
    assert (code, "by a second instance" in out) == (0, True), out + err
    status = await daemon.ask("/status")
    assert (status["engine"], len(status["stages"])) == ("sglang", ranks)
    assert re.fullmatch(TAKEN, status["last_handover"]["message"])


def pids_of(stage: dict[str, Any]) -> list[int]:
    return [worker["pid"] for worker in stage["workers"]]


def sglang() -> str:
    return f'[engines.sglang]\npython = "{interpreter()}"\n'


async def test_streams_do_not_notice_that_sglang_serves_them_and_moves_its_layers(tmp_path: Path) -> None:
    await through(tmp_path, "native", "sglang", "native", more=sglang())


@pytest.mark.long
@pytest.mark.parametrize("is_tied", [True, False])
async def test_engine_and_interpreter_are_all_that_a_user_changes(tmp_path: Path, is_tied: bool) -> None:
    """Of a model whose head is tied, as of the one that comes with flexpiped, SGLang makes one rank: no mistake."""
    own = "" if is_tied else f'model = "{make_untied(tmp_path / "untied", of=demo_model_places()[0])}"\n'
    async with (
        started(tmp_path, ready=True, engine="sglang", stages=None, more=own + sglang()) as daemon,
        aiohttp.ClientSession() as session,
    ):
        status = await daemon.ask("/status")
        assert (status["engine"], len(status["stages"])) == ("sglang", 1 if is_tied else 2)
        assert ("2 stages cannot be" in daemon.output.read_text()) == is_tied
        texts = await Client(session, status["api_url"]).texts()
        assert all(texts.values())
        if not is_tied:
            await move_in_place(daemon)


@pytest.mark.long
@pytest.mark.vllm
async def test_streams_go_from_sglang_to_vllm_and_back_and_to_more_ranks(tmp_path: Path) -> None:
    vllm = f'[engines.vllm]\npython = "{ensure_there(VLLM)}"\n'
    await through(tmp_path, "sglang", "vllm", "sglang", more=sglang() + vllm, ranks=3)
