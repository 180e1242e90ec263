"""The ``Engine`` protocol: what the daemon needs of anything that runs a model.

Token ids go in and come out: no text, no tokenizer, no HTTP. An engine is one replica, so it runs one pipeline. What
some engines can do besides is in ``engines.offers``.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from engines.offers import KvParcel, KvRange, OwnServer
from planner.handover import HandoverPhase
from planner.layout import Pipeline


class FinishReason(Enum):
    STOP = "stop"  # end-of-sequence or a stop token
    LENGTH = "length"  # max_tokens or the context is used up
    ABORT = "abort"


class GrammarKind(Enum):
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"  # a JSON array of strings
    LARK = "lark"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What an output must keep to; ``parameter`` is where the client said so.

    ``any_whitespace``: between the parts of JSON; else there is none.
    """

    kind: GrammarKind
    source: str
    parameter: str
    any_whitespace: bool = True


TopLogprobs = tuple[tuple[int, float], ...]  # token ids with their log-probabilities, the likeliest first


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. ``temperature`` 0 is greedy.

    A draw depends on ``seed`` and the output position only, so a request goes on exactly wherever it is continued (by
    engines whose capabilities say ``resumes_seeded``). Log-probabilities are those of the model, whatever else is
    asked for.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False  # report the log-probability of each chosen token
    top_logprobs: int = 0  # report so many of the likeliest tokens at each position, too
    prompt_logprobs: int | None = None  # the same of each prompt token but the first; 0: of that token alone
    bad_words: tuple[tuple[int, ...], ...] = ()  # what ``engine_params`` says by this name, as token ids
    grammar: Grammar | None = None  # the output keeps to it, and ends where nothing may follow
    adapter: str = ""  # of the engine's, by name; empty: the model alone
    engine_params: Mapping[str, Any] = field(default_factory=dict, hash=False)  # the engine's own, by its names


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A prompt to continue.

    ``generated_token_ids`` are output tokens that another engine, or this one before it died, has produced already:
    they count towards ``max_tokens`` and output positions and are not reported again. ``kv`` is a parcel that this
    engine has accepted: it is loaded as far as it goes, the rest is computed.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    generated_token_ids: tuple[int, ...] = ()
    kv: KvParcel | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredToken:
    """A prompt token as the model saw it coming; ``rank`` 1 is the likeliest."""

    token_id: int
    logprob: float
    rank: int
    top: TopLogprobs = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenChunk:
    """New tokens of one request, in order. ``logprobs`` has one entry per token when asked for, else it is empty.

    ``top_logprobs`` likewise. ``prompt_logprobs`` come with the first output token, where asked for: one for each
    prompt token but the first. ``finish_reason`` is set on the last chunk, which may hold no token. The end-of-sequence
    or stop token that ended the request is included as the last token, so that a caller's copy is complete.
    ``cached_tokens`` comes with the first output token, where the engine tells it: how many of the prompt's tokens were
    in the KV cache already.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    finish_reason: FinishReason | None = None
    top_logprobs: tuple[TopLogprobs, ...] = ()
    prompt_logprobs: tuple[ScoredToken, ...] = ()
    cached_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCapabilities:
    """What this engine can do, so that callers decide and never try and see."""

    name: str
    max_model_len: int  # tokens, prompt and output together
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    refactors_in_place: bool
    max_stages: int
    tensor_parallel: bool
    generates: bool = True  # False: the model only embeds, classifies or scores, by ``own_server``
    resumes_seeded: bool = True  # a seeded draw goes on exactly where generated tokens are handed in
    compiles_at_first_use: bool = (
        False  # the first requests of a kind make all others wait: it is tried out before it serves
    )
    engine_params: frozenset[str] = frozenset()  # the names that ``SamplingParams.engine_params`` may have
    grammars: bool = False  # ``SamplingParams.grammar``
    top_logprobs: bool = False  # ``SamplingParams.top_logprobs`` and ``prompt_logprobs`` are reported
    adapters: tuple[str, ...] = ()  # the names that ``SamplingParams.adapter`` may have
    changes_adapters: bool = False  # then the engine is an ``AdapterChanges``
    caches_prefixes: bool = False  # the KV cache of a prompt's first tokens is kept for later prompts
    own_server: OwnServer | None = None  # then the engine is an ``OwnRoutes``
    kv_form: str = ""  # engines of equal forms can load each other's KV cache: then the engine is a ``KvTransfers``
    kv_refusal: str = ""  # why there is no form, where the engine knows
    kv_range: KvRange | None = None  # then the engine is a ``KvResizing``
    # Device groups of ranks that are bound to them, in order: the first stage is on the first group, the last stage on
    # the last one, and groups between may have no stage. Empty: any stage may be on any device.
    resident: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStatus:
    """One stage as it stands. ``busy`` is the share of the last seconds spent computing, None at first."""

    index: int
    device_ids: tuple[str, ...]
    first_decoder: int
    end_decoder: int
    pids: tuple[int, ...]
    weights_bytes: int
    kv_mapped_bytes: int
    busy: float | None
    runs: str = ""  # "compiled" or "eager" where the engine has both


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCounters:
    """Totals since start (``_total``) and readings of now. KV blocks are global: each counts once for all stages.

    Of an engine that keeps prefixes: how many tokens of requests were looked for in the KV cache, how many were there,
    and how many KV blocks are kept beside those in use. None: it keeps none, or does not tell.
    ``kv_device_bytes``: what its KV cache may take on each device with a stage; None: it goes by no such budget.
    """

    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_capacity: int
    kv_block_tokens: int
    prompt_tokens_total: int
    generated_tokens_total: int
    preemptions_total: int
    steps_total: int
    worker_restarts_total: int
    refactorings_total: int
    prefix_queried_tokens_total: int | None = None
    prefix_hit_tokens_total: int | None = None
    kv_blocks_cached: int | None = None
    kv_device_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RefactorProgress:
    """One report of a refactoring under way. Counters are cumulative over the refactoring."""

    phase: HandoverPhase
    message: str  # one sentence for people
    elapsed_s: float
    weights_bytes: int = 0
    weights_total_bytes: int = 0
    kv_round: int = 0
    kv_bytes: int = 0  # sent so far
    kv_round_bytes: tuple[int, ...] = ()
    commit_pause_s: float | None = None
    drain_s: float | None = None
    returned_bytes: int = 0  # given back by retire
    epoch: int | None = None
    requests_live: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RefactorCheck:
    """Answer of a feasibility check: memory per device with current and target layouts together, live KV included.

    ``needs_replica``: not feasible in place, for a reason that a second instance with the target layout would not
    have, such as more ranks than are resident. Whether the devices have room for a second instance is another question.
    """

    feasible: bool
    sentences: tuple[str, ...]  # the reason in words, one per device that gains something or fails
    moves: tuple[str, ...] = field(default=())
    needs_replica: bool = False


class Engine(Protocol):
    """One replica of a model, running one pipeline."""

    @property
    def capabilities(self) -> EngineCapabilities:
        """Valid once ``start`` has returned."""

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline in force."""

    @property
    def epoch(self) -> int:
        """Number of the layout in force, raised by each commit."""

    async def start(self, *, on_progress: Callable[[str], None]) -> None:
        """Start processes, load weights, return when ready to serve.

        Raises:
            EngineStartFailed, UnsupportedByEngine
        """

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """Continue the prompt. Closing the iterator aborts the request and frees its KV blocks.

        Raises:
            InvalidRequest: Before the first chunk.
            EngineDied, EngineClosed: At any time; tokens reported so far are valid.
        """

    async def counters(self) -> EngineCounters: ...

    async def stages(self) -> tuple[StageStatus, ...]: ...

    async def check_refactor(self, target: Pipeline) -> RefactorCheck:
        """Say whether ``refactor(target)`` would be accepted, and with which numbers. Moves nothing."""

    def refactor(self, target: Pipeline) -> AsyncIterator[RefactorProgress]:
        """Change the pipeline while serving; the last report has phase DONE. Closing the iterator does not cancel.

        Raises:
            RefactoringBusy, RefactoringRefused, RefactoringAborted, EngineDied
        """

    async def cancel_refactor(self) -> bool:
        """Roll back a refactoring that has not committed; False when there is none or it is past its commit point."""

    async def drain(self) -> None:
        """Return when no request is running or waiting."""

    async def died(self) -> str:
        """Wait until the engine's process ends unasked, and return the reason in words."""

    async def close(self) -> None:
        """End all processes. Idempotent."""
