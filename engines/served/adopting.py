"""How the next daemon takes an engine with a server of its own that has outlived the one before.

What was under way is settled first: a move that had not been committed is rolled back, one that had is finished, and
all ranks must then hold the layers that the engine says they hold. The requests of the daemon before went with its
connections.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.found_process import FoundProcess
from engines.frames import read_frame
from engines.outliving import NotAdopted, Outliving, connected
from engines.records import EngineRecord
from engines.served import keeper_messages as k
from engines.served.channel import CallFailed, ChannelClosed, Message
from engines.served.connecting import await_ranks, first_contact
from engines.served.hosting import InKeeping
from engines.served.ranks import Ranks
from planner.layout import Pipeline

_ANSWER_S = 60.0  # from one that may have to finish a commit first, beside other work


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What is in force once nothing is under way any more.

    Attributes:
        counts: Decoders on each pipeline rank.
        epochs: Layouts that were committed since the engine's start.
        last_number: Of all handovers so far.
    """

    counts: tuple[int, ...]
    epochs: int
    last_number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptedServer:
    """An engine that serves already, with its keeper."""

    process: FoundProcess  # the keeper
    hosted: InKeeping
    memo: k.Memo
    settled: Settled
    outliving: Outliving

    @property
    def ranks(self) -> Ranks:
        return _ranks_of(self.memo)

    @property
    def pipeline(self) -> Pipeline:
        return self.ranks.pipeline_of(self.settled.counts)

    @property
    def epoch(self) -> int:
        return self.memo.epoch + self.settled.epochs

    @property
    def writer(self) -> asyncio.StreamWriter:
        """The connection to the keeper."""
        return self.hosted.writer


async def adopt(
    record: EngineRecord, process: FoundProcess, outliving: Outliving, *, deadline_s: float = _ANSWER_S
) -> AdoptedServer:
    """Connect to an engine whose keeper is held, and settle what was under way.

    Raises:
        NotAdopted: It does not answer in time, another process answers, or its ranks disagree.
    """
    try:
        async with connected(record, process, deadline_s=deadline_s) as (reader, writer):
            kept, memo = await _first_word(reader)
            settled = await settle(Path(kept.directory), memo, parameters=outliving.parameters)
    except (ChannelClosed, CallFailed) as error:
        raise NotAdopted(str(error)) from error
    hosted = InKeeping(process, reader, writer, kept)
    return AdoptedServer(process=process, hosted=hosted, memo=memo, settled=settled, outliving=outliving)


async def settle(run_directory: Path, memo: k.Memo, *, parameters: str = "") -> Settled:
    """Roll back or finish what was under way, and compare what the ranks hold. Raises: NotAdopted, as calls do.

    Layers that ranks load from here on are kept by the keeper of parameters at the address ``parameters``.
    """
    channel, info = await first_contact(run_directory, on_message=lambda _news: None, closed_by="the engine")
    try:
        if info["refactor_refusal"]:  # nothing can have moved
            return Settled(counts=memo.counts, epochs=0, last_number=0)
        core = await channel.core("settle")
    finally:
        await channel.close()
    if core["crash"]:
        raise NotAdopted(f"a move went wrong meanwhile: {core['crash']}")
    ranks = _ranks_of(memo)
    sides = await await_ranks(run_directory, count=len(memo.device_ids))
    try:
        for rank, side in sides.items():
            await side.call("settle", parameters=parameters)
            ensure_agreed(rank // ranks.tensor_parallel, await side.call("status"), layout=core["layout"])
    finally:
        for side in sides.values():
            await side.close()
    counts = tuple(core["layout"].count(rank) for rank in range(ranks.count))
    return Settled(counts=counts, epochs=core["epoch"], last_number=core["last_number"])


def ensure_agreed(stage: int, status: Message, *, layout: Sequence[int]) -> None:
    """Raises: NotAdopted: A rank of this stage holds other layers than the layout says."""
    wanted = [layer for layer, holder in enumerate(layout) if holder == stage]
    if sorted(status["layers"]) != wanted:
        raise NotAdopted(f"its ranks disagree: one of stage {stage} holds layers {status['layers']}, not {wanted}")


async def _first_word(reader: asyncio.StreamReader) -> tuple[k.Kept, k.Memo]:
    """Return what the keeper says to a daemon that comes."""
    raw = await read_frame(reader)
    report = None if raw is None else k.decode_report(raw)
    if not isinstance(report, k.Kept) or report.memo is None:
        raise NotAdopted("it has ended" if report is None else f"its keeper answers {type(report).__name__}")
    return report, report.memo


def _ranks_of(memo: k.Memo) -> Ranks:
    return Ranks(device_ids=memo.device_ids, tensor_parallel=memo.tensor_parallel)
