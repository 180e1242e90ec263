"""Frames arrive whole, however the bytes are cut."""

from engines.text.wire import Delta, Encode, Feed, FrameReader, Open, pack, unpack_replies, unpack_requests


def test_requests_and_replies_survive_any_cut() -> None:
    requests = [
        Encode(call_id=1, text="漢字", add_special_tokens=False),
        Open(stream_id=2, prompt_tail=(1, 2), token_ids=(), characters_sent=0, stop=("\n",), include_stop=True),
        Feed(stream_id=2, token_ids=(7,), final=False),
    ]
    reply = Delta(stream_id=2, text="🙂", stop_hit=False, tokens_consumed=1)
    data = pack([*requests]) + pack([reply])
    for size in (1, 3, 1000):
        reader = FrameReader()
        first, second = [body for at in range(0, len(data), size) for body in reader.feed(data[at : at + size])]
        assert unpack_requests(first) == requests
        assert unpack_replies(second) == [reply]
