"""What a request asks of the choice of its tokens besides temperature, top_k and top_p. Pure: no torch here.

The parameters are vLLM's, and so is the order in which they act (``engines.native.logits``).
"""

from typing import Any, Final

import msgspec

from engines.errors import InvalidRequest
from engines.protocol import SamplingParams

ENGINE_PARAMS: Final = frozenset(
    {"allowed_token_ids", "bad_words", "frequency_penalty", "logit_bias", "min_p", "min_tokens"}
    | {"presence_penalty", "repetition_penalty"}
)


class Shaping(msgspec.Struct, frozen=True, kw_only=True):
    """How the logits of a request are changed before a token is chosen from them.

    ``presence`` and ``frequency`` are penalties of output tokens, ``repetition`` one of prompt and output;
    ``bad_words`` are runs of tokens that the output never completes; ``allowed`` are the only tokens that may be
    chosen, None: all. The tokens that would end the request, and those with which the model ends, whether it shall end
    there or not, are not chosen among the first ``min_tokens``.
    """

    min_p: float = 0.0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    min_tokens: int = 0
    bias: dict[int, float] = {}
    allowed: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()

    @property
    def counts_tokens(self) -> bool:
        """Whether what has been said so far matters."""
        return (self.presence, self.frequency, self.repetition) != (0.0, 0.0, 1.0)

    @property
    def changes_logits(self) -> bool:
        """Whether there is anything to do but for ``min_p``, which only draws have."""
        others = self.bias or self.bad_words or self.min_tokens or self.allowed is not None
        return bool(others) or self.counts_tokens

    def forbidden(self, output: list[int], held_ids: frozenset[int]) -> list[int]:
        """Return the tokens that must not come next, after ``output``."""
        tokens = list(held_ids) if len(output) < self.min_tokens else []
        for word in self.bad_words:
            before = len(word) - 1
            if before <= len(output) and output[len(output) - before :] == list(word[:-1]):
                tokens.append(word[-1])
        return tokens


def shaping_of(sampling: SamplingParams, *, vocab_size: int) -> Shaping | None:
    """Return what ``sampling`` asks for, None where that is nothing.

    Raises:
        InvalidRequest: A token id is not in the vocabulary.
    """
    given = sampling.engine_params
    if not given and not sampling.bad_words:
        return None
    allowed = given.get("allowed_token_ids")
    bias = {int(token): float(value) for token, value in given.get("logit_bias", {}).items()}
    for name, token_ids in (("logit_bias", bias), ("allowed_token_ids", allowed or ())):
        _check_known(name, token_ids, vocab_size)
    if allowed is not None and not allowed:
        raise InvalidRequest("allowed_token_ids must allow at least one token", parameter="allowed_token_ids")
    return Shaping(
        min_p=given.get("min_p", 0.0),
        presence=given.get("presence_penalty", 0.0),
        frequency=given.get("frequency_penalty", 0.0),
        repetition=given.get("repetition_penalty", 1.0),
        min_tokens=given.get("min_tokens", 0),
        bias=bias,
        allowed=None if allowed is None else tuple(allowed),
        bad_words=tuple(word for word in sampling.bad_words if word and max(word) < vocab_size),
    )


def _check_known(name: str, token_ids: Any, vocab_size: int) -> None:
    unknown = next((token for token in token_ids if not 0 <= token < vocab_size), None)
    if unknown is not None:
        message = f"{name}: token ids are 0 to {vocab_size - 1}, not {unknown}"
        raise InvalidRequest(message, parameter=name, code="unknown_token")
