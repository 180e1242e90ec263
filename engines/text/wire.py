"""What the daemon and the text process say to each other.

A frame is a length (4 bytes, little endian) and that many bytes of MessagePack: a list of requests, or of replies.
Within a frame and between frames order is kept.
"""

import struct
from collections.abc import Iterator
from typing import Any

import msgspec

_LENGTH = struct.Struct("<I")


class ChatOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a chat template is rendered.

    ``add_generation_prompt``: it opens the answer at its end. ``continue_final_message``: it leaves the last message
    open, so that the answer goes on with that. ``template_kwargs``: values that it is given besides, by its own names.
    """

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: dict[str, Any] = {}


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """What a chat template is given."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    options: ChatOptions = ChatOptions()


class About(msgspec.Struct, frozen=True, kw_only=True):
    """What else is to be known of a tokenizer.

    ``chat_template``: the one that is rendered where there are tools; None: there is none. ``added_tokens``: the ids
    of tokens that are looked for before text is divided, special or not, by what they are written as.
    """

    chat_template: str | None = None
    added_tokens: dict[str, int] = {}


class Encode(msgspec.Struct, tag=1, array_like=True, frozen=True):
    """Answered by ``Encoded`` or ``Refused``."""

    call_id: int
    text: str
    add_special_tokens: bool


class Chat(msgspec.Struct, tag=2, array_like=True, frozen=True):
    """Render the chat template. Answered by ``Encoded`` or ``Refused``.

    ``conversation``: messages, tools and options, as JSON: MessagePack has no integers of any length.
    """

    call_id: int
    conversation: bytes


class Decode(msgspec.Struct, tag=6, array_like=True, frozen=True):
    """The text of token ids, special ones included. Answered by ``Decoded`` or ``Refused``."""

    call_id: int
    token_ids: tuple[int, ...]


class Pieces(msgspec.Struct, tag=7, array_like=True, frozen=True):
    """The bytes of single tokens. Answered by ``Pieced``."""

    call_id: int
    token_ids: tuple[int, ...]


class Open(msgspec.Struct, tag=3, array_like=True, frozen=True):
    """Begin a stream, or go on with one that was fed ``token_ids`` and gave ``characters_sent`` for them.

    Stop strings are not looked for in the text of the first ``min_tokens`` tokens. ``marks``: added tokens that are
    text here, also if they are special.
    """

    stream_id: int
    prompt_tail: tuple[int, ...]
    token_ids: tuple[int, ...]
    characters_sent: int
    stop: tuple[str, ...]
    include_stop: bool
    min_tokens: int = 0
    marks: tuple[str, ...] = ()


class Feed(msgspec.Struct, tag=4, array_like=True, frozen=True):
    """Output tokens of a stream. Answered by one ``Delta``; a final one, or one with a stop hit, ends the stream."""

    stream_id: int
    token_ids: tuple[int, ...]
    final: bool


class Close(msgspec.Struct, tag=5, array_like=True, frozen=True):
    """Forget a stream; unknown ones are ignored."""

    stream_id: int


class Ready(msgspec.Struct, tag=1, array_like=True, frozen=True):
    """The first reply: the tokenizer is loaded."""

    vocab_size: int
    about: About


class Encoded(msgspec.Struct, tag=2, array_like=True, frozen=True):
    call_id: int
    token_ids: tuple[int, ...]


class Decoded(msgspec.Struct, tag=6, array_like=True, frozen=True):
    call_id: int
    text: str


class Pieced(msgspec.Struct, tag=7, array_like=True, frozen=True):
    call_id: int
    pieces: tuple[bytes, ...]


class Refused(msgspec.Struct, tag=3, array_like=True, frozen=True):
    call_id: int
    message: str


class Delta(msgspec.Struct, tag=4, array_like=True, frozen=True):
    """Text that is certain now. ``tokens_consumed`` counts all output tokens of the stream up to a stop hit.

    ``tokens_shown`` counts those of which all text has been given. ``stop``: the stop string of a hit.
    """

    stream_id: int
    text: str
    stop_hit: bool
    tokens_consumed: int
    tokens_shown: int = 0
    stop: str | None = None


class LastWords(msgspec.Struct, tag=5, array_like=True, frozen=True):
    """Why the process is about to end."""

    reason: str


Call = Encode | Chat | Decode | Pieces  # stands alone
Request = Call | Open | Feed | Close
Reply = Ready | Encoded | Decoded | Pieced | Refused | Delta | LastWords

_encoder = msgspec.msgpack.Encoder()
_request_decoder = msgspec.msgpack.Decoder(list[Request])
_reply_decoder = msgspec.msgpack.Decoder(list[Reply])


def pack(messages: list[Request] | list[Reply]) -> bytes:
    """Return the frame that carries ``messages``."""
    return frame(_encoder.encode(messages))


def frame(body: bytes) -> bytes:
    """Return what ``FrameReader`` cuts this body out of again."""
    return _LENGTH.pack(len(body)) + body


def unpack_requests(body: bytes) -> list[Request]:
    return _request_decoder.decode(body)


def unpack_replies(body: bytes) -> list[Reply]:
    return _reply_decoder.decode(body)


class FrameReader:
    """Cuts a byte stream into frame bodies."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | memoryview) -> Iterator[bytes]:
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._buffer)[0]
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield body
