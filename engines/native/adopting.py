"""How the next daemon takes a native engine that has outlived the one before."""

import asyncio
from dataclasses import dataclass

from engines.found_process import FoundProcess
from engines.frames import read_frame, write_frame
from engines.native import client_messages as c
from engines.outliving import NotAdopted, Outliving, connected
from engines.records import EngineRecord
from planner.layout import Pipeline

_ANSWER_S = 10.0  # from an engine that has nothing else to do but to end what was under way


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptedCore:
    """A core that serves already and has said what it is."""

    process: FoundProcess
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    report: c.Adopted
    outliving: Outliving

    @property
    def pipeline(self) -> Pipeline:
        return self.report.pipeline

    @property
    def epoch(self) -> int:
        return self.report.epoch


async def adopt(
    record: EngineRecord, process: FoundProcess, outliving: Outliving, *, deadline_s: float = _ANSWER_S
) -> AdoptedCore:
    """Connect to a core whose process is held, and have it say what it is.

    Raises:
        NotAdopted: It does not answer in time, another process answers, or it was started with other options.
    """
    async with connected(record, process, deadline_s=deadline_s) as (reader, writer):
        write_frame(writer, c.encode(c.AdoptCore(parameters=outliving.parameters)))
        raw = await read_frame(reader)
        report = None if raw is None else c.decode_report(raw)
        if not isinstance(report, c.Adopted):
            raise NotAdopted("it has ended" if report is None else f"it answers {type(report).__name__}")
        if c.options_digest(report.options) != record.purpose.options:
            raise NotAdopted("it says that it was started with other options")
    return AdoptedCore(process=process, reader=reader, writer=writer, report=report, outliving=outliving)
