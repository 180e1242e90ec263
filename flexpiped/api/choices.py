"""How many answers a request wants and what it wants to know of their tokens: read and checked.

What is taken depends on the engine (``parameters.taken_here``); names that are not taken never come here.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, Final

from flexpiped.api.errors import invalid
from flexpiped.api.fields import Body, Reader, boolean, integer

MAX_CHOICES: Final = 128  # as OpenAI's
MAX_TOP_LOGPROBS: Final = 20  # OpenAI's of chats, vLLM's of both
CHOICES: Final = frozenset({"n", "best_of", "echo"})
LOGPROBS: Final = frozenset({"logprobs", "top_logprobs", "prompt_logprobs"})
_COUNT: Final = integer(0, MAX_TOP_LOGPROBS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """``best_of`` answers are made, of which the ``n`` likeliest are given. ``echo``: the prompt comes first.

    ``logprobs`` and ``prompt_logprobs``: with so many of the likeliest tokens, None: not asked for.
    """

    n: int = 1
    best_of: int = 1
    echo: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None


def _completion_logprobs(name: str, value: Any) -> int | None:
    return None if value is False else _COUNT.parse(name, value)


_SHARED: Final[Mapping[str, Reader[Any]]] = {"n": integer(1, MAX_CHOICES), "prompt_logprobs": _COUNT}
COMPLETION_CHOICES: Final[Mapping[str, Reader[Any]]] = {
    **_SHARED,
    "best_of": integer(1, MAX_CHOICES),
    "echo": boolean,
    "logprobs": Reader(parse=_completion_logprobs, schema={"anyOf": [_COUNT.schema, {"const": False}]}),
}
CHAT_CHOICES: Final[Mapping[str, Reader[Any]]] = {**_SHARED, "logprobs": boolean, "top_logprobs": _COUNT}


def completion_choices(body: Body, *, taken: Set[str], stream: bool) -> Choices:
    """Raises: ApiError, with the parameter named."""
    given = _given(body, COMPLETION_CHOICES, taken)
    n = given.get("n", 1)
    best_of = given.get("best_of", n)
    if best_of < n:
        raise _contradiction("best_of", f"best_of {best_of} is less than n {n}")
    if stream and best_of > n:
        raise _contradiction(
            "best_of", f"best_of {best_of} with n {n} cannot be streamed: the best is known at the end"
        )
    _check_prompt(given, stream=stream)
    return Choices(
        n=n,
        best_of=best_of,
        echo=given.get("echo", False),
        logprobs=given.get("logprobs"),
        prompt_logprobs=given.get("prompt_logprobs"),
    )


def chat_choices(body: Body, *, taken: Set[str], stream: bool) -> Choices:
    """Raises: ApiError, with the parameter named."""
    given = _given(body, CHAT_CHOICES, taken)
    n, is_told, top = given.get("n", 1), given.get("logprobs", False), given.get("top_logprobs", 0)
    if top and not is_told:
        raise _contradiction("top_logprobs", "top_logprobs needs logprobs: true")
    _check_prompt(given, stream=stream)
    return Choices(n=n, best_of=n, logprobs=top if is_told else None, prompt_logprobs=given.get("prompt_logprobs"))


def _given(body: Body, readers: Mapping[str, Reader[Any]], taken: Set[str]) -> dict[str, Any]:
    """Return what is given and not null."""
    read = {name: reader(body, name) for name, reader in readers.items() if name in taken}
    return {name: value for name, value in read.items() if value is not None}


def _check_prompt(given: Mapping[str, Any], *, stream: bool) -> None:
    if stream and "prompt_logprobs" in given:
        raise _contradiction("prompt_logprobs", "prompt_logprobs cannot be streamed")


def _contradiction(name: str, message: str) -> Exception:
    return invalid(message, param=name, code="contradiction")
