"""Messages between the daemon's side of the native engine and its core, as length-prefixed frames on a socket."""

import hashlib
import json

import msgspec

from engines.native.options import NativeOptions
from engines.native.shaping import Shaping
from engines.offers import KvRange
from engines.protocol import (
    EngineCounters,
    RefactorCheck,
    RefactorProgress,
    SamplingParams,
    ScoredToken,
    StageStatus,
    TopLogprobs,
)
from planner.layout import Pipeline


class ToCore(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of what the core may receive."""


class StartCore(ToCore, frozen=True, kw_only=True, tag=True):
    """The first frame."""

    options: NativeOptions
    pipeline: Pipeline
    epoch: int


class Submit(ToCore, frozen=True, kw_only=True, tag=True):
    """A request; ``key`` names it from here on."""

    key: int
    prompt: list[int]
    generated: list[int]
    sampling: SamplingParams
    shaping: Shaping | None = None


class Abort(ToCore, frozen=True, kw_only=True, tag=True):
    """Forget a request."""

    key: int


class Refactor(ToCore, frozen=True, kw_only=True, tag=True):
    """Change the pipeline; answered by ``Progress`` frames and one ``Refactored``."""

    call: int
    target: Pipeline


class CheckRefactor(ToCore, frozen=True, kw_only=True, tag=True):
    """Ask whether ``Refactor`` would be accepted; answered by ``Checked``."""

    call: int
    target: Pipeline


class CancelRefactor(ToCore, frozen=True, kw_only=True, tag=True):
    """Roll back what has not committed; answered by ``Cancelled``."""

    call: int


class ResizeKv(ToCore, frozen=True, kw_only=True, tag=True):
    """Have another number of KV blocks; answered by ``KvResized``."""

    call: int
    blocks: int


class LoadAdapter(ToCore, frozen=True, kw_only=True, tag=True):
    """Have one more LoRA adapter; answered by ``AdapterChanged``."""

    call: int
    name: str
    directory: str


class UnloadAdapter(ToCore, frozen=True, kw_only=True, tag=True):
    """Take a LoRA adapter away; answered by ``AdapterChanged``. ``when_adopted``: once another daemon has this."""

    call: int
    name: str
    when_adopted: bool = False


class ReadCounters(ToCore, frozen=True, kw_only=True, tag=True):
    """Answered by ``Counters``."""

    call: int


class ReadStages(ToCore, frozen=True, kw_only=True, tag=True):
    """Answered by ``Stages``."""

    call: int


class ReadTrace(ToCore, frozen=True, kw_only=True, tag=True):
    """Answered by ``Trace``, which empties it."""

    call: int


class ReadSteps(ToCore, frozen=True, kw_only=True, tag=True):
    """Answered by ``StageSteps``, which empties them."""

    call: int


class ArmCore(ToCore, frozen=True, kw_only=True, tag=True):
    """Arm a failpoint in the core (worker -1) or in a worker. For tests."""

    worker: int
    name: str
    action: str


class Shutdown(ToCore, frozen=True, kw_only=True, tag=True):
    """End all processes."""


class Outlive(ToCore, frozen=True, kw_only=True, tag=True):
    """From here on keep weights and layout when the daemon is gone, and wait so long for the next one."""

    adopt_within_s: float


class AdoptCore(ToCore, frozen=True, kw_only=True, tag=True):
    """The first frame of a daemon that takes an engine over which serves already; answered by ``Adopted``.

    ``parameters``: address of this daemon's keeper of parameters, as that of the one before is gone; empty: none.
    """

    parameters: str


class FromCore(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of what the daemon may receive."""


class Starting(FromCore, frozen=True, kw_only=True, tag=True):
    """A line of progress while starting."""

    message: str


class Ready(FromCore, frozen=True, kw_only=True, tag=True):
    """The engine serves."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    worker_pids: tuple[int, ...]
    attention: str  # "compiled" or "torch"
    kv_range: KvRange
    grammars: bool


class KvRangeChanged(FromCore, frozen=True, kw_only=True, tag=True):
    """The layout in force has another number of KV blocks than the one before."""

    kv_range: KvRange


class Adopted(FromCore, frozen=True, kw_only=True, tag=True):
    """What the engine is: ``ready`` as at its start, the layout in force, and what it was started with.

    ``adapters``: the directory of each LoRA adapter, by its name, as they are now. ``adapter_bytes``: as in
    ``AdapterChanged``.
    """

    ready: Ready
    pipeline: Pipeline
    epoch: int
    options: NativeOptions
    adapters: dict[str, str] = {}
    adapter_bytes: int = 0


class StartFailed(FromCore, frozen=True, kw_only=True, tag=True):
    """The engine cannot serve this; ``unsupported`` when the model is the reason."""

    reason: str
    unsupported: bool


class Details(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Told besides a token: the likeliest at its position, those of the prompt, and how much of that was cached."""

    top: TopLogprobs = ()
    prompt: tuple[ScoredToken, ...] = ()
    cached: int | None = None


class Outputs(FromCore, frozen=True, kw_only=True, tag=True):
    """What one step brought: parallel lists. ``finishes`` has '' where a request goes on.

    ``details`` by the index in those, where there are any.
    """

    keys: list[int]
    tokens: list[int]
    finishes: list[str]
    logprobs: list[float | None]
    details: dict[int, Details] = {}


class Refused(FromCore, frozen=True, kw_only=True, tag=True):
    """A request that cannot be run, as ``InvalidRequest`` says it."""

    key: int
    message: str
    parameter: str
    code: str | None


class Progress(FromCore, frozen=True, kw_only=True, tag=True):
    """A report of the refactoring with this call number."""

    call: int
    progress: RefactorProgress


class Refactored(FromCore, frozen=True, kw_only=True, tag=True):
    """The end of a refactoring: ``error`` is empty, or names the class of engines.errors."""

    call: int
    error: str
    message: str


class KvResized(FromCore, frozen=True, kw_only=True, tag=True):
    """The end of ``ResizeKv``: ``error`` is empty, or names the class of engines.errors."""

    call: int
    error: str
    message: str
    returned_bytes: int


class AdapterChanged(FromCore, frozen=True, kw_only=True, tag=True):
    """The end of ``LoadAdapter`` or ``UnloadAdapter``: ``error`` is empty, or names the class of engines.errors.

    ``adapters``: the directory of each that requests may name, as it is now. ``adapter_bytes``: what each worker has of
    its own of those that came since the fork and requests may name, as it is now.
    """

    call: int
    error: str
    message: str
    adapters: dict[str, str]
    adapter_bytes: int


class Checked(FromCore, frozen=True, kw_only=True, tag=True):
    call: int
    check: RefactorCheck


class Cancelled(FromCore, frozen=True, kw_only=True, tag=True):
    call: int
    accepted: bool


class Counters(FromCore, frozen=True, kw_only=True, tag=True):
    call: int
    counters: EngineCounters


class Stages(FromCore, frozen=True, kw_only=True, tag=True):
    call: int
    stages: tuple[StageStatus, ...]
    worker_pids: tuple[int, ...]
    longest_slice_s: float


class Trace(FromCore, frozen=True, kw_only=True, tag=True):
    """When each step ended (core's monotonic clock, s) and under which epoch."""

    call: int
    ends_s: list[float]
    epochs: list[int]
    dispatches_s: list[float]


class StageSteps(FromCore, frozen=True, kw_only=True, tag=True):
    """For each stage its last steps: tokens, sequences, context of all sequences after it, and seconds computed.

    ``parts_s`` says what each stage's time went to, by name.
    """

    call: int
    tokens: list[list[int]]
    sequences: list[list[int]]
    context: list[list[int]]
    busy_s: list[list[float]]
    parts_s: list[dict[str, float]] = []


class Fatal(FromCore, frozen=True, kw_only=True, tag=True):
    """The core's last word before it ends."""

    reason: str


ClientCommand = (
    StartCore
    | Submit
    | Abort
    | Refactor
    | CheckRefactor
    | CancelRefactor
    | ResizeKv
    | LoadAdapter
    | UnloadAdapter
    | ReadCounters
    | ReadStages
    | ReadTrace
    | ReadSteps
    | ArmCore
    | Shutdown
    | Outlive
    | AdoptCore
)
CoreReport = (
    Starting
    | Ready
    | Adopted
    | StartFailed
    | Outputs
    | Refused
    | Progress
    | Refactored
    | KvRangeChanged
    | KvResized
    | AdapterChanged
    | Checked
    | Cancelled
    | Counters
    | Stages
    | Trace
    | StageSteps
    | Fatal
)

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(ClientCommand).decode
decode_report = msgspec.msgpack.Decoder(CoreReport).decode


def protocol_digest() -> str:
    """Return what tells these messages from those of another version: daemon and core must have the same."""
    schemas = [msgspec.json.schema(each, ref_template="{name}") for each in (ClientCommand, CoreReport)]
    return hashlib.sha256(json.dumps(schemas, sort_keys=True).encode()).hexdigest()


def options_digest(options: NativeOptions) -> str:
    """Return what tells these options from others, whichever daemon keeps parameters."""
    return hashlib.sha256(msgspec.msgpack.encode(msgspec.structs.replace(options, parameters=""))).hexdigest()
