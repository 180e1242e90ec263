"""A stream's text depends on its tokens alone: not on how they are fed, nor on being resumed."""

import random

import pytest

from engines.text.incremental import TextDelta, TextStream
from engines.text.local import PlainTokenizer
from engines.text.stops import StopMatcher
from tests.support.tiny_tokenizer import byte_level_tokenizer

TOKENIZER = PlainTokenizer(byte_level_tokenizer())


def stream(stop: tuple[str, ...] = (), *, token_ids: tuple[int, ...] = (), characters_sent: int = 0) -> TextStream:
    return TextStream(
        TOKENIZER.detokenizer(()), StopMatcher(stop), token_ids=token_ids, characters_sent=characters_sent
    )


def ids_of(text: str) -> tuple[int, ...]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def test_the_final_feed_gives_everything() -> None:
    assert stream().feed(ids_of("Once upon"), final=True) == TextDelta(
        text="Once upon", stop_hit=False, tokens_consumed=len(ids_of("Once upon"))
    )


def test_an_unfinished_character_is_shown_at_the_end_only() -> None:
    half = byte_level_tokenizer().token_to_id("æ")  # the byte E6, with which three-byte characters begin
    one = stream()
    assert one.feed((half,)).text == ""
    assert one.feed((), final=True).text == "\ufffd"


def test_a_stop_string_cuts_text_and_tokens() -> None:
    before, stop, after = ids_of("Once upon"), ids_of("STOP"), ids_of(" a time")
    delta = stream(("STOP",)).feed((*before, *stop, *after))
    assert delta == TextDelta(text="Once upon", stop_hit=True, tokens_consumed=len(before) + len(stop))


def test_after_a_stop_hit_tokens_are_ignored() -> None:
    one = stream(("S",))
    first = one.feed(ids_of("S"))
    assert one.feed(ids_of("more"), final=True) == TextDelta(text="", stop_hit=True, tokens_consumed=1)
    assert first.stop_hit


def test_a_false_start_is_shown_at_the_end() -> None:
    one = stream(("STOP",))
    assert one.feed(ids_of("ST")).text == ""
    assert one.feed((), final=True).text == "ST"


@pytest.mark.parametrize("seed", range(30))
def test_any_split_and_any_resumption_gives_the_same(seed: int) -> None:
    rng = random.Random(seed)
    token_ids = tuple(rng.randrange(512) for _ in range(60))
    stop = (TOKENIZER._tokenizer.decode(token_ids[40:44]),) if seed % 2 else ("unlikely",)
    whole = stream(stop).feed(token_ids, final=True)
    assert whole.stop_hit or whole.tokens_shown == len(token_ids)
    one, text, position = stream(stop), "", 0
    while True:
        end = min(len(token_ids), position + rng.randrange(0, 6))
        delta = one.feed(token_ids[position:end], final=end == len(token_ids))
        text, position = text + delta.text, end
        if delta.stop_hit or end == len(token_ids):
            break
        if rng.random() < 0.3:  # the process that held it died: another one is told what was fed and shown
            one = stream(stop, token_ids=token_ids[:position], characters_sent=len(text))
    assert (text, delta.stop_hit, delta.tokens_consumed) == (whole.text, whole.stop_hit, whole.tokens_consumed)
    assert delta.tokens_shown == whole.tokens_shown


@pytest.mark.parametrize("seed", range(30))
def test_the_text_of_tokens_that_may_be_told_has_been_given(seed: int) -> None:
    rng, text = random.Random(seed), "Once 漢字 upon 🙂🙃 naïve cafés; the quick brown fox jumps"
    begin = rng.randrange(8, 40)
    stop, given = text[begin : begin + rng.randrange(1, 6)], ""
    one = stream((stop,))
    for token_id in (token_ids := ids_of(text)):
        delta = one.feed((token_id,))
        given += delta.text
        assert given.encode().startswith(b"".join(map(TOKENIZER.piece, token_ids[: delta.tokens_shown])))
        if delta.stop_hit:
            break
    assert delta.stop_hit
    assert given == text.partition(stop)[0]


def test_stop_strings_are_not_looked_for_before_min_tokens() -> None:
    token_ids = ids_of("one, two, three")
    until = next(i for i in range(len(token_ids)) if byte_level_tokenizer().decode(token_ids[: i + 1]).count(",") == 1)
    one = TextStream(TOKENIZER.detokenizer(()), StopMatcher((",",)), min_tokens=until + 1)
    assert one.feed(token_ids, final=True).text == "one, two"
    resumed = TextStream(
        TOKENIZER.detokenizer(()),
        StopMatcher((",",)),
        token_ids=token_ids[: until + 1],
        characters_sent=4,
        min_tokens=until + 1,
    )
    assert resumed.feed(token_ids[until + 1 :], final=True).text == " two"


def test_a_stop_string_may_begin_before_min_tokens() -> None:
    before, split, after = ids_of("one"), ids_of("ST"), ids_of("OP two")
    most = len(before) + len(split)
    one = TextStream(TOKENIZER.detokenizer(()), StopMatcher(("STOP", "ne")), min_tokens=most)
    assert one.feed((*before, *split)).text == "one"
    delta = one.feed(after)
    assert (delta.text, delta.stop_hit, delta.stop) == ("", True, "STOP")


def test_text_that_was_never_sent_is_owed() -> None:
    token_ids = ids_of("Once upon a time")
    assert stream(token_ids=token_ids, characters_sent=4).feed(()).text == " upon a time"
