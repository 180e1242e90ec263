"""What the daemon and an ingress process say to each other.

Framed and batched as with the text process (``engines.text.wire``): a frame is a length and that much MessagePack, a
list of what one iteration of the event loop had to say. Order is kept. An ``id`` is given by the ingress, to whatever
it has under way at the daemon: a lease, a stream, a question. ``End`` ends it, and so does the end of the connection.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from engines.protocol import EngineCapabilities, FinishReason, GenerationRequest, TokenChunk
from engines.text.wire import FrameReader as FrameReader
from engines.text.wire import frame
from flexpiped.api.errors import ApiError, ErrorType
from flexpiped.api.metrics import Endpoint
from flexpiped.api.outcomes import Outcome
from flexpiped.keys import Client, KeyRing

# --- from the ingress ---


class Serves(msgspec.Struct, tag=1, array_like=True, frozen=True):
    """It listens, and answers requests for these models by itself. Said again whenever that changes."""

    models: tuple[str, ...]


class Pong(msgspec.Struct, tag=2, array_like=True, frozen=True):
    """Its event loop turns."""


class Admit(msgspec.Struct, tag=3, array_like=True, frozen=True):
    """A place for one request, until ``End``. Answered by ``Done`` or ``Refused``. ``within_s`` None: it may wait."""

    id: int
    model: str
    serial: int
    client: Client
    within_s: float | None


class Reserve(msgspec.Struct, tag=4, array_like=True, frozen=True):
    """Tokens for an admitted request. Answered by ``Done`` or ``Refused``."""

    id: int
    lease: int
    tokens: int


class Generate(msgspec.Struct, tag=5, array_like=True, frozen=True):
    """A stream. Answered by ``Tokens`` and ``Chunk``, of which one is the last, or at any time by ``Refused``."""

    id: int
    model: str
    serial: int
    request: GenerationRequest


class Board(msgspec.Struct, tag=6, array_like=True, frozen=True):
    """An engine with a server of its own, but not this one (0: any). Answered by ``Boarded`` or ``Refused``."""

    id: int
    model: str
    other_than: int


class AwaitDeath(msgspec.Struct, tag=7, array_like=True, frozen=True):
    """Answered by ``Done`` once an engine that ``Boarded`` named has ended or been replaced."""

    id: int
    model: str
    engine: int


class End(msgspec.Struct, tag=8, array_like=True, frozen=True):
    """Nothing more is wanted of it; unknown ones are ignored."""

    id: int


class Arrived(msgspec.Struct, tag=9, array_like=True, frozen=True):
    """A request that is load, which came ``ago_s`` ago; ``Finished`` is its end."""

    id: int
    model: str
    endpoint: Endpoint
    ago_s: float


class Waited(msgspec.Struct, tag=10, array_like=True, frozen=True):
    """It waits no longer."""

    id: int


class Began(msgspec.Struct, tag=11, array_like=True, frozen=True):
    """Its answer has begun."""

    id: int


class Finished(msgspec.Struct, tag=12, array_like=True, frozen=True):
    """A request has ended, also one that never was load. ``since_last_s``: since its last token.

    ``model`` empty: it was for none of them.
    """

    id: int
    model: str
    endpoint: Endpoint
    ago_s: float
    outcome: Outcome
    prompt_tokens: int = 0
    completion_tokens: int = 0
    in_a_row: int = 0
    since_last_s: float = 0.0


Up = Serves | Pong | Admit | Reserve | Generate | Board | AwaitDeath | End | Arrived | Waited | Began | Finished

# --- from the daemon ---


class Welcome(msgspec.Struct, tag=1, array_like=True, frozen=True):
    """The first: what an ingress is to be, and does not change.

    ``daemon_socket``: where the daemon answers over HTTP what an ingress does not. ``drain_deadline_s``: so long its
    requests may go on when it is to end.
    """

    number: int
    family: int
    address: tuple[Any, ...]
    daemon_socket: str
    drain_deadline_s: float
    max_body_bytes: int
    body_deadline_s: float
    max_header_line_bytes: int
    header_deadline_s: float
    send_deadline_s: float


class Model(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """A model that serves now. ``python`` has transformers, for the text process of the ingress.

    ``serial`` tells it from another one that takes its place under its name: what was tokenized for one is refused at
    the other.
    """

    name: str
    serial: int
    capabilities: EngineCapabilities
    sampling_defaults: dict[str, Any]
    tool_format: str
    tokenizer_directory: str
    python: str


class Now(msgspec.Struct, tag=2, array_like=True, frozen=True, kw_only=True):
    """All that changes, as it is now; it takes the place of what was said before.

    ``reloads`` counts reloads: with each, certificate and key are read again.
    """

    models: tuple[Model, ...]
    are_named: bool
    keys: KeyRing | None
    tls_certificate: str | None
    tls_key: str | None
    log_format: str
    log_level: str
    reloads: int


class Done(msgspec.Struct, tag=3, array_like=True, frozen=True):
    id: int


class Refused(msgspec.Struct, tag=4, array_like=True, frozen=True):
    """An ``ApiError``, and the end of what it is about."""

    id: int
    status: int
    kind: ErrorType
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_s: int | None = None

    @property
    def error(self) -> ApiError:
        return ApiError(
            status=self.status,
            type=self.kind,
            message=self.message,
            param=self.param,
            code=self.code,
            retry_after_s=self.retry_after_s,
        )


class Boarded(msgspec.Struct, tag=5, array_like=True, frozen=True):
    """``name``: of the kind of engine. ``socket`` and ``key`` of its own server; empty where it has none."""

    id: int
    engine: int
    name: str
    socket: str
    key: str


class Tokens(msgspec.Struct, tag=6, array_like=True, frozen=True):
    """A chunk that says nothing but its tokens, as most do."""

    id: int
    token_ids: tuple[int, ...]


class Chunk(msgspec.Struct, tag=7, array_like=True, frozen=True):
    id: int
    chunk: TokenChunk


class Ping(msgspec.Struct, tag=8, array_like=True, frozen=True):
    """Answered by ``Pong``."""


class Drain(msgspec.Struct, tag=9, array_like=True, frozen=True):
    """Take no connection any more, let requests finish, and end."""


Down = Welcome | Now | Done | Refused | Boarded | Tokens | Chunk | Ping | Drain

_encoder = msgspec.msgpack.Encoder()
_up_decoder = msgspec.msgpack.Decoder(list[Up])
_down_decoder = msgspec.msgpack.Decoder(list[Down])


def refused(number: int, error: ApiError) -> Refused:
    """Return what tells the ingress of an error."""
    return Refused(number, error.status, error.type, error.message, error.param, error.code, error.retry_after_s)


def tokens_of(number: int, chunk: TokenChunk) -> Tokens | Chunk:
    """Return a chunk as it travels."""
    is_plain = (
        chunk.finish_reason is None
        and chunk.cached_tokens is None
        and not (chunk.logprobs or chunk.top_logprobs or chunk.prompt_logprobs)
    )
    return Tokens(number, chunk.token_ids) if is_plain else Chunk(number, chunk)


def is_last(chunk: TokenChunk) -> bool:
    """Whether nothing follows in a stream."""
    return isinstance(chunk.finish_reason, FinishReason)


def pack(messages: Sequence[Up] | Sequence[Down]) -> bytes:
    """Return the frame that carries ``messages``."""
    return frame(_encoder.encode(messages))


def unpack_up(body: bytes) -> list[Up]:
    """Raises: msgspec.DecodeError."""
    return _up_decoder.decode(body)


def unpack_down(body: bytes) -> list[Down]:
    """Raises: msgspec.DecodeError."""
    return _down_decoder.decode(body)
