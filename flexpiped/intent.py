"""What should be running: engine and replicas as last asked for and not rolled back. Pure values and rules.

A refactoring that begins makes its target the intent, so that a daemon that ends in the middle of it starts with what
was asked for; however it ends otherwise, the intent is then what is in force. The configuration has the last word: an
intent stands only as long as the keys in ``BASIS`` say what they said when it came about.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from flexpiped.config_values import shown
from flexpiped.events import Event, EventKind
from flexpiped.handover_records import pipeline_to_wire
from flexpiped.settings import Settings
from flexpiped.settings_keys import KEYS, value_of
from planner.errors import InvalidLayout
from planner.layout import Pipeline, Stage

BASIS: Final = ("model", "engine", "stages", "revision", "devices.kind", "devices.cpu_count")
FRUITLESS_STARTS: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Intent:
    """``pipelines`` are those of all replicas, the main one first. ``basis`` is what the configuration said;
    ``since_unix_s`` when it came about, ``reason`` why.
    """

    engine: str
    pipelines: tuple[Pipeline, ...]
    basis: Mapping[str, str]
    reason: str
    since_unix_s: float

    @property
    def pipeline(self) -> Pipeline:
        """That of the main replica."""
        return self.pipelines[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class InForce:
    """What runs: the engine, and the pipeline of each replica by its number, the main one first."""

    engine: str
    pipelines: Mapping[int, Pipeline]


class InvalidIntent(Exception):
    """A stored intent that this version cannot read."""


def basis_of(settings: Settings) -> dict[str, str]:
    """Return what ``settings`` say of the keys that an intent rests on, in words."""
    values = {key.name: value_of(settings, key) for key in KEYS if key.name in BASIS}
    return {name: shown(getattr(value, "value", "" if value is None else value)) for name, value in values.items()}


def objection(intent: Intent, *, basis: Mapping[str, str], fruitless_starts: int) -> str:
    """Say why an intent is not to be restored; empty: nothing speaks against it.

    1. The configuration says something else than it did.
    2. The daemon has begun with it several times and was never ready.
    """
    for name, now in basis.items():
        if (before := intent.basis.get(name)) != now:
            return f"{name} was {before} and is {now} in the configuration now"
    if fruitless_starts >= FRUITLESS_STARTS:
        return f"{fruitless_starts} starts with it in a row did not get ready"
    return ""


class IntentKeeper:
    """Follows the events of one daemon and tells the intent after each.

    Args:
        in_force: What runs now, None while there is nothing.
    """

    def __init__(
        self, *, basis: Mapping[str, str], in_force: Callable[[], InForce | None], intent: Intent | None
    ) -> None:
        self._basis = basis
        self._in_force = in_force
        self.intent = intent

    def after(self, event: Event) -> Intent | None:
        """Return the intent if ``event`` changes it, else None."""
        if event.fields.get("state") == "adopted":
            return self._adopted(event)
        if event.kind is not EventKind.REFACTORING:
            return None
        match event.fields.get("state"):
            case "plan":
                return self._asked_for(event)
            case "ended":
                return self._found(event)
            case _:
                return None

    def _asked_for(self, event: Event) -> Intent | None:
        now = self._in_force()
        engine = event.fields.get("engine_after") or ("" if now is None else now.engine)
        pipelines = _after_plan({} if now is None else now.pipelines, event.fields)
        return self._set(engine, pipelines, f"asked for: {event.message.removeprefix('plan: ')}", event)

    def _found(self, event: Event) -> Intent | None:
        """However a handover ended, what is in force is what should be."""
        now = self._in_force()
        return None if now is None else self._set(now.engine, (*now.pipelines.values(),), event.message, event)

    def _adopted(self, event: Event) -> Intent | None:
        """Engines that outlived the daemon have the layouts that they say, however a change before its end went."""
        pipelines = tuple(pipeline_from_wire(each) for each in event.fields["pipelines"])
        return self._set(event.fields["engine"], pipelines, event.message, event)

    def _set(self, engine: str, pipelines: tuple[Pipeline, ...], reason: str, event: Event) -> Intent | None:
        if self.intent is not None and (self.intent.engine, self.intent.pipelines) == (engine, pipelines):
            return None
        self.intent = Intent(
            engine=engine, pipelines=pipelines, basis=self._basis, reason=reason, since_unix_s=event.time_unix_s
        )
        return self.intent


def _after_plan(now: Mapping[int, Pipeline], plan: Mapping[str, Any]) -> tuple[Pipeline, ...]:
    """Return the pipelines that there will be: replicas come or leave, or one gets another layout."""
    if (scale := plan.get("scale")) is not None:
        stay = (pipeline for number, pipeline in now.items() if number not in scale["remove"])
        return (*stay, *(pipeline_from_wire(each) for each in scale["add"]))
    changed = plan.get("on") or next(iter(now), 1)
    return (*(dict(now) | {changed: pipeline_from_wire(plan["target"])}).values(),)


def pipeline_from_wire(value: object) -> Pipeline:
    """Return the pipeline that ``pipeline_to_wire`` has written.

    Raises:
        InvalidIntent: It is something else.
    """
    try:
        return Pipeline(stages=msgspec.convert(value, tuple[Stage, ...]))
    except (msgspec.ValidationError, InvalidLayout) as error:
        raise InvalidIntent(f"not a pipeline: {error}") from error


def intent_to_wire(intent: Intent) -> dict[str, Any]:
    """Return the intent as JSON values."""
    return {
        "engine": intent.engine,
        "stages": pipeline_to_wire(intent.pipeline),
        "further_replicas": [pipeline_to_wire(each) for each in intent.pipelines[1:]],
        "basis": dict(intent.basis),
        "reason": intent.reason,
        "since_unix_s": intent.since_unix_s,
    }


class _Wire(msgspec.Struct, frozen=True):
    engine: str
    stages: list[Any]
    basis: dict[str, str]
    reason: str
    since_unix_s: float
    further_replicas: list[list[Any]] = []  # msgspec copies it; there are none in what older versions wrote


def intent_from_json(text: str) -> Intent:
    """Return the intent that ``intent_to_wire`` gave, from its JSON.

    Raises:
        InvalidIntent
    """
    try:
        wire = msgspec.json.decode(text, type=_Wire)
    except msgspec.DecodeError as error:
        raise InvalidIntent(str(error)) from error
    return Intent(
        engine=wire.engine,
        pipelines=tuple(pipeline_from_wire(each) for each in (wire.stages, *wire.further_replicas)),
        basis=wire.basis,
        reason=wire.reason,
        since_unix_s=wire.since_unix_s,
    )
