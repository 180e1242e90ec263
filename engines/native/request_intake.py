"""From a request to a sequence, or why it cannot be run (pure)."""

from typing import TYPE_CHECKING

from engines.errors import InvalidRequest
from engines.native import client_messages as c
from engines.native.adapters import Adapters
from engines.native.boot import Boot
from engines.native.sequence import Sequence

if TYPE_CHECKING:
    from engines.native.grammar import Matcher


def sequence_of(
    request: c.Submit, *, boot: Boot, adapters: Adapters, matcher: "Matcher | None", order: int
) -> Sequence:
    """Return the sequence of a request.

    Args:
        matcher: Of its grammar, where it has one.
        order: Of its arrival.

    Raises:
        InvalidRequest: It cannot be run.
    """
    adapter = _adapter_of(request, adapters)
    allowed = None if request.shaping is None else request.shaping.allowed
    if matcher is not None and allowed is not None:
        _ensure_begins(matcher, allowed, request, vocab_size=boot.vocab_size)
    stops = frozenset(request.sampling.stop_token_ids)
    ends = stops.union(boot.eos_token_ids)
    return Sequence(
        key=request.key,
        prompt=request.prompt,
        generated=request.generated,
        sampling=request.sampling,
        stop_ids=stops if request.sampling.ignore_eos else ends,
        held_ids=ends,
        order=order,
        shaping=request.shaping,
        matcher=matcher,
        adapter=adapter,
    )


def _adapter_of(request: c.Submit, adapters: Adapters) -> int:
    name = request.sampling.adapter
    number = adapters.number_of(name)
    if number is None:
        raise InvalidRequest(f"adapter {name!r} is not loaded any more", parameter="model", code="model_not_found")
    return number


def _ensure_begins(matcher: "Matcher", allowed: tuple[int, ...], request: c.Submit, *, vocab_size: int) -> None:
    """Raises: InvalidRequest: What is allowed and the grammar leave no token to begin with."""
    grammar = request.sampling.grammar
    if grammar is not None and not matcher.is_done and not matcher.takes_any(allowed, vocab_size):
        message = f"allowed_token_ids leaves {grammar.parameter} no token to begin with"
        raise InvalidRequest(message, parameter="allowed_token_ids", code="contradiction")
