"""Which tokens a grammar lets through, whose text must parse; and what is no grammar is refused by name."""

import json
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer

from engines.errors import InvalidRequest
from engines.native.asks import asks_of
from engines.native.batch import Batch, Entry
from engines.native.grammar import Grammars, Matcher
from engines.native.grammar_setup import grammars_for
from engines.native.sequence import Sequence
from engines.native.shaping import Shaping
from engines.native.shared import SharedMemory, SharedSizes
from engines.native.token_mask import is_set, words_for
from engines.protocol import FinishReason, Grammar, GrammarKind, SamplingParams
from tests.support.tiny_tokenizer import byte_fallback_tokenizer, byte_level_tokenizer, word_piece_tokenizer

TOKENIZER = byte_level_tokenizer()
VOCABULARY = TOKENIZER.get_vocab_size()
EOS_ID = 1
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def grammar(kind: GrammarKind, source: object, *, any_whitespace: bool = False) -> Grammar:
    text = source if isinstance(source, str) else json.dumps(source)
    return Grammar(kind=kind, source=text, parameter="structured_outputs", any_whitespace=any_whitespace)


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> Grammars:
    path: Path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    TOKENIZER.save(str(path))
    return Grammars(path, vocab_size=VOCABULARY, eos_token_ids=(EOS_ID,))


def allowed(matcher: Matcher) -> list[int]:
    words = np.zeros(words_for(VOCABULARY), dtype=np.int32)
    matcher.fill(words)
    return np.flatnonzero(is_set(words, VOCABULARY)).tolist()


def random_output(matcher: Matcher, rng: random.Random, *, most: int = 200) -> list[int]:
    """Return tokens drawn from what is allowed, to the end."""
    output: list[int] = []
    while not matcher.is_done and len(output) < most:
        tokens = allowed(matcher)
        output.append(EOS_ID if EOS_ID in tokens and rng.random() < 0.5 else rng.choice(tokens))
        matcher.take(output[-1])
        assert not matcher.has_failed
    assert matcher.is_done
    return output


def text_of(output: list[int]) -> str:
    return TOKENIZER.decode([token for token in output if token != EOS_ID])


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_drawn_keeps_to_the_schema(grammars: Grammars, seed: int) -> None:
    output = random_output(grammars.matcher(grammar(GrammarKind.JSON_SCHEMA, SCHEMA), []), random.Random(seed))
    found = json.loads(text_of(output))
    assert found.keys() == {"name", "age"}
    assert len(found["name"]) <= 4
    assert 0 <= found["age"] <= 150


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_drawn_matches_the_expression(grammars: Grammars, seed: int) -> None:
    pattern = r"(yes|no), [0-9]{2,4}!"
    output = random_output(grammars.matcher(grammar(GrammarKind.REGEX, pattern), []), random.Random(seed))
    assert re.fullmatch(pattern, text_of(output))


def test_choices_and_grammars(grammars: Grammars) -> None:
    choices = ["red", 'green "x" | y', "blue\n"]
    seen = {
        text_of(random_output(grammars.matcher(grammar(GrammarKind.CHOICE, choices), []), random.Random(seed)))
        for seed in range(30)
    }
    assert seen <= set(choices)
    assert len(seen) > 1
    many = [f"word {i}" for i in range(5000)]
    assert text_of(random_output(grammars.matcher(grammar(GrammarKind.CHOICE, many), []), random.Random(1))) in many
    lark = 'start: "(" inner ")"\ninner: "a" | start'
    output = random_output(grammars.matcher(grammar(GrammarKind.LARK, lark), []), random.Random(3))
    assert text_of(output).strip("(").strip(")") == "a"


@pytest.mark.parametrize("already", [1, 3, 7])
def test_a_matcher_made_from_the_tokens_so_far_goes_on_as_the_first_would(grammars: Grammars, already: int) -> None:
    wanted = grammar(GrammarKind.JSON_SCHEMA, SCHEMA)
    output = random_output(grammars.matcher(wanted, []), random.Random(1))
    first, second = grammars.matcher(wanted, []), grammars.matcher(wanted, output[:already])
    for token in output[:already]:
        first.take(token)
    for token in output[already:]:
        assert allowed(first) == allowed(second)
        first.take(token)
        second.take(token)
    assert first.is_done
    assert second.is_done


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        (GrammarKind.JSON_SCHEMA, {"type": "nonsense"}),
        (GrammarKind.JSON_SCHEMA, "{not json"),
        (GrammarKind.JSON_SCHEMA, "5"),
        (GrammarKind.REGEX, "(a"),
        (GrammarKind.LARK, "start: unknown_rule"),
        (GrammarKind.REGEX, "(" * 9000),
        (GrammarKind.REGEX, "a" * (2 << 20)),
        (GrammarKind.CHOICE, [f"{i}" for i in range(300_000)]),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_grammar_is_refused_by_name(grammars: Grammars, kind: GrammarKind, source: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        grammars.matcher(grammar(kind, source), [])
    assert (caught.value.parameter, caught.value.code) == ("structured_outputs", "invalid_grammar")
    assert "structured_outputs: " in str(caught.value)
    assert len(str(caught.value)) < 400  # else all of what was sent would come back


def test_a_long_repetition_in_few_characters_does_not_take_seconds(grammars: Grammars) -> None:
    began_s = time.process_time()
    matcher = grammars.matcher(grammar(GrammarKind.REGEX, "(?:(?:a{1000}){1000}){1000}"), [])
    matcher.take(allowed(matcher)[0])
    assert matcher.has_failed  # it is too complex
    assert time.process_time() - began_s < 1.2


def test_a_sequence_ends_where_nothing_may_follow_and_fails_where_its_grammar_does(grammars: Grammars) -> None:
    def sequence() -> Sequence:
        return Sequence(
            key=1,
            prompt=[5],
            generated=[],
            sampling=SamplingParams(max_tokens=30, ignore_eos=True),
            stop_ids=frozenset(),
            order=1,
            matcher=grammars.matcher(grammar(GrammarKind.REGEX, "[0-9]{2}"), []),
        )

    digit, letter = (TOKENIZER.encode(each, add_special_tokens=False).ids[0] for each in "7x")
    ends, fails = sequence(), sequence()
    assert ends.finish_after(digit, max_model_len=50) is None
    assert ends.finish_after(digit, max_model_len=50) is FinishReason.STOP
    assert fails.finish_after(letter, max_model_len=50) is FinishReason.ABORT


def test_what_is_allowed_besides_and_by_the_grammar_counts_together(grammars: Grammars) -> None:
    shared = SharedMemory(
        SharedSizes(
            num_workers=1,
            max_num_seqs=2,
            max_blocks_per_seq=1,
            hidden_bytes_per_token=4,
            max_num_batched_tokens=1,
            outbox_slots=1,
            staging_bytes=4,
            max_model_len=8,
            vocab_size=VOCABULARY,
        )
    )
    matcher = grammars.matcher(grammar(GrammarKind.REGEX, "[0-9]+"), [])
    digits = [token for token in allowed(matcher) if token != EOS_ID]
    sequence = Sequence(
        key=1,
        prompt=[5],
        generated=[],
        sampling=SamplingParams(max_tokens=30),
        stop_ids=frozenset(),
        order=1,
        shaping=Shaping(allowed=(digits[0], digits[1], 400)),
        matcher=matcher,
    )
    sequence.row = 1
    (shape,) = asks_of(Batch(1, (Entry(sequence, 0, 1, samples=True),)), [0], shared).shapes
    assert shape.is_masked
    assert np.flatnonzero(is_set(shared.masks[1], VOCABULARY)).tolist() == sorted(digits[:2])


@pytest.mark.parametrize(
    ("tokenizer", "vocab_size", "reason"),
    [
        (word_piece_tokenizer(), 12, "decoder"),
        (TOKENIZER, 100, "too small"),
        (TOKENIZER, VOCABULARY, ""),
        (byte_fallback_tokenizer(), 300, ""),
        (None, 100, "no tokenizer.json"),
    ],
    ids=["word piece", "small vocabulary", "byte level", "byte fallback", "none"],
)
def test_a_tokenizer_that_llguidance_does_not_read_is_no_reason_not_to_serve(
    tmp_path: Path, tokenizer: Tokenizer | None, vocab_size: int, reason: str
) -> None:
    if tokenizer is not None:
        tokenizer.save(str(tmp_path / "tokenizer.json"))
    found, why = grammars_for(tmp_path, vocab_size=vocab_size, eos_token_ids=(EOS_ID,))
    assert (found is None) is bool(reason)
    assert reason in why


def test_llguidance_has_its_own_validation() -> None:
    """What the daemon relies on: a wrong grammar is an error of the matcher, never an exception that ends the core."""
    assert LLMatcher.validate_grammar(LLMatcher.grammar_from_regex("(a")) != ""
