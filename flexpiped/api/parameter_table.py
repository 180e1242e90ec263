"""Every documented parameter of completions and chat: who honours it, how it is read, which values have no effect.

It is made of the tables that validate requests, and ``/openapi.json`` is made of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from flexpiped.api import chat_options, structured, tools
from flexpiped.api.choices import CHAT_CHOICES, COMPLETION_CHOICES
from flexpiped.api.engine_parameters import ENGINE_PARAMETERS
from flexpiped.api.fields import Reader
from flexpiped.api.parameters import CHAT_READERS, COMPLETION_READERS
from flexpiped.api.unsupported import CHAT_NEUTRAL, COMPLETION_NEUTRAL, NeutralValues


class HonouredBy(Enum):
    """Who honours a parameter; where that one is missing, the parameter is refused by name."""

    DAEMON = "daemon"  # with every engine
    ENGINE = "engine"  # passed on with the tokens to engines that take sampling parameters of their own
    OWN_SERVER = "own server"  # the whole request goes to the engine's own server
    OWN_SERVER_OR_DAEMON = "own server, else daemon"  # that where the engine has one, else the daemon if the engine can


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """``reader`` is there where the daemon reads the value. Null and ``neutral`` values are taken by all."""

    by: HonouredBy
    reader: Reader[Any] | None = None
    neutral: tuple[Any, ...] = ()


def _table(
    readers: Mapping[str, Reader[Any]], choices: Mapping[str, Reader[Any]], neutral: NeutralValues
) -> Mapping[str, Parameter]:
    ours = {name: Parameter(by=HonouredBy.DAEMON, reader=reader) for name, reader in readers.items()}
    return {**ours, **{name: _other(name, choices, values) for name, values in neutral.items()}}


def _other(name: str, choices: Mapping[str, Reader[Any]], neutral: tuple[Any, ...]) -> Parameter:
    reader = (
        choices.get(name) or structured.READERS.get(name) or tools.READERS.get(name) or chat_options.READERS.get(name)
    )
    if reader is not None:
        return Parameter(by=HonouredBy.OWN_SERVER_OR_DAEMON, reader=reader, neutral=neutral)
    if name in ENGINE_PARAMETERS:
        return Parameter(by=HonouredBy.ENGINE, reader=ENGINE_PARAMETERS[name], neutral=neutral)
    return Parameter(by=HonouredBy.OWN_SERVER, neutral=neutral)


COMPLETION_PARAMETERS: Final = _table(COMPLETION_READERS, COMPLETION_CHOICES, COMPLETION_NEUTRAL)
CHAT_PARAMETERS: Final = _table(CHAT_READERS, CHAT_CHOICES, CHAT_NEUTRAL)
