"""What the fake engine decides in a step: who runs, who waits, who gets which token. Plain and synchronous."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from engines.protocol import (
    EngineCapabilities,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    ScoredToken,
    TokenChunk,
    TopLogprobs,
)

NextToken = Callable[[GenerationRequest, int], int]  # request and output position -> token id
_MASK64 = (1 << 64) - 1


def hashed_tokens(vocab_size: int) -> NextToken:
    """Return a token source that depends on prompt, sampling and position only. Greedy ignores the seed."""

    def next_token(request: GenerationRequest, position: int) -> int:
        return _mix(_key_of(request.prompt_token_ids, request.sampling) + position) % vocab_size

    return next_token


def logprob_of(token: int) -> float:
    """Return what the fake calls the log-probability of a token, wherever it stands."""
    return -float(token % 7)


def _key_of(prompt: tuple[int, ...], sampling: SamplingParams) -> int:
    draw = (sampling.seed, sampling.temperature, sampling.top_p, sampling.top_k) if sampling.temperature > 0 else ()
    digest = hashlib.blake2b(repr((hash(prompt), draw)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _mix(value: int) -> int:
    """One round of splitmix64."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


@dataclass(slots=True, eq=False)
class Sequence:
    """One request in the engine. ``kv_blocks`` is 0 while it waits."""

    request: GenerationRequest
    num_generated: int
    kv_blocks: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_token_ids) + self.num_generated


class Batch:
    """Running and waiting sequences with KV accounting.

    When KV runs out the youngest running sequence goes back to the head of the queue, so one always goes on.

    Raises:
        ValueError: The KV capacity cannot hold one request of ``max_model_len``.
    """

    def __init__(
        self,
        *,
        capabilities: EngineCapabilities,
        next_token: NextToken,
        kv_block_tokens: int,
        kv_blocks_capacity: int,
        max_running: int,
    ) -> None:
        if kv_block_tokens * kv_blocks_capacity <= capabilities.max_model_len:
            raise ValueError("the KV capacity must hold one request of max_model_len")
        self.kv_block_tokens = kv_block_tokens
        self.kv_blocks_capacity = kv_blocks_capacity
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.generated_tokens_total = 0
        self.preemptions_total = 0
        self.steps_total = 0
        self._capabilities = capabilities
        self._next_token = next_token
        self._max_running = max_running

    @property
    def kv_blocks_used(self) -> int:
        return sum(sequence.kv_blocks for sequence in self.running)

    @property
    def num_live(self) -> int:
        return len(self.running) + len(self.waiting)

    def add(self, request: GenerationRequest) -> Sequence:
        sequence = Sequence(request=request, num_generated=len(request.generated_token_ids))
        self.waiting.append(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Forget ``sequence`` wherever it stands. Idempotent."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def step(self) -> Iterator[tuple[Sequence, TokenChunk]]:
        """Admit what fits, then give every running sequence a token; those that finish are removed."""
        self._admit()
        self.steps_total += bool(self.running)
        for sequence in tuple(self.running):
            if sequence in self.running and self._grow(sequence):
                chunk = self._advance(sequence)
                if chunk.finish_reason is not None:
                    self.running.remove(sequence)
                yield sequence, chunk

    def resize_kv(self, capacity: int) -> None:
        """Have another KV capacity; where less is left than is used, the youngest go back to the queue."""
        self.kv_blocks_capacity = capacity
        while self.kv_blocks_used > capacity:
            self._preempt_youngest()

    def _preempt_youngest(self) -> Sequence:
        victim = self.running.pop()
        victim.kv_blocks = 0
        self.waiting.appendleft(victim)
        self.preemptions_total += 1
        return victim

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._max_running:
            needed = self._kv_blocks_for(self.waiting[0].num_tokens + 1)
            if self.kv_blocks_used + needed > self.kv_blocks_capacity:
                return
            sequence = self.waiting.popleft()
            sequence.kv_blocks = needed
            self.running.append(sequence)

    def _grow(self, sequence: Sequence) -> bool:
        needed = self._kv_blocks_for(sequence.num_tokens + 1)
        if needed == sequence.kv_blocks:
            return True
        while self.kv_blocks_used - sequence.kv_blocks + needed > self.kv_blocks_capacity:
            if self._preempt_youngest() is sequence:
                return False
        sequence.kv_blocks = needed
        return True

    def _advance(self, sequence: Sequence) -> TokenChunk:
        sampling = sequence.request.sampling
        token = self._next_token(sequence.request, sequence.num_generated)
        sequence.num_generated += 1
        self.generated_tokens_total += 1
        finish = None
        if token in sampling.stop_token_ids or (token in self._capabilities.eos_token_ids and not sampling.ignore_eos):
            finish = FinishReason.STOP
        elif sequence.num_generated >= sampling.max_tokens or sequence.num_tokens >= self._capabilities.max_model_len:
            finish = FinishReason.LENGTH
        return TokenChunk(
            token_ids=(token,),
            logprobs=(logprob_of(token),) if sampling.logprobs else (),
            finish_reason=finish,
            top_logprobs=(self._top(token, sampling.top_logprobs),) if sampling.top_logprobs else (),
            prompt_logprobs=self._scored(sequence) if sequence.num_generated == 1 else (),
        )

    def _top(self, token: int, count: int) -> TopLogprobs:
        vocab_size = self._capabilities.vocab_size
        return tuple(((token + i) % vocab_size, logprob_of(token) - i) for i in range(min(count, vocab_size)))

    def _scored(self, sequence: Sequence) -> tuple[ScoredToken, ...]:
        count = sequence.request.sampling.prompt_logprobs
        if count is None:
            return ()
        return tuple(
            ScoredToken(token_id=token, logprob=logprob_of(token), rank=1, top=self._top(token, count))
            for token in sequence.request.prompt_token_ids[1:]
        )

    def _kv_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.kv_block_tokens)
