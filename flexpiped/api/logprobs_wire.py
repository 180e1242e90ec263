"""Log-probabilities as OpenAI's API has them, those of prompts as vLLM has them."""

import codecs
from collections.abc import Sequence
from typing import Any, Final

from flexpiped.api.token_reports import Candidate, TokenReport

_LEAST: Final = -9999.0  # what stands for minus infinity, which JSON has not


class CompletionLogprobs:
    """``logprobs`` of one choice of ``/v1/completions``, chunk by chunk: ``text_offset`` counts over all of them.

    The tokens' texts make up the offsets, as vLLM's do. A character that is split between tokens counts with the last.
    """

    def __init__(self, *, top: int) -> None:
        self._top = top
        self._offset = 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def to_wire(self, tokens: Sequence[TokenReport]) -> dict[str, list[Any]]:
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._utf8.decode(token.data))
        return {
            "text_offset": offsets,
            "token_logprobs": [_bounded(token.logprob) for token in tokens],
            "tokens": [token.text for token in tokens],
            "top_logprobs": [self._top_of(token) for token in tokens],
        }

    def _top_of(self, token: TokenReport) -> dict[str, float] | None:
        """Return the likeliest by their text, and the token itself if it is not among them."""
        if token.logprob is None:
            return None
        found = {token.text: max(token.logprob, _LEAST)}
        for each in token.top[: self._top]:
            found.setdefault(each.data.decode(errors="replace"), max(each.logprob, _LEAST))
        return found


class ChatLogprobs:
    """``logprobs`` of ``/v1/chat/completions``, of a chunk or of all."""

    def __init__(self, *, top: int) -> None:
        self._top = top

    def to_wire(self, tokens: Sequence[TokenReport]) -> dict[str, Any]:
        content = [
            _chat_token(token.data, token.logprob or 0.0)
            | {"top_logprobs": [_chat_token(each.data, each.logprob) for each in token.top[: self._top]]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}


def _chat_token(data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": data.decode(errors="replace"), "logprob": max(logprob, _LEAST), "bytes": list(data)}


def prompt_to_wire(prompt: Sequence[TokenReport]) -> dict[str, Any]:
    """Return the member ``prompt_logprobs``, nothing where it was not asked for."""
    if not prompt:
        return {}
    return {"prompt_logprobs": [None if token.logprob is None else _ranked(token) for token in prompt]}


def _ranked(token: TokenReport) -> dict[str, dict[str, Any]]:
    """Return the token and the likeliest in its place, by token id."""
    own = Candidate(token.token_id, token.data, token.logprob or 0.0)
    found = {str(token.token_id): _ranked_one(own, token.rank)}
    for rank, each in enumerate(token.top, start=1):
        found.setdefault(str(each.token_id), _ranked_one(each, rank))
    return found


def _ranked_one(token: Candidate, rank: int) -> dict[str, Any]:
    text = token.data.decode(errors="replace")
    return {"logprob": max(token.logprob, _LEAST), "rank": rank, "decoded_token": text}


def _bounded(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _LEAST)
