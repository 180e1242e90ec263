"""Parameters stay in host memory when stages, replicas and engines go: the next ones find them, converted already."""

import asyncio
import re
from pathlib import Path

import aiohttp
import pytest
import torch

from engines.checkpoint import read_checkpoint
from engines.native.adapter import NativeEngine
from engines.native.layer_source import LayerSource
from engines.native.weights import WeightFiles
from engines.parameters.client import ParameterClient
from engines.parameters.keeper import ParameterKeeper
from tests.native.test_failures import alive
from tests.support.daemon import completed, started
from tests.support.native import collect, even, llama, move, request, running
from tests.support.until import until
from topology.units import MIB

pytestmark = [pytest.mark.engine, pytest.mark.real_loop]

ASKED = request((3, 1, 4, 1, 5), max_tokens=12)
LAYERS = 10  # eight decoders, embedding and head


async def told(keeper: ParameterKeeper, engine: NativeEngine) -> tuple[list[int], int, int]:
    """Return the tokens, and how often layers were found and not found until now."""
    tokens, _ = await collect(engine, ASKED)
    return tokens, keeper.figures.hits_total, keeper.figures.misses_total


async def test_converted_layers_are_shared_and_outlive_their_engine() -> None:
    async with running(llama(), even(2), dtype="bfloat16") as engine:
        expected, _ = await collect(engine, ASKED)
    keeper = ParameterKeeper(64 * MIB)
    async with keeper.serving():
        kept = {"dtype": "bfloat16", "parameters": keeper.address}
        async with running(llama(), even(2), **kept) as engine:
            assert await told(keeper, engine) == (expected, 0, LAYERS)
            held = keeper.figures.held_bytes
            assert keeper.figures.idle_bytes == 0
            async with running(llama(), even(4), **kept) as second:
                assert await told(keeper, second) == (expected, LAYERS, LAYERS)
                assert keeper.figures.held_bytes == held  # one copy for both
                await move(second, even(1))  # six of the layers come to the first device from others
                assert await told(keeper, second) == (expected, 2 * LAYERS - 3, LAYERS)
                await move(second, even(2))
            assert keeper.figures.idle_bytes == 0  # the first one has them still
        await until(lambda: keeper.figures.idle_layers == LAYERS)


@pytest.mark.long
async def test_layers_that_need_no_conversion_are_mapped_from_their_files_and_pinned() -> None:
    keeper = ParameterKeeper(64 * MIB)
    async with keeper.serving():
        async with running(llama(), even(2), parameters=keeper.address) as engine:
            tokens, hits, misses = await told(keeper, engine)
            assert (hits, misses, keeper.figures.layers) == (0, LAYERS, LAYERS)
        await until(lambda: keeper.figures.idle_layers == LAYERS)
        async with running(llama(), even(4), parameters=keeper.address) as engine:
            assert await told(keeper, engine) == (tokens, LAYERS, LAYERS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # as in its file, and converted
async def test_the_keeper_of_the_next_daemon_gets_what_stages_have(dtype: torch.dtype) -> None:
    found = read_checkpoint(llama())
    names = {name: name for name in found.tensors if ".layers.3." in name}
    first, second = ParameterKeeper(64 * MIB), ParameterKeeper(64 * MIB)
    async with second.serving():
        async with first.serving():
            sources = [LayerSource(WeightFiles(found, dtype=dtype), ParameterClient(first.address)) for _ in "ab"]
            wanted = dict.fromkeys(names, dtype)
            reads = [await asyncio.to_thread(each.read, "3", names, dtypes=wanted) for each in sources]
            held = first.figures.held_bytes
        for source, read in zip(sources, reads, strict=True):
            source.keep_at(second.address)
            assert await asyncio.to_thread(source.offer, "3", read, names) == read
        assert (second.figures.held_bytes, second.figures.idle_layers) == (held, 0)
        for source, read in zip(sources, reads, strict=True):
            assert second.figures.idle_layers == 0
            source.discard(read)
        await until(lambda: second.figures.idle_layers == 1)
        for source in sources:
            source.keep_at("")


@pytest.mark.long
async def test_with_too_small_a_budget_stages_have_the_rest_for_themselves() -> None:
    async with running(llama(), even(2), dtype="bfloat16") as engine:
        expected, _ = await collect(engine, ASKED)
    keeper = ParameterKeeper(MIB // 3)
    async with keeper.serving():
        for _ in range(2):
            async with running(llama(), even(2), dtype="bfloat16", parameters=keeper.address) as engine:
                tokens, _ = await collect(engine, ASKED)
                assert tokens == expected
                assert keeper.figures.held_bytes <= keeper.budget_bytes
        assert 0 < keeper.figures.hits_total < LAYERS
        assert keeper.figures.refused_total > 0


@pytest.mark.long
async def test_the_daemon_keeps_them_says_so_and_leaves_nothing_when_it_is_killed(tmp_path: Path) -> None:
    more = 'dtype = "bfloat16"\ndevices = { cpu_count = 2, parameter_cache = "64 MiB" }\n'
    body = {"prompt": "Once upon", "max_tokens": 8, "temperature": 0}
    async with (
        started(tmp_path, ready=True, engine="native", stages=1, more=more) as daemon,
        aiohttp.ClientSession() as http,
    ):
        status = await daemon.ask("/status")
        url, before = status["api_url"], status["parameter_cache"]
        assert (before["budget_bytes"], before["hits_total"], before["idle_layers"]) == (64 * MIB, 0, 0)
        text = await completed(http, url, body)
        code, out, err = await daemon.flexctl("scale", "--replicas", "2", "--stages", "1", "--wait")
        assert code == 0, out + err
        after = (await daemon.ask("/status"))["parameter_cache"]
        assert (after["hits_total"], after["held_bytes"]) == (before["layers"], before["held_bytes"])
        code, out, err = await daemon.flexctl("scale", "--replicas", "1", "--wait")
        assert code == 0, out + err
        assert await completed(http, url, body) == text
        _code, out, _err = await daemon.flexctl("status")
        assert re.search(r"parameters +[\d.]+ MiB of 64 MiB in host memory: 10 layers, 0 of them without a stage", out)
        code, out, err = await daemon.flexctl("plan", "--stages", "1", "--explain")
        assert code == 0, out + err
        assert re.search(r"start +100% of the parameters are kept in host memory; a new replica serves\s+after ", out)
        async with http.get(url.removesuffix("/v1") + "/metrics") as answer:
            metrics = await answer.text()
        [held] = re.findall(r"^flexpiped_parameter_cache_bytes (\S+)$", metrics, re.MULTILINE)
        assert float(held) == before["held_bytes"]
        assert "flexpiped_parameter_cache_hits_total 10.0" in metrics
        stages = (await daemon.ask("/status"))["stages"]
        pids = [worker["pid"] for stage in stages for worker in stage["workers"]]
        name = f"flexpiped-parameters-{daemon.process.pid}-"
        assert name in sockets()
        daemon.process.kill()
        await daemon.process.wait()
        async with asyncio.timeout(30):
            while any(map(alive, pids)) or name in sockets():  # noqa: ASYNC110  other processes
                await asyncio.sleep(0.05)


def sockets() -> str:
    return Path("/proc/net/unix").read_text()
