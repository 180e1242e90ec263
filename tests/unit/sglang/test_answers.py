"""What SGLang answers, put into a request's stream."""

from engines.protocol import FinishReason
from engines.served.streams import Stream
from engines.sglang.adapter import put
from engines.sglang.http import Event


def event(*token_ids: int, finish: str = "") -> Event:
    return Event(token_ids=token_ids, logprobs=(), finish=finish, status=0, reason="")


async def test_nothing_comes_after_a_stop_token_however_events_arrive() -> None:
    stream = Stream()
    for came in (event(5), event(9), event(7), event(8, finish="length")):
        put(stream, came, frozenset({9}))
    (chunk,) = [chunk async for chunk in stream]
    assert (chunk.token_ids, chunk.finish_reason) == ((5, 9), FinishReason.STOP)
