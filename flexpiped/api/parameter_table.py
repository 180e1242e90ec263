"""Every documented parameter of completions and chat: who honours it, how it is read, which values have no effect.

It is made of the tables that validate requests, and ``/openapi.json`` is made of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from flexpiped.api.engine_parameters import ENGINE_PARAMETERS
from flexpiped.api.fields import Reader
from flexpiped.api.parameters import CHAT_READERS, COMPLETION_READERS
from flexpiped.api.unsupported import CHAT_NEUTRAL, COMPLETION_NEUTRAL, NeutralValues


class HonouredBy(Enum):
    """Who honours a parameter; where that one is missing, the parameter is refused by name."""

    DAEMON = "daemon"  # with every engine
    ENGINE = "engine"  # passed on with the tokens to engines that take sampling parameters of their own
    OWN_SERVER = "own server"  # the whole request goes to the engine's own server


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """``reader`` is there where the daemon reads the value. Null and ``neutral`` values are taken by all."""

    by: HonouredBy
    reader: Reader[Any] | None = None
    neutral: tuple[Any, ...] = ()


def _table(readers: Mapping[str, Reader[Any]], neutral: NeutralValues) -> Mapping[str, Parameter]:
    ours = {name: Parameter(by=HonouredBy.DAEMON, reader=reader) for name, reader in readers.items()}
    others = {
        name: Parameter(
            by=HonouredBy.ENGINE if name in ENGINE_PARAMETERS else HonouredBy.OWN_SERVER,
            reader=ENGINE_PARAMETERS.get(name),
            neutral=values,
        )
        for name, values in neutral.items()
    }
    return {**ours, **others}


COMPLETION_PARAMETERS: Final = _table(COMPLETION_READERS, COMPLETION_NEUTRAL)
CHAT_PARAMETERS: Final = _table(CHAT_READERS, CHAT_NEUTRAL)
