"""Parameters stay with the keeper when their stages leave, within the budget, and go with it."""

import asyncio
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from engines.native.layer_memory import fill, mapped
from engines.parameters.client import ParameterClient
from engines.parameters.keeper import ParameterKeeper
from engines.parameters.pinned import NotPinned, PinnedRanges
from tests.support.until import until
from topology.units import KIB, MIB

pytestmark = pytest.mark.real_loop

T = TypeVar("T")
LAYER_BYTES = 64 + 256 * KIB  # with its header; one page more is not counted


@pytest.fixture
async def keeper() -> AsyncIterator[ParameterKeeper]:
    keeper = ParameterKeeper(MIB)
    async with keeper.serving():
        yield keeper


@pytest.fixture
def client(keeper: ParameterKeeper) -> Iterator[ParameterClient]:
    client = ParameterClient(keeper.address)
    yield client
    client.close()


async def asked(question: Callable[[], T]) -> T:
    return await asyncio.to_thread(question)


def some(name: str, value: float = 1.0) -> int:
    return fill(name, {"w": torch.full((64, 1024), value, dtype=torch.bfloat16)}, dtype=torch.float32)


async def keep(client: ParameterClient, name: str, value: float = 1.0) -> bool:
    """As a stage does it: fill, offer, close."""
    descriptor = some(name, value)
    try:
        return await asked(lambda: client.keep(name, name=name, descriptor=descriptor))
    finally:
        os.close(descriptor)


async def take(client: ParameterClient, name: str) -> float | None:
    """Return the first value of a layer, None where it is not kept."""
    descriptor = await asked(lambda: client.take(name))
    if descriptor is None:
        return None
    try:
        return float(mapped(descriptor)["w"][0, 0])
    finally:
        os.close(descriptor)


async def test_what_one_stage_has_made_the_next_one_finds_also_when_the_first_has_ended(
    keeper: ParameterKeeper, client: ParameterClient
) -> None:
    first, second = ParameterClient(keeper.address), ParameterClient(keeper.address)
    assert await take(first, "0") is None
    assert await keep(first, "0", 3.0)
    assert await take(second, "0") == 3.0
    assert keeper.figures.idle_layers == 0
    first.close()
    second.close()
    await until(lambda: keeper.figures.idle_layers == 1)  # a process that dies closes its connection, too
    assert await take(client, "0") == 3.0
    figures = keeper.figures
    assert (figures.hits_total, figures.misses_total, figures.layers) == (2, 1, 1)
    assert LAYER_BYTES <= figures.held_bytes <= LAYER_BYTES + 4 * KIB


async def test_idle_layers_make_room_longest_idle_first_and_those_in_use_stay(
    keeper: ParameterKeeper, client: ParameterClient
) -> None:
    assert [await keep(client, name) for name in ("a", "b", "c")] == [True] * 3
    assert not await keep(client, "d")  # 1 MiB holds three
    assert "used up" in keeper.figures.refusal
    client.left("b")
    client.left("a")
    assert await keep(client, "d")
    assert [await take(client, name) for name in ("a", "b", "c", "d")] == [1.0, None, 1.0, 1.0]
    assert keeper.figures.held_bytes <= keeper.budget_bytes
    assert (keeper.figures.given_up_total, keeper.figures.refused_total) == (1, 1)


async def test_memory_is_given_up_when_others_want_it_but_not_that_of_stages(
    keeper: ParameterKeeper, client: ParameterClient
) -> None:
    assert await keep(client, "a")
    assert await keep(client, "b")
    client.left("a")
    await until(lambda: keeper.figures.idle_layers == 1)
    held = keeper.figures.held_bytes
    assert await keeper.give_up(1) == held // 2
    assert await keeper.give_up(10 * MIB) == 0
    assert [await take(client, name) for name in ("a", "b")] == [None, 1.0]


async def test_pieces_of_files_stay_in_memory_as_they_are(
    keeper: ParameterKeeper, client: ParameterClient, tmp_path: Path
) -> None:
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(300 * KIB))
    before = locked_bytes()
    ranges = [(str(file), 5, 100 * KIB), (str(file), 200 * KIB, 300 * KIB)]
    assert await asked(lambda: client.hold("f", name="0", ranges=ranges))
    await until(lambda: locked_bytes() - before >= 200 * KIB)
    assert await asked(lambda: client.hold("f", name="0", ranges=ranges))
    assert (keeper.figures.hits_total, keeper.figures.misses_total) == (1, 1)
    client.left("f")
    client.left("f")
    await until(lambda: keeper.figures.idle_layers == 1)
    assert await keeper.give_up(1) == 200 * KIB - 5
    assert locked_bytes() == before


def locked_bytes() -> int:
    [found] = re.findall(r"^VmLck:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found) * KIB


async def test_a_file_that_cannot_be_pinned_is_not_counted_as_kept(
    keeper: ParameterKeeper, client: ParameterClient, tmp_path: Path
) -> None:
    await asked(lambda: client.hold("f", name="3", ranges=[(str(tmp_path / "gone"), 0, 4096)]))
    await until(lambda: keeper.figures.layers == 0)
    assert keeper.figures.refusal.startswith("3: ")
    assert keeper.figures.refused_total == 1


_LIMITED = """
import os, resource, sys
from engines.parameters.pinned import NotPinned, PinnedRanges
resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 4096))
descriptor = os.open(sys.argv[1], os.O_RDONLY)
if os.getuid() == 0:
    os.setresuid(65534, 65534, 65534)  # no limit holds for root
try:
    PinnedRanges([(f"/proc/self/fd/{descriptor}", 0, 65536)])
except NotPinned as error:
    print(error)
"""


def test_a_limit_on_locked_memory_is_named() -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(64 * KIB))
        file.flush()
        Path(file.name).chmod(0o644)
        command = [sys.executable, "-c", _LIMITED, file.name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "LimitMEMLOCK" in done.stdout


def open_descriptors() -> set[Path]:
    return set(Path("/proc/self/fd").iterdir())


async def test_the_end_of_the_keeper_leaves_nothing_and_stages_go_on_without_it() -> None:
    keeper = ParameterKeeper(MIB)
    client = ParameterClient(keeper.address)
    before = open_descriptors()
    async with keeper.serving():
        assert await keep(client, "0")
    assert keeper.figures.held_bytes == 0
    assert await take(client, "0") is None
    assert not client.is_there
    client.left("0")
    client.close()
    assert open_descriptors() <= before


async def test_with_no_budget_there_is_no_keeper_to_ask() -> None:
    keeper = ParameterKeeper(0)
    async with keeper.serving():
        assert keeper.address == ""
        assert not ParameterClient(keeper.address).is_there


async def test_who_does_not_speak_its_language_is_hung_up_on(keeper: ParameterKeeper, client: ParameterClient) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(stranger, f"\0{keeper.address}")
        await loop.sock_sendall(stranger, b"GET / HTTP/1.1")
        assert await loop.sock_recv(stranger, 10) == b""
    assert await keep(client, "0")


def test_what_is_pinned_is_let_go_when_a_later_piece_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(64 * KIB))
    before = locked_bytes()
    with pytest.raises(NotPinned, match="gone"):
        PinnedRanges([(str(tmp_path / "file"), 0, 64 * KIB), (str(tmp_path / "gone"), 0, 1)])
    assert locked_bytes() == before
