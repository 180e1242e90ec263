"""Messages between the engine core and its stage workers, and between workers.

Arrays travel as the bytes of int32 (``tokens``, ``rows``, ``starts``, ``counts``, ``slots``, ...) or float32
(``logprobs``).
``generation`` rises with every commit and every recovery; a message of another generation is stale and dropped.
"""

import msgspec


class StageSpec(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """The role a worker is given."""

    first_decoder: int
    end_decoder: int
    is_first: bool  # holds the embedding
    is_last: bool  # holds the head and samples
    next_worker: int  # -1 for the last stage

    def layers(self) -> tuple[str, ...]:
        """Return the names of its layers, in order: ``embedding``, ``0``, ``1``, ..., ``head``."""
        decoders = tuple(str(i) for i in range(self.first_decoder, self.end_decoder))
        return ("embedding",) * self.is_first + decoders + ("head",) * self.is_last


class Draw(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """How to sample one row of the logits when it is not greedy. ``position`` counts output tokens from 0."""

    row: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    position: int
    min_p: float = 0.0


class Shape(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """How to change one row of the logits before a token is chosen from it.

    ``table_row`` is the sequence's row in shared memory, where its first ``num_tokens`` tokens lie (0: they are not
    needed), of which ``num_prompt`` are the prompt's, the mask of what may be chosen, if ``is_masked``, and what is
    added, if ``is_biased``. So this stays small, whatever a client gives.
    """

    row: int
    table_row: int
    is_masked: bool
    is_biased: bool
    repetition: float
    frequency: float
    presence: float
    num_prompt: int
    num_tokens: int


class Top(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Report the ``count`` likeliest tokens of one row."""

    row: int
    count: int


class Scored(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Report how likely ``targets`` were, each after the hidden state before it.

    They begin behind the first ``skipped`` tokens of the sequence ``entry``. With each, the ``count`` likeliest.
    """

    entry: int
    skipped: int
    targets: bytes
    count: int


class Tops(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Answer to ``Top``."""

    row: int
    tokens: bytes
    logprobs: bytes


class Score(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Answer to ``Scored``; ``top_tokens`` and ``top_logprobs`` have those of each target, one after the other."""

    entry: int
    targets: bytes
    logprobs: bytes
    ranks: bytes
    top_tokens: bytes
    top_logprobs: bytes


class ToWorker(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag=True):
    """Base of what a worker may receive."""


class RunStep(ToWorker, frozen=True, kw_only=True, array_like=True, tag=True):
    """One micro-batch. Sent to every stage; only the first needs ``tokens``, only the last what follows them.

    ``rows[i]`` is the sequence's row in the shared block table, ``starts[i]`` the position of its first new token and
    ``counts[i]`` how many there are. ``sampled`` lists the sequences (by index) whose next token is wanted.
    ``adapters[i]`` is the number of its adapter, 0 for none; empty where no sequence has one.
    """

    step_id: int
    generation: int
    rows: bytes
    starts: bytes
    counts: bytes
    tokens: bytes
    sampled: bytes
    draws: list[Draw]
    logprobs: bool
    shapes: list[Shape] = []
    tops: list[Top] = []
    scored: list[Scored] = []
    adapters: bytes = b""


class Hidden(ToWorker, frozen=True, kw_only=True, array_like=True, tag=True):
    """The previous stage's output lies in the outbox of ``source``."""

    step_id: int
    generation: int
    source: int


class Prepare(ToWorker, frozen=True, kw_only=True, array_like=True, tag=True):
    """Get the layers of ``spec`` ready beside those already held."""

    handover: int
    spec: StageSpec


class Loaded(ToWorker, frozen=True, kw_only=True, array_like=True, tag=True):
    """From a worker's loading thread to its own loop: the weights are mapped and in memory."""

    handover: int


class CopyOut(ToWorker, frozen=True, kw_only=True, array_like=True, tag=True):
    """Put these token slots of these decoders into the staging area ``buffer`` and tell ``target``."""

    handover: int
    ticket: int
    target: int
    buffer: int
    decoders: list[int]
    slots: bytes


class CopyIn(ToWorker, frozen=True, kw_only=True, array_like=True, tag=True):
    """Take token slots from the staging area of ``source`` into the KV cache.

    ``busy_s`` of processor time have gone into putting them there.
    """

    handover: int
    ticket: int
    source: int
    buffer: int
    decoders: list[int]
    slots: bytes
    busy_s: float


class Checksum(ToWorker, frozen=True, kw_only=True, array_like=True, tag=True):
    """Report a checksum of the first ``valid`` token slots of each of these KV blocks, in each of these decoders."""

    ticket: int
    decoders: list[int]
    blocks: list[tuple[int, int]]  # KV block id, valid


class Adopt(ToWorker, frozen=True, kw_only=True, array_like=True, tag=True):
    """From here on carry this stage (None: wait without one)."""

    generation: int
    spec: StageSpec | None
    threads: int


class Release(ToWorker, frozen=True, kw_only=True, array_like=True, tag=True):
    """Give back the memory of every layer that the present role does not need."""

    handover: int


class MoveKv(ToWorker, frozen=True, kw_only=True, array_like=True, tag=True):
    """Copy whole KV blocks to free ones, in every decoder of the present role."""

    sources: bytes
    targets: bytes


class BoundKv(ToWorker, frozen=True, kw_only=True, array_like=True, tag=True):
    """Nothing lies from token slot ``end_slot`` on: give the pages there back, until a later bound says otherwise."""

    ticket: int
    end_slot: int


class KeepAt(ToWorker, frozen=True, kw_only=True, array_like=True, tag=True):
    """Turn to another keeper of parameters, and offer it the layers that are held. An empty address: there is none."""

    address: str


class LoadAdapter(ToWorker, frozen=True, kw_only=True, array_like=True, tag=True):
    """Read a LoRA adapter and have it from the next step on; answered by ``AdapterLoaded``.

    ``config`` and ``weights`` are files, ``directory`` is where they are from. ``at_once``: before any further message,
    by a worker that has no stage yet. Else beside the steps.
    """

    number: int
    name: str
    directory: str
    config: str
    weights: str
    at_once: bool


class AdapterRead(ToWorker, frozen=True, kw_only=True, array_like=True, tag=True):
    """From a worker's reading thread to its own loop: the adapter is in memory, or is known not to get there."""

    number: int


class DropAdapter(ToWorker, frozen=True, kw_only=True, array_like=True, tag=True):
    """No step has this adapter any more."""

    number: int


class ReadStats(ToWorker, frozen=True, kw_only=True, array_like=True, tag=True):
    """Report counters."""

    ticket: int


class ReadSteps(ToWorker, frozen=True, kw_only=True, array_like=True, tag=True):
    """Report the last steps of the stage, and forget them."""

    ticket: int


class ArmFailpoint(ToWorker, frozen=True, kw_only=True, array_like=True, tag=True):
    """For tests. An empty name disarms all."""

    name: str
    action: str


class Exit(ToWorker, frozen=True, kw_only=True, array_like=True, tag=True):
    """End the process."""


class FromWorker(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag=True):
    """Base of what the core may receive."""

    worker: int


class StepDone(FromWorker, frozen=True, kw_only=True, array_like=True, tag=True):
    """Sampled tokens, in the order of ``RunStep.sampled``."""

    step_id: int
    generation: int
    tokens: bytes
    logprobs: bytes
    tops: list[Tops] = []
    scores: list[Score] = []


class Prepared(FromWorker, frozen=True, kw_only=True, array_like=True, tag=True):
    """Progress of ``Prepare``; ``done`` once everything is mapped, faulted in and warmed up."""

    handover: int
    weights_bytes: int
    done: bool


class Failed(FromWorker, frozen=True, kw_only=True, array_like=True, tag=True):
    """A handover task did not work out; the worker itself is well."""

    handover: int
    reason: str


class Copied(FromWorker, frozen=True, kw_only=True, array_like=True, tag=True):
    """The destination has taken what ``CopyOut`` with this ticket sent.

    ``busy_s`` of processor time have gone into both sides of it.
    """

    handover: int
    ticket: int
    busy_s: float


class Checksums(FromWorker, frozen=True, kw_only=True, array_like=True, tag=True):
    """One 32-bit checksum per decoder and KV block, decoders outermost."""

    ticket: int
    values: list[int]


class Released(FromWorker, frozen=True, kw_only=True, array_like=True, tag=True):
    """Answer to ``Release``."""

    handover: int
    weights_bytes: int
    kv_bytes: int


class KvBounded(FromWorker, frozen=True, kw_only=True, array_like=True, tag=True):
    """Answer to ``BoundKv``, once it is done; ``refusal`` says why it could not be, empty: it is."""

    ticket: int
    returned_bytes: int
    refusal: str = ""


class AdapterLoaded(FromWorker, frozen=True, kw_only=True, array_like=True, tag=True):
    """Answer to ``LoadAdapter``: ``refusal`` says why it cannot be had, empty: it is there, and takes ``num_bytes``."""

    number: int
    refusal: str
    num_bytes: int = 0


class Stats(FromWorker, frozen=True, kw_only=True, array_like=True, tag=True):
    """Answer to ``ReadStats``. ``busy_s`` and ``longest_slice_s`` (processor time) are since the process started."""

    ticket: int
    weights_bytes: int
    kv_mapped_bytes: int
    busy_s: float
    longest_slice_s: float


class Steps(FromWorker, frozen=True, kw_only=True, array_like=True, tag=True):
    """Answer to ``ReadSteps``: one entry for each step. ``context`` is that of all sequences, after the step.

    ``parts_s`` says what the time since the last answer went to, by name; it is whole even where steps are left out.
    """

    ticket: int
    tokens: list[int]
    sequences: list[int]
    context: list[int]
    busy_s: list[float]
    parts_s: dict[str, float] = {}


class Crashed(FromWorker, frozen=True, kw_only=True, array_like=True, tag=True):
    """The worker cannot go on and ends; the reason is its last word."""

    reason: str


WorkerCommand = (
    RunStep
    | Hidden
    | Prepare
    | Loaded
    | CopyOut
    | CopyIn
    | Checksum
    | Adopt
    | Release
    | MoveKv
    | BoundKv
    | KeepAt
    | LoadAdapter
    | AdapterRead
    | DropAdapter
    | ReadStats
    | ReadSteps
    | ArmFailpoint
    | Exit
)
WorkerReport = (
    StepDone | Prepared | Failed | Copied | Checksums | Released | KvBounded | AdapterLoaded | Stats | Steps | Crashed
)

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(WorkerCommand).decode
decode_report = msgspec.msgpack.Decoder(WorkerReport).decode
