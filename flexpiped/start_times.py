"""Measures how long engines take to start, keeps it beside the profiles, and says what the next start will take."""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from engines.protocol import Engine
from flexpiped import log_events
from flexpiped.profiles import cpu_name, model_digest
from planner.model_graph import ModelGraph
from planner.start_times import ExpectedStart, Origin, StartRecord, expected_start, remembered
from topology import page_cache
from topology.state_files import replace_file

_FOLDER: Final = "starts"
_FORMAT: Final = 2  # of the records: those of another one are measured again
_MOST: Final = 0.5  # from this share on, parameters count as being there

CachedShare = Callable[[Sequence[Path]], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class StartTimes:
    """Those of one model with one engine on this host. Every method blocks.

    Attributes:
        file: Where they are kept.
        weights: The files that an engine reads.
        kept_share: Of the parameters that are held for the engine.
    """

    file: Path
    weights: tuple[Path, ...]
    cached_share: CachedShare = page_cache.cached_share
    kept_share: Callable[[], float] = lambda: 0.0

    @property
    def origin(self) -> Origin:
        """Where an engine would have most of the parameters from now."""
        if self.kept_share() >= _MOST:
            return Origin.KEPT
        return Origin.PAGE_CACHE if self.cached_share(self.weights) >= _MOST else Origin.STORAGE

    @property
    def records(self) -> tuple[StartRecord, ...]:
        """What is kept, oldest first; nothing where it cannot be read."""
        try:
            return msgspec.json.decode(self.file.read_bytes(), type=tuple[StartRecord, ...])
        except (OSError, msgspec.DecodeError):  # the next start is measured again
            return ()

    def expected(self, num_stages: int) -> ExpectedStart | None:
        """Return what a new replica would take now until it serves, tried out; None: no start was measured."""
        return expected_start(self.records, num_stages=num_stages, origin=self.origin)

    def note(self, record: StartRecord) -> None:
        """Keep one more. Where it cannot be kept the log says so, and the engine serves."""
        try:
            replace_file(self.file, msgspec.json.encode(remembered(self.records, record)).decode() + "\n")
        except OSError as error:
            log_events.start_time_not_kept(reason=f"{self.file}: {error.strerror}")


def start_times_of(
    graph: ModelGraph,
    directory: Path,
    *,
    engine: str,
    state_folder: Path,
    device_name: str | None = None,
    kept_share: Callable[[], float] = lambda: 0.0,
) -> StartTimes:
    """Return those of a model in ``directory``, kept in ``state_folder``; another processor has others."""
    processor = cpu_name() if device_name is None else device_name
    of = hashlib.sha256(
        json.dumps([_FORMAT, model_digest(graph), graph.dtype, engine, processor]).encode()
    ).hexdigest()[:16]
    return StartTimes(
        file=state_folder / _FOLDER / f"{engine}-{of}.json",
        weights=tuple(sorted(directory.glob("*.safetensors"))),
        kept_share=kept_share,
    )


class StartMeter:
    """Measures starts. Used on one event loop.

    Args:
        starts: Those of an engine by its name; called in a thread, after the engine has started.
        origins: Where each engine has the parameters from now, by its name; called in a thread, before one starts.
    """

    def __init__(
        self,
        *,
        starts: Callable[[str], StartTimes],
        origins: Callable[[], Mapping[str, Origin]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._starts = starts
        self._origins = origins
        self._clock = clock

    @asynccontextmanager
    async def __call__(self, engine: Engine) -> AsyncIterator[Callable[[], None]]:
        """Note how long the scope takes, in which ``engine`` starts; one that fails is not noted.

        What is yielded is called when it has started and is tried out: that is measured apart.
        """
        origins = await asyncio.to_thread(self._origins)
        began_s = self._clock()
        started_s: list[float] = []
        yield lambda: started_s.append(self._clock())
        ended_s = self._clock()
        ready_s = started_s[0] if started_s else ended_s
        name = engine.capabilities.name
        record = StartRecord(
            num_stages=engine.pipeline.granularity,
            origin=origins[name],
            took_s=ready_s - began_s,
            trial_s=ended_s - ready_s if started_s else None,
        )
        await asyncio.to_thread(self._note, name, record)

    def _note(self, name: str, record: StartRecord) -> None:
        self._starts(name).note(record)
