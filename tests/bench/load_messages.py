"""What the client process is told and what it answers: one JSON object a line. Times are of the monotonic clock."""

from collections.abc import Sequence

import msgspec

Prompt = list[int] | str


class ToClient(msgspec.Struct, frozen=True, kw_only=True, tag_field="do"):
    """Base of what the client may be told."""


class Run(ToClient, frozen=True, kw_only=True, tag="run"):
    """Send all prompts at once, wait for the last token, answer with ``Load``."""

    url: str  # http://HOST:PORT
    model: str
    prompts: Sequence[Prompt]
    max_tokens: int


class Hold(ToClient, frozen=True, kw_only=True, tag="hold"):
    """Keep a stream going for each prompt, again where one ends; answer when each has seen ``warm_events``."""

    url: str
    model: str
    prompts: Sequence[Prompt]
    max_tokens: int
    warm_events: int


class Take(ToClient, frozen=True, kw_only=True, tag="take"):
    """Answer with what came since the last ``Take``."""


class Stop(ToClient, frozen=True, kw_only=True, tag="stop"):
    """Hang up all streams; answer with what came since the last ``Take``."""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """The answer. ``times_s`` has, for each stream, when each event with text came."""

    error: str = ""
    tokens: int = 0  # by the servers' own count (usage), of streams that ended
    started_s: float = 0.0
    ended_s: float = 0.0
    times_s: list[list[float]] = []
    cpu_s: float = 0.0  # of the client since it started
    restarts: int = 0


Command = Run | Hold | Take | Stop
