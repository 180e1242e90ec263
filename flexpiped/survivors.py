"""Engines that outlive the daemon (``engines.survive_restart``): where they are noted, found again, adopted or ended.

A daemon that starts looks at every record of the daemon before it on this admin socket: an engine whose process is
provably its own, that answers and that is what the configuration asks for is adopted; any other one of its own is
ended; what is not provably its own is left alone. Each comes with a reason, in the log and in the journal.
"""

import hashlib
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

import flexpiped
from engines.errors import UnsupportedByEngine
from engines.found_process import FoundProcess
from engines.launching import OwnPlace
from engines.native import adopting as native
from engines.native.adopting import AdoptedCore
from engines.outliving import NotAdopted, Outliving, at
from engines.protocol import Engine
from engines.records import (
    EngineRecord,
    InvalidRecord,
    Purpose,
    against_ownership,
    against_purpose,
    facts_of,
    read_record,
)
from engines.served import adopting as served
from engines.served.adopting import AdoptedServer
from flexpiped import log_events
from flexpiped.handover_records import layouts_in_words
from flexpiped.intent import basis_of
from flexpiped.settings import EngineKind, Settings
from planner.layout import Pipeline

LAUNCHER: Final = Path("/run/flexpiped-engine.sock")
_END_GRACE_S: Final = 10.0  # an engine with a server of its own has several processes to end
Adopted = AdoptedCore | AdoptedServer


@runtime_checkable
class Adoptable(Protocol):
    """What an engine offers besides where it may have been there before the daemon."""

    @property
    def is_adopted(self) -> bool: ...


def was_there_before(engine: Engine) -> bool:
    """Whether an engine's processes are older than the daemon, so that it does not start."""
    return isinstance(engine, Adoptable) and engine.is_adopted


def purpose_of(settings: Settings, *, directory: Path, options: str, protocol: str) -> Purpose:
    """Return what an engine is for. Looks at the names, sizes and times of the model's files.

    Args:
        options: Digest of what it is told.
        protocol: Digest of how one speaks with it.
    """
    files = sorted(each for each in directory.iterdir() if each.is_file())
    facts = [f"{each.name} {each.stat().st_size} {each.stat().st_mtime_ns}" for each in files]
    return Purpose(
        engine=settings.engine.value,
        model=str(directory),
        files=hashlib.sha256("\n".join(facts).encode()).hexdigest(),
        options=options,
        protocol=protocol,
        basis=basis_of(settings),
    )


def refuse_what_cannot_survive(settings: Settings) -> None:
    """Raise ``UnsupportedByEngine`` where the engine that is configured cannot outlive the daemon."""
    if settings.engines.survive_restart and settings.engine is EngineKind.FAKE:
        raise UnsupportedByEngine(
            f"engines.survive_restart is not for engine {settings.engine.value!r}, which has no processes of its own"
        )


@dataclass(frozen=True, slots=True)
class _Found:
    """An engine that is adopted, until a replica takes it."""

    engine: Adopted
    pipeline: Pipeline


class Survivors:
    """The engines of one model of the daemon at an admin socket. Used on one event loop.

    Args:
        name: Under which clients ask for the model.
        served: Of all models that the daemon serves: engines of others are ended, too.
        may_stay: Whether it is the daemon that ends, and not this model alone, and its engines are not to end with it.
        admin_socket: It names the daemon; sockets of engines are beside it.
        state_folder: Records are in a folder of it.
        on_news: Told what becomes of each engine that is found, one sentence each.
        parameters: Address of the keeper of parameters, to which those that are adopted turn; empty: there is none.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        name: str,
        served: Callable[[], frozenset[str]],
        may_stay: Callable[[], bool],
        admin_socket: Path,
        state_folder: Path,
        environment: Mapping[str, str],
        on_news: Callable[[str], object],
        parameters: str = "",
    ) -> None:
        self._parameters = parameters
        self._settings = settings
        self._name, self._served = name, served
        self._runs = state_folder / "run"
        self._records = state_folder / "engines" / hashlib.sha256(str(admin_socket).encode()).hexdigest()[:12]
        self._sockets = admin_socket.parent / f"{admin_socket.stem}-engines"
        self._is_service = "RUNTIME_DIRECTORY" in environment
        self._on_news = on_news
        self._found: list[_Found] = []
        self._is_leaving = False
        self._may_stay = may_stay

    # --- as the daemon ends ---

    def leave(self) -> None:
        """From now on an engine that is closed stays, for the next daemon, if it may."""
        self._is_leaving = self._settings.engines.survive_restart and self._may_stay()

    # --- as it starts ---

    async def find(self, wanted: Purpose | None) -> tuple[Pipeline, ...]:
        """Adopt the engines that are what is wanted, and end the others. None: none is wanted.

        Returns:
            The pipelines of the adopted ones, the oldest first; ``outliving_of`` hands them out.
        """
        for file in sorted(self._records.glob("*.json"), key=lambda each: each.stat().st_mtime_ns):
            against, pid = await self._look_at(file, wanted)
            if against:
                log_events.engine_not_adopted(pid=pid, reason=against)
                self._on_news(f"an engine of before was not adopted: {against}")
        return tuple(each.pipeline for each in self._found)

    async def _look_at(self, file: Path, wanted: Purpose | None) -> tuple[str, int]:
        """Adopt what a record tells of, or say why not, and of which process it tells."""
        try:
            record = read_record(file)
        except (InvalidRecord, OSError) as error:
            _remove(file)
            return str(error), 0
        if record.name != self._name and record.name in self._served():
            return "", record.pid  # that model looks after it
        against = against_ownership(record, facts_of(record.pid), uid=os.geteuid())
        process = None if against else FoundProcess.hold(record.pid, start=record.start)
        if process is None:
            self._forget(file, record)
            return against or f"process {record.pid} has ended", record.pid
        against = await self._adopt(file, record, process, wanted)
        if against:
            await process.end(grace_s=_END_GRACE_S)
            process.let_go()
            self._forget(file, record)
            return f"{against}; process {record.pid} was ended", record.pid
        return "", record.pid

    async def _adopt(self, file: Path, record: EngineRecord, process: FoundProcess, wanted: Purpose | None) -> str:
        if wanted is None:
            return "the configuration asks for none that outlives the daemon (engines.survive_restart)"
        if record.name != self._name:
            return f"{record.name} is not served any more"
        if against := against_purpose(record, wanted):
            return against
        outliving = at(self._outliving(record.purpose), record=file, socket_path=Path(record.socket))
        adopt = native.adopt if record.purpose.engine == EngineKind.NATIVE.value else served.adopt
        try:
            engine: Adopted = await adopt(record, process, outliving)
        except NotAdopted as error:
            return str(error)
        self._found.append(_Found(engine, engine.pipeline))
        stages, epoch = engine.pipeline.granularity, engine.epoch
        log_events.engine_adopted(pid=record.pid, stages=stages, epoch=epoch, version=record.flexpiped)
        self._on_news(f"engine adopted: process {record.pid}, {stages} stages, epoch {epoch}; nothing was loaded")
        return ""

    async def end_others(self, keep: Sequence[Pipeline] = ()) -> None:
        """End adopted engines that no replica has taken, but for those with these pipelines."""
        left = list(keep)
        for each in tuple(self._found):
            if each.pipeline in left:
                left.remove(each.pipeline)
                continue
            self._found.remove(each)
            self._on_news(f"process {each.engine.process.pid} was ended: no replica is left for it")
            each.engine.writer.close()
            await each.engine.process.end(grace_s=_END_GRACE_S)
            each.engine.process.let_go()
            each.engine.outliving.forget()

    def let_go(self) -> None:
        """Leave adopted engines that no replica has taken to the next daemon."""
        for each in self._found:
            each.engine.writer.close()
            each.engine.process.let_go()
        self._found.clear()

    # --- for whoever makes engines ---

    def outliving_of(self, purpose: Purpose, pipeline: Pipeline) -> Outliving | Adopted | None:
        """Return the adopted engine that has this pipeline, else how a new one may outlive the daemon; None: not."""
        for each in self._found:
            if each.pipeline == pipeline and each.engine.outliving.purpose.engine == purpose.engine:
                self._found.remove(each)
                return each.engine
        return self._outliving(purpose) if self._settings.engines.survive_restart else None

    def _outliving(self, purpose: Purpose) -> Outliving:
        name, launcher = uuid.uuid4().hex[:12], self._launcher()
        return Outliving(
            purpose=purpose,
            name=self._name,
            place=OwnPlace(
                socket=self._sockets / f"{name}.sock",
                log=self._sockets / f"{name}.log",
                launcher=launcher,
                # Units have temporary files of their own.
                runs=None if launcher is None else self._runs,
            ),
            record=self._records / f"{name}.json",
            adopt_within_s=self._settings.engines.adopt_within_s,
            flexpiped=flexpiped.__version__,
            leaving=lambda: self._is_leaving,
            parameters=self._parameters,
        )

    def _launcher(self) -> Path | None:
        """Return where systemd starts engines, where the daemon is a service of it; one without ends all of them."""
        if not self._is_service:
            return None
        if LAUNCHER.is_socket():
            return LAUNCHER
        log_events.engines_end_with_unit(missing=str(LAUNCHER))
        self._on_news(f"engines end with the service: there is no {LAUNCHER} (flexpiped-engine.socket)")
        return None

    def _forget(self, file: Path, record: EngineRecord) -> None:
        _remove(file)
        own = Path(record.socket)
        if own.parent == self._sockets:
            _remove(own)
            _remove(own.with_suffix(".log"))


def chosen(found: Sequence[Pipeline], wanted: Sequence[Pipeline]) -> tuple[Pipeline, ...]:
    """Return which pipelines to go on with, the main one first: those of engines found, in the places of those wanted.

    1. Where an engine has the very pipeline that a replica is to have, it is that replica. 2. One whose change was
    broken off has another: the oldest ones left take the places left. 3. Places without an engine get a new one, where
    their devices are free. Engines without a place are not among them. The main one is one that was found.
    """
    left, places = list(found), list(wanted)
    taken: dict[int, Pipeline] = {}
    for index, pipeline in enumerate(places):  # 1
        if pipeline in left:
            left.remove(pipeline)
            taken[index] = pipeline
    for index in range(len(places)):  # 2
        if index not in taken and left:
            taken[index] = left.pop(0)
    back = [taken[index] for index in sorted(taken)]
    for index, pipeline in enumerate(places):  # 3
        held = {device for each in back for device in each.device_ids}
        if index not in taken and not held & set(pipeline.device_ids):
            back.append(pipeline)
    return tuple(back)


def found_in_words(found: Sequence[Pipeline], wanted: Sequence[Pipeline] | None) -> str:
    """Return what runs on, and what became of a change that the daemon's end broke off."""
    has = layouts_in_words([each.granularity for each in found])
    if wanted is None or tuple(found) == tuple(wanted):
        return f"went on with the engines of before: {has}"
    asked = layouts_in_words([each.granularity for each in wanted])
    return f"went on with the engines of before: {has}; a change to {asked} was broken off by the daemon's end"


def _remove(file: Path) -> None:
    with suppress(OSError):
        file.unlink()
