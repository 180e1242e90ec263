"""Which requests are the daemon's to generate, and which go to the engine's own server as they are. Pure.

Ours are carried over token-exactly when the engine dies or another takes over; the others end where their engine does.
"""

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from engines.offers import OwnServer
from engines.protocol import EngineCapabilities
from flexpiped.api.errors import ApiError
from flexpiped.api.fields import Body, refuse_unknown
from flexpiped.api.own_bodies import refuse_lost
from flexpiped.api.parameters import (
    CHAT_NAMES,
    COMPLETION_NAMES,
    ChatRequest,
    CompletionRequest,
    ensure_generates,
    parse_chat,
    parse_completion,
    taken_here,
)
from flexpiped.api.unsupported import CHAT_NEUTRAL, COMPLETION_NEUTRAL, NeutralValues, refuse_unsupported

_NOT_OURS = ("unsupported_parameter", "unsupported_value")
T = TypeVar("T", CompletionRequest, ChatRequest)


@dataclass(frozen=True, slots=True)
class ToEngine:
    """The request is the engine's. ``because`` names what only its own server does."""

    because: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Intake(Generic[T]):
    """What our pipeline takes at one path."""

    parse: Callable[..., T]
    names: Set[str]
    neutral: NeutralValues
    own_names: Callable[[OwnServer], frozenset[str]]
    is_chat: bool


COMPLETIONS = Intake(
    parse=parse_completion,
    names=COMPLETION_NAMES,
    neutral=COMPLETION_NEUTRAL,
    own_names=lambda own: own.completion_parameters,
    is_chat=False,
)
CHAT = Intake(
    parse=parse_chat,
    names=CHAT_NAMES,
    neutral=CHAT_NEUTRAL,
    own_names=lambda own: own.chat_parameters,
    is_chat=True,
)


def route(
    intake: Intake[T],
    body: Body,
    *,
    served: str,
    capabilities: EngineCapabilities | None,
    calls_tools: bool = False,
) -> T | ToEngine:
    """Return the request as our pipeline takes it, or that it is the engine's.

    0. The model does not generate with this engine: refused.
    1. The engine has no server of its own: ours, or refused.
    2. A name that neither of us knows, or a value that neither honours: refused, for the server would ignore it.
    3. Something that only the server knows (see ``_only_there``): the engine's.
    4. Our parser says that it does not support a parameter or a value: the engine's. What is plainly wrong is refused.
    5. Else ours. What becomes the engine's must be of names that its server knows.

    Args:
        calls_tools: It is known how the model calls tools.

    Raises:
        ApiError: 400, with the parameter named; 404 where the model does not generate.
    """
    if capabilities is not None:
        ensure_generates(capabilities, model=served)
    taken = taken_here(capabilities, calls_tools=calls_tools)
    own = None if capabilities is None else capabilities.own_server
    if own is None:
        return intake.parse(body, taken=taken)
    own_names = intake.own_names(own)
    refuse_unknown(body, intake.names | own_names)
    refuse_unsupported(body, intake.neutral, taken=own_names)
    because = _only_there(intake, body, served=served, own=own)
    if not because:
        try:
            ours = {name: value for name, value in body.items() if name in intake.names}
            return intake.parse(ours, taken=taken)
        except ApiError as refusal:
            if refusal.code not in _NOT_OURS:
                raise
            because = refusal.param or ""
    refuse_lost(body, names=own_names, neutral=intake.neutral, because=because)
    return ToEngine(because)


def _only_there(intake: Intake[Any], body: Body, *, served: str, own: OwnServer) -> str:
    """Name what makes a request the engine's before it is parsed; empty: nothing does."""
    if intake.is_chat and own.every_chat:
        return own.every_chat
    if isinstance(body.get("model"), str) and body["model"] != served:
        return "model"  # an adapter that the engine has loaded; else the server says that there is no such model
    if body.get("min_tokens") and body.get("stop"):
        return "min_tokens"  # holds back stop strings, too, which the engine does not see from us
    return next((name for name, value in body.items() if name not in intake.names and value is not None), "")
