"""What is measured: a server that speaks OpenAI's API, and how it is asked."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any
from urllib.parse import urlsplit

from planner.traces import PREFIX_PIECE_TOKENS, TraceRequest

_FIRST_TOKEN, _TOKENS = 16, 224  # ids that any vocabulary has, those of special tokens at its beginning left out
_WORDS = (
    "one",
    "two",
    "red",
    "sun",
    "day",
    "old",
    "new",
    "big",
    "top",
    "sea",
    "sky",
    "far",
    "hot",
    "ice",
    "oak",
    "map",
)


class Endpoint(Enum):
    COMPLETIONS = "completions"  # prompts of random token ids, so lengths are exact
    CHAT = "chat"  # words, each about a token; the server's template comes on top


class BadTarget(Exception):
    """The URL cannot be asked; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server. ``url`` ends before ``/completions``, so normally with ``/v1``.

    Attributes:
        strict: Leave out ``ignore_eos``, which OpenAI's own servers refuse; answers may then be shorter than asked for.
        timeout_s: Of a whole request.
    """

    url: str
    model: str = ""
    endpoint: Endpoint = Endpoint.COMPLETIONS
    strict: bool = False
    timeout_s: float = 600.0
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return f"{self.url}/{'completions' if self.endpoint is Endpoint.COMPLETIONS else 'chat/completions'}"

    def body(self, request: TraceRequest, *, seed: int) -> dict[str, Any]:
        """Return the request as JSON values; the same ``seed`` gives the same prompt."""
        common: dict[str, Any] = {
            "model": self.model,
            "max_tokens": request.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if not self.strict:
            common["ignore_eos"] = True
        tokens = prompt_tokens(request, seed=seed)
        if self.endpoint is Endpoint.COMPLETIONS:
            return common | {"prompt": tokens}
        words = " ".join(_WORDS[token % len(_WORDS)] for token in tokens)
        return common | {"messages": [{"role": "user", "content": words}]}


def parse_url(text: str) -> str:
    """Return the base URL without a slash at its end; a host alone gets ``/v1``. Raises: BadTarget."""
    try:
        parts = urlsplit(text)
        port_is_read = parts.port is None or parts.port > 0
    except ValueError as error:
        raise BadTarget(f"{text}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_read:
        raise BadTarget(f"{text}: a URL such as http://127.0.0.1:8100/v1 is meant")
    if parts.query or parts.fragment:
        raise BadTarget(f"{text}: without query or fragment")
    base = text.rstrip("/")
    return base if parts.path.rstrip("/") else f"{base}/v1"


def prompt_tokens(request: TraceRequest, *, seed: int) -> list[int]:
    """Return token ids: pieces with the same prefix id are alike over all requests, the rest is this one's own."""
    tokens: list[int] = []
    for piece in request.prefix_ids:
        tokens += _tokens(f"piece {piece}", min(PREFIX_PIECE_TOKENS, request.prompt_tokens - len(tokens)))
    return tokens + _tokens(f"request {seed}", request.prompt_tokens - len(tokens))


def _tokens(seed: str, count: int) -> list[int]:
    draw = random.Random(seed)
    return [_FIRST_TOKEN + draw.randrange(_TOKENS) for _ in range(count)]
