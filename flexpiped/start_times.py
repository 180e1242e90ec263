"""Measures how long engines take to start, keeps it beside the profiles, and says what the next start will take."""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from engines.protocol import Engine
from flexpiped import log_events
from flexpiped.profiles import cpu_name, model_digest
from planner.model_graph import ModelGraph
from planner.start_times import StartRecord, expected_start_s, remembered
from topology import page_cache
from topology.state_files import replace_file

_FOLDER: Final = "starts"
_WARM_SHARE: Final = 0.5  # of the weight files in memory: from there on a start counts as a warm one

CachedShare = Callable[[Sequence[Path]], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class StartTimes:
    """Those of one model with one engine on this host. Every method blocks.

    Attributes:
        file: Where they are kept.
        weights: The files that an engine reads.
    """

    file: Path
    weights: tuple[Path, ...]
    cached_share: CachedShare = page_cache.cached_share

    @property
    def is_warm(self) -> bool:
        """Whether the parameters are in the memory of the host now."""
        return self.cached_share(self.weights) >= _WARM_SHARE

    @property
    def records(self) -> tuple[StartRecord, ...]:
        """What is kept, oldest first; nothing where it cannot be read."""
        try:
            return msgspec.json.decode(self.file.read_bytes(), type=tuple[StartRecord, ...])
        except (OSError, msgspec.DecodeError):  # the next start is measured again
            return ()

    def expected_s(self, num_stages: int) -> float | None:
        """Return what a start would take now; where none was as warm, what others took. None: none was measured."""
        records, is_warm = self.records, self.is_warm
        found = expected_start_s(records, num_stages=num_stages, is_warm=is_warm)
        return found if found is not None else expected_start_s(records, num_stages=num_stages, is_warm=not is_warm)

    def note(self, record: StartRecord) -> None:
        """Keep one more. Where it cannot be kept the log says so, and the engine serves."""
        try:
            replace_file(self.file, msgspec.json.encode(remembered(self.records, record)).decode() + "\n")
        except OSError as error:
            log_events.start_time_not_kept(reason=f"{self.file}: {error.strerror}")


def start_times_of(
    graph: ModelGraph, directory: Path, *, engine: str, state_folder: Path, device_name: str | None = None
) -> StartTimes:
    """Return those of a model in ``directory``, kept in ``state_folder``; another processor has others."""
    processor = cpu_name() if device_name is None else device_name
    of = hashlib.sha256(json.dumps([model_digest(graph), graph.dtype, engine, processor]).encode()).hexdigest()[:16]
    return StartTimes(
        file=state_folder / _FOLDER / f"{engine}-{of}.json", weights=tuple(sorted(directory.glob("*.safetensors")))
    )


class StartMeter:
    """Measures starts. Used on one event loop.

    Args:
        starts: Those of an engine by its name; called in a thread, after the engine has started.
        is_warm: Whether the parameters are in the memory of the host now; called in a thread, too.
    """

    def __init__(
        self,
        *,
        starts: Callable[[str], StartTimes],
        is_warm: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._starts = starts
        self._is_warm = is_warm
        self._clock = clock

    @asynccontextmanager
    async def __call__(self, engine: Engine) -> AsyncIterator[None]:
        """Note how long the scope takes, in which ``engine`` starts; a start that fails is not noted."""
        is_warm = await asyncio.to_thread(self._is_warm)
        began_s = self._clock()
        yield
        took_s = self._clock() - began_s
        record = StartRecord(num_stages=engine.pipeline.granularity, is_warm=is_warm, took_s=took_s)
        await asyncio.to_thread(self._note, engine.capabilities.name, record)

    def _note(self, name: str, record: StartRecord) -> None:
        self._starts(name).note(record)
