"""Output that keeps to a grammar: which tokens may come next, by llguidance (https://github.com/guidance-ai/llguidance).

It runs in the core, which has the tokens of every request: a matcher is made anew from the tokens so far when a request
comes from another engine, and the loss of a stage worker does not touch it. llguidance bounds what one grammar may
cost at each token; beyond that its request ends. What is large is made on a thread (``engines.native.matchers``).
"""

import json
from pathlib import Path
from typing import Final, assert_never

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from engines.errors import InvalidRequest
from engines.native.matchers import is_small
from engines.native.token_mask import Words, is_set, words_for
from engines.protocol import Grammar, GrammarKind

_MOST: Final = 1 << 19  # characters of a grammar; making a matcher takes memory and time by their number
_MOST_SHOWN: Final = 300
_LIMITS: Final = LLParserLimits()
# Few characters can stand for a long repetition: with llguidance's own limit its first mask takes 3 s.
_LIMITS_OF_SMALL: Final = LLParserLimits(initial_lexer_fuel=200_000)


class Matcher:
    """The state of one request's grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def fill(self, words: Words) -> None:
        """Set the bit of each token that may come next, and no other."""
        words[:] = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.int32, count=len(words))

    def takes_any(self, token_ids: tuple[int, ...], vocab_size: int) -> bool:
        """Return whether one of ``token_ids`` may come next."""
        words = np.zeros(words_for(vocab_size), dtype=np.int32)
        self.fill(words)
        return bool(is_set(words, vocab_size)[list(token_ids)].any())

    def take(self, token: int) -> None:
        """Go on after ``token``."""
        self._matcher.consume_token(token)

    @property
    def has_failed(self) -> bool:
        """Whether a token came that the grammar does not allow, or it became too complex."""
        return bool(self._matcher.is_error())

    @property
    def is_done(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_stopped())


class Grammars:
    """Makes matchers for one model.

    Args:
        tokenizer: The model's ``tokenizer.json``.
    """

    def __init__(self, tokenizer: Path, *, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        eos = list(eos_token_ids) or None
        self._tokenizer = LLTokenizer(str(tokenizer), n_vocab=vocab_size, eos_token=eos)

    def matcher(self, grammar: Grammar, generated: list[int]) -> Matcher:
        """Return the state after ``generated``.

        Raises:
            InvalidRequest: The grammar is none, or too long, or ``generated`` does not keep to it.
        """
        if len(grammar.source) > _MOST:
            raise _refusal(grammar, f"a grammar of {len(grammar.source)} characters is too long; {_MOST} are the most")
        try:
            source = compiled(grammar)
        except ValueError as error:
            raise _refusal(grammar, str(error)) from error
        small = is_small(grammar)
        limits = _LIMITS_OF_SMALL if small else _LIMITS
        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=limits)
        if not matcher.is_error() and generated:
            matcher.consume_tokens(generated)
        if not small and not matcher.is_error() and not matcher.is_stopped():
            matcher.compute_bitmask()  # the first takes longest, and here no step waits for it
        if matcher.is_error():
            raise _refusal(grammar, matcher.get_error())
        return Matcher(matcher)


def compiled(grammar: Grammar) -> str:
    """Return the grammar in llguidance's words. Raises: ValueError."""
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            spaces = grammar.any_whitespace
            return str(LLMatcher.grammar_from_json_schema(grammar.source, overrides={"whitespace_flexible": spaces}))
        case GrammarKind.REGEX:
            return str(LLMatcher.grammar_from_regex(grammar.source))
        case GrammarKind.CHOICE:
            # One terminal, as a rule of more than some thousand is too complex.
            choices = " | ".join(json.dumps(each) for each in json.loads(grammar.source))
            return str(LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}"))
        case GrammarKind.LARK:
            return str(LLMatcher.grammar_from_lark(grammar.source))
        case _:
            assert_never(grammar.kind)


def _refusal(grammar: Grammar, reason: str) -> InvalidRequest:
    first = reason.strip().splitlines()[0] if reason.strip() else "it cannot be read"
    shown = first if len(first) <= _MOST_SHOWN else f"{first[:_MOST_SHOWN]} ..."  # it may have all of the grammar in it
    message = f"{grammar.parameter}: {shown}"
    return InvalidRequest(message, parameter=grammar.parameter, code="invalid_grammar")
