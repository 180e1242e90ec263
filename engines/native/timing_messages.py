"""What the process that measures layer times is asked, and what it says: JSON, one message a line."""

import msgspec

from engines.native.options import NativeOptions


class TimingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The one line that the process reads. ``budget_s`` is spent on each batch of each layout."""

    options: NativeOptions
    parent_pid: int
    budget_s: float = 0.15


class TimingStarted(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The model is described and the workers are up."""

    num_points: int
    torch_version: str
    attention: str
    cores: int


class StageObserved(msgspec.Struct, frozen=True, kw_only=True):
    """One stage under one batch; ``busy_s`` is the mean of its steps, the smaller of two passes."""

    threads: int
    beside_others: bool
    num_decoders: int
    has_embedding: bool
    has_head: bool
    tokens: int
    sequences: int
    context_tokens: float
    busy_s: float


class TimingPoint(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One batch of one layout is done once; ``stages`` is empty in the first of two passes."""

    done: int
    what: str  # for people
    stages: tuple[StageObserved, ...]


class TimingFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The last line when it could not go on."""

    reason: str
    unsupported: bool


class TimingDone(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The last line when all went well."""


TimingReport = TimingStarted | TimingPoint | TimingFailed | TimingDone

encode = msgspec.json.Encoder().encode
decode_request = msgspec.json.Decoder(TimingRequest).decode
decode_report = msgspec.json.Decoder(TimingReport).decode
