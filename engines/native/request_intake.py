"""From a request to a sequence, or why it cannot be run (pure)."""

from typing import TYPE_CHECKING

from engines.errors import InvalidRequest
from engines.native import client_messages as c
from engines.native.adapters import Adapters
from engines.native.boot import Boot
from engines.native.sequence import Sequence

if TYPE_CHECKING:
    from engines.native.grammar import Grammars, Matcher


def sequence_of(
    request: c.Submit, *, boot: Boot, adapters: Adapters, grammars: "Grammars | None", order: int
) -> Sequence:
    """Return the sequence of a request.

    Args:
        grammars: None: this model's output cannot be kept to any.
        order: Of its arrival.

    Raises:
        InvalidRequest: It cannot be run.
    """
    adapter = _adapter_of(request, adapters)
    matcher = _matcher_of(request, grammars, vocab_size=boot.vocab_size)
    eos = () if request.sampling.ignore_eos else boot.eos_token_ids
    return Sequence(
        key=request.key,
        prompt=request.prompt,
        generated=request.generated,
        sampling=request.sampling,
        stop_ids=frozenset((*request.sampling.stop_token_ids, *eos)),
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


def _matcher_of(request: c.Submit, grammars: "Grammars | None", *, vocab_size: int) -> "Matcher | None":
    grammar = request.sampling.grammar
    if grammar is None:
        return None
    if grammars is None:
        raise InvalidRequest("this model's output cannot be kept to a grammar", parameter=grammar.parameter)
    matcher = grammars.matcher(grammar, request.generated)
    allowed = None if request.shaping is None else request.shaping.allowed
    if allowed is not None and not matcher.is_done and not matcher.takes_any(allowed, vocab_size):
        message = f"allowed_token_ids leaves {grammar.parameter} no token to begin with"
        raise InvalidRequest(message, parameter="allowed_token_ids", code="contradiction")
    return matcher
