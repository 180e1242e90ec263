"""The work of the text process, without its channel: one request in, at most one reply out."""

from typing import assert_never

import msgspec

from engines.text.errors import TextRefused
from engines.text.incremental import TextStream
from engines.text.stops import StopMatcher
from engines.text.tokenizer import TextTokenizer, detokenizer_with
from engines.text.wire import (
    Call,
    Chat,
    Close,
    Conversation,
    Decode,
    Decoded,
    Delta,
    Encode,
    Encoded,
    Feed,
    Open,
    Pieced,
    Pieces,
    Refused,
)


class Calls:
    """Calls that stand alone and may take long, as encoding does, so that they run on a thread of their own."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer

    def answer(self, request: Call) -> Encoded | Decoded | Pieced | Refused:
        try:
            match request:
                case Decode():
                    return Decoded(call_id=request.call_id, text=self._tokenizer.decode(request.token_ids))
                case Pieces():
                    return Pieced(call_id=request.call_id, pieces=tuple(map(self._tokenizer.piece, request.token_ids)))
                case Encode():
                    token_ids = self._tokenizer.encode(request.text, add_special_tokens=request.add_special_tokens)
                case Chat():
                    given = msgspec.json.decode(request.conversation, type=Conversation)
                    token_ids = self._tokenizer.chat(given.messages, tools=given.tools, options=given.options)
                case _:
                    assert_never(request)
        except TextRefused as refusal:
            return Refused(call_id=request.call_id, message=str(refusal))
        return Encoded(call_id=request.call_id, token_ids=token_ids)


class Streams:
    """Decoding: all streams that are open."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._streams: dict[int, TextStream] = {}

    def answer(self, request: Open | Feed | Close) -> Delta | None:
        match request:
            case Open():
                self._streams[request.stream_id] = self._open(request)
                return None
            case Feed():
                return self._feed(request)
            case Close():
                self._streams.pop(request.stream_id, None)
                return None
            case _:
                assert_never(request)

    @property
    def num_open(self) -> int:
        return len(self._streams)

    def _open(self, request: Open) -> TextStream:
        stops = StopMatcher(request.stop, include_stop=request.include_stop)
        detokenizer = detokenizer_with(request.marks, self._tokenizer, prompt_tail=request.prompt_tail)
        return TextStream(
            detokenizer,
            stops,
            token_ids=request.token_ids,
            characters_sent=request.characters_sent,
            min_tokens=request.min_tokens,
        )

    def _feed(self, request: Feed) -> Delta:
        delta = self._streams[request.stream_id].feed(request.token_ids, final=request.final)
        if request.final or delta.stop_hit:
            del self._streams[request.stream_id]
        return Delta(
            stream_id=request.stream_id,
            text=delta.text,
            stop_hit=delta.stop_hit,
            tokens_consumed=delta.tokens_consumed,
            tokens_shown=delta.tokens_shown,
            stop=delta.stop,
        )
