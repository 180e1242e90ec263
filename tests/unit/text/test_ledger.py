"""After a death the ledger asks for exactly what has not been answered."""

import asyncio

import pytest

from engines.text.errors import TextClosed, TextProcessDied, TextRefused
from engines.text.ledger import Ledger
from engines.text.wire import Close, Delta, Encode, Encoded, Feed, Open, Refused

OPENED = Open(stream_id=1, prompt_tail=(9,), token_ids=(), characters_sent=0, stop=("x",), include_stop=False)


def delta(text: str, *, stop_hit: bool = False) -> Delta:
    return Delta(stream_id=1, text=text, stop_hit=stop_hit, tokens_consumed=0)


def encode(call_id: int) -> Encode:
    return Encode(call_id=call_id, text="text", add_special_tokens=True)


async def test_a_stream_is_reopened_from_what_was_answered() -> None:
    ledger = Ledger()
    ledger.add_stream(OPENED)
    ledger.add_feed(Feed(stream_id=1, token_ids=(5, 6), final=False))
    ledger.settle_feed(delta("abc"))
    asked = Feed(stream_id=1, token_ids=(7,), final=False)
    answer = ledger.add_feed(asked)
    again = Open(stream_id=1, prompt_tail=(9,), token_ids=(5, 6), characters_sent=3, stop=("x",), include_stop=False)
    assert ledger.replay() == [again, asked]
    ledger.settle_feed(delta("d"))
    assert (await answer).text == "d"
    assert ledger.replay()[0].token_ids == (5, 6, 7)  # type: ignore[union-attr]


@pytest.mark.parametrize("how", ["final", "stop hit", "closed"])
async def test_an_ended_stream_is_forgotten(how: str) -> None:
    ledger = Ledger()
    ledger.add_stream(OPENED)
    if how == "closed":
        assert ledger.drop_stream(1) == Close(stream_id=1)
    else:
        ledger.add_feed(Feed(stream_id=1, token_ids=(5,), final=how == "final"))
        ledger.settle_feed(delta("a", stop_hit=how == "stop hit"))
    assert ledger.num_open == 0
    assert ledger.replay() == []
    assert ledger.drop_stream(1) is None


async def test_an_answer_after_the_close_is_ignored() -> None:
    ledger = Ledger()
    ledger.add_stream(OPENED)
    answer = ledger.add_feed(Feed(stream_id=1, token_ids=(5,), final=False))
    ledger.drop_stream(1)
    ledger.settle_feed(delta("a"))
    assert not answer.done()


async def test_one_feed_at_a_time() -> None:
    ledger = Ledger()
    ledger.add_stream(OPENED)
    ledger.add_feed(Feed(stream_id=1, token_ids=(5,), final=False))
    with pytest.raises(ValueError, match="one feed at a time"):
        ledger.add_feed(Feed(stream_id=1, token_ids=(6,), final=False))


async def test_calls_are_answered_or_refused() -> None:
    ledger = Ledger()
    encoded, refused = ledger.add_call(encode(1)), ledger.add_call(encode(2))
    ledger.settle_call(Encoded(call_id=1, token_ids=(3, 4)))
    ledger.settle_call(Refused(call_id=2, message="no"))
    assert await encoded == Encoded(call_id=1, token_ids=(3, 4))
    with pytest.raises(TextRefused, match="no"):
        await refused
    assert ledger.num_open == 0


async def test_a_call_is_asked_again_once() -> None:
    ledger = Ledger()
    answer = ledger.add_call(encode(1))
    assert ledger.replay() == [encode(1)]
    assert ledger.replay() == []
    with pytest.raises(TextProcessDied, match="each time"):
        await answer


async def test_a_call_that_nobody_waits_for_is_not_asked_again() -> None:
    ledger = Ledger()
    ledger.add_call(encode(1)).cancel()
    assert ledger.replay() == []
    assert ledger.num_open == 0


async def test_at_the_end_everyone_learns_why() -> None:
    ledger = Ledger()
    ledger.add_stream(OPENED)
    answers = [ledger.add_call(encode(2)), ledger.add_feed(Feed(stream_id=1, token_ids=(5,), final=False))]
    ledger.fail_all(TextClosed("closed"))
    for error in await asyncio.gather(*answers, return_exceptions=True):
        assert isinstance(error, TextClosed)
    assert ledger.num_open == 0
