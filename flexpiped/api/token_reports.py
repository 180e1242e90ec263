"""What a client is told of single tokens: their text and how likely they were."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from engines.protocol import ScoredToken, TokenChunk, TopLogprobs
from engines.text.protocol import Text


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token at some position; ``data`` may be part of a character."""

    token_id: int
    data: bytes
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenReport:
    """``logprob`` is None of the prompt's first token, before which there is nothing. ``rank`` of prompt tokens only.

    ``top``: the likeliest tokens at its position, as many as were asked for.
    """

    token_id: int
    data: bytes
    logprob: float | None
    top: tuple[Candidate, ...] = ()
    rank: int = 0

    @property
    def text(self) -> str:
        return self.data.decode(errors="replace")


async def reports_of(text: Text, chunk: TokenChunk) -> list[TokenReport]:
    """Return one report for each token of ``chunk``. Raises: TextProcessDied, TextClosed."""
    tops = chunk.top_logprobs or ((),) * len(chunk.token_ids)
    pieces = await _pieces(text, chunk.token_ids, tops)
    return [
        TokenReport(token_id=token_id, data=pieces[token_id], logprob=logprob, top=_candidates(top, pieces))
        for token_id, logprob, top in zip(chunk.token_ids, chunk.logprobs, tops, strict=True)
    ]


async def prompt_reports(text: Text, prompt: Sequence[int], scored: Sequence[ScoredToken]) -> list[TokenReport]:
    """Return one report for each token of the prompt. Raises: TextProcessDied, TextClosed."""
    pieces = await _pieces(text, prompt, [each.top for each in scored])
    first = TokenReport(token_id=prompt[0], data=pieces[prompt[0]], logprob=None)
    return [first] + [
        TokenReport(
            token_id=each.token_id,
            data=pieces[each.token_id],
            logprob=each.logprob,
            top=_candidates(each.top, pieces),
            rank=each.rank,
        )
        for each in scored
    ]


async def _pieces(text: Text, token_ids: Sequence[int], tops: Sequence[TopLogprobs]) -> dict[int, bytes]:
    wanted = list({*token_ids, *(token_id for token_id, _ in chain.from_iterable(tops))})
    return dict(zip(wanted, await text.pieces(wanted), strict=True))


def _candidates(top: TopLogprobs, pieces: dict[int, bytes]) -> tuple[Candidate, ...]:
    return tuple(Candidate(token_id, pieces[token_id], logprob) for token_id, logprob in top)
