"""A model without arithmetic that lives by its KV cache: whoever reads another's slot, or a stale one, goes wrong."""

from collections.abc import Iterable
from zlib import crc32

import numpy as np

from engines.native.batch import Batch, Entry, Output
from engines.native.kv_blocks import KVBlocks
from engines.native.scheduler import Scheduler, SchedulerLimits
from engines.native.sequence import Sequence
from engines.native.transfer import DirtySlots
from engines.protocol import FinishReason, SamplingParams

VOCABULARY = 40


def cell(token: int, before: int) -> int:
    """Return what a token leaves in its slot of the KV cache; it depends on everything before it."""
    return crc32(bytes([token]), before)


def token_after(cells: list[int]) -> int:
    return crc32(np.array(cells, dtype=np.uint32).tobytes()) % VOCABULARY


class Engine:
    """A scheduler with the fake model behind it; ``in_flight`` holds micro-batches, oldest first."""

    def __init__(
        self,
        *,
        num_blocks: int = 100,
        block_tokens: int = 4,
        max_num_seqs: int = 8,
        budget: int = 16,
        max_model_len: int = 64,
        micro_batches: int = 1,
        caches_prefixes: bool = True,
    ) -> None:
        self.limits = SchedulerLimits(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=max_model_len,
            kv_block_tokens=block_tokens,
        )
        self.blocks = KVBlocks(num_blocks=num_blocks)
        self.table = np.zeros((max_num_seqs, -(-max_model_len // block_tokens)), dtype=np.int32)
        self.scheduler = Scheduler(
            limits=self.limits, blocks=self.blocks, table=self.table, caches_prefixes=caches_prefixes
        )
        self.scheduler.micro_batches = micro_batches
        self.cells = dict[int, int]()
        self.in_flight: list[Batch] = []
        self.is_shrinking = False
        self.moved: dict[int, int] | None = None  # cells where the layers are about to be
        self._dirty = DirtySlots(num_slots=0, live=np.empty(0, dtype=np.int64))
        self.outputs: dict[int, list[Output]] = {}
        self.sequences: dict[int, Sequence] = {}

    def add(
        self,
        prompt: Iterable[int],
        *,
        max_tokens: int = 4,
        generated: Iterable[int] = (),
        stop: Iterable[int] = (),
        logprobs: bool = False,
    ) -> Sequence:
        """Submit a request; its key is its order of arrival."""
        order = self.scheduler.take_order()
        sequence = Sequence(
            key=order,
            prompt=list(prompt),
            generated=list(generated),
            sampling=SamplingParams(max_tokens=max_tokens, logprobs=logprobs),
            stop_ids=frozenset(stop),
            order=order,
        )
        self.sequences[order] = sequence
        self.outputs[order] = []
        self.scheduler.add(sequence)
        return sequence

    def dispatch(self) -> Batch | None:
        """Schedule a micro-batch if the stages can take one."""
        if len(self.in_flight) >= self.scheduler.micro_batches:
            return None
        self.relocate(2)
        batch = self.scheduler.schedule()
        if batch is not None:
            self.in_flight.append(batch)
        return batch

    def complete(self) -> list[Output]:
        """Run the oldest micro-batch and take in what it sampled."""
        batch = self.in_flight.pop(0)
        sampled = [token for token in map(self._run, batch.entries) if token is not None]
        if self.moved is not None:
            for entry in batch.entries:
                slots = self.scheduler.slots_of(entry.sequence, entry.start, entry.start + entry.count)
                self._dirty.mark(slots)
        outputs = self.scheduler.finish_step(batch, sampled, [-float(token) for token in sampled])
        for output in outputs:
            self.outputs[output.key].append(output)
        return outputs

    def step(self) -> Batch:
        """Dispatch and complete one micro-batch."""
        batch = self.dispatch()
        assert batch is not None
        self.complete()
        return batch

    def resize(self, capacity: int) -> None:
        """Have another number of KV blocks, as between two steps."""
        self.is_shrinking = capacity < self.scheduler.kv_capacity
        self.scheduler.resize_kv(capacity)

    def relocate(self, most: int) -> list[tuple[int, int]]:
        """Copy KV blocks below the bound as the workers do; once none is above it, what lies there is lost."""
        size = self.limits.kv_block_tokens
        pairs = self.scheduler.relocate(most) if self.is_shrinking else []
        for source, target in pairs:
            for i in range(size):
                if source * size + i in self.cells:
                    self.cells[target * size + i] = self.cells[source * size + i]
        if self.is_shrinking and not self.scheduler.kv_blocks_above:
            self.is_shrinking = False
            end_slot = (self.scheduler.kv_capacity + 1) * size
            self.cells = {slot: cell for slot, cell in self.cells.items() if slot < end_slot}
        return pairs

    def begin_move(self, *, keep: int) -> None:
        """Begin to copy the KV cache to where the layers go, of what nobody uses so many KV blocks."""
        self.scheduler.drop_cached(keep=keep)
        num_slots = (self.blocks.most + 1) * self.limits.kv_block_tokens
        self.moved, self._dirty = {}, DirtySlots(num_slots=num_slots, live=self.scheduler.live_slots())

    def copy_round(self) -> None:
        """Copy what was written since the last round, as far as it is needed."""
        assert self.moved is not None
        self.moved |= {slot: self.cells[slot] for slot in self._dirty.take(self.scheduler.live_slots()).tolist()}

    def end_move(self, *, is_committed: bool) -> None:
        """Go on there, where no step is in flight, or here."""
        if is_committed:
            self.copy_round()
            self.cells = self.moved or {}
        self.moved = None

    def crash(self) -> None:
        """Lose the KV cache and whatever was in flight, a move as well."""
        self.moved = None
        self.in_flight.clear()
        self.cells.clear()
        self.scheduler.recompute_all()

    def run(self, *, max_steps: int = 1000) -> None:
        """Go on to the end of every request."""
        for _ in range(max_steps):
            while self.dispatch() is not None:
                pass
            if not self.in_flight:
                return
            self.complete()
        raise AssertionError(f"requests still unfinished after {max_steps} steps")

    def tokens(self, sequence: Sequence) -> list[int]:
        """Return the tokens that were reported for a request."""
        return [output.token for output in self.outputs[sequence.key] if output.token is not None]

    def finish(self, sequence: Sequence) -> FinishReason | None:
        """Return why a request ended, None if it has not; nothing is ever reported after the end."""
        reports = [output.finish for output in self.outputs[sequence.key]]
        assert all(finish is None for finish in reports[:-1])
        return reports[-1] if reports else None

    def assert_idle(self) -> None:
        """Check that nothing is left of any request but what is kept for others: KV blocks, rows, counters."""
        scheduler = self.scheduler
        assert scheduler.live_blocks() == sorted((block, self.limits.kv_block_tokens) for block in self.blocks.cached)
        scheduler.drop_cached()
        everything = self.blocks.take(self.blocks.capacity)
        assert sorted(everything or ()) == list(range(1, self.blocks.capacity + 1))
        self.blocks.give_back(everything or [])
        assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_live) == (0, 0, 0)
        assert (scheduler.kv_blocks_used, self.blocks.free) == (0, self.blocks.capacity)
        assert len(scheduler.live_slots()) == 0
        assert scheduler.live_blocks() == []

    def _run(self, entry: Entry) -> int | None:
        """Write the entry's new slots and, where a token is wanted, read the whole sequence back by the block table."""
        size = self.limits.kv_block_tokens
        row = self.table[entry.sequence.row]
        slots = [int(row[p // size]) * size + p % size for p in range(entry.start + entry.count)]
        before = self.cells[slots[entry.start - 1]] if entry.start else 0
        for position in range(entry.start, entry.start + entry.count):
            before = cell(entry.sequence.tokens[position], before)
            self.cells[slots[position]] = before
        return token_after([self.cells[slot] for slot in slots]) if entry.samples else None


def undisturbed(
    prompt: Iterable[int], *, max_tokens: int, stop: Iterable[int] = (), max_model_len: int = 64
) -> list[int]:
    """Return what the fake model says to a prompt when nothing else happens."""
    cells: list[int] = []
    for token in prompt:
        cells.append(cell(token, cells[-1] if cells else 0))
    output: list[int] = []
    while True:
        output.append(token_after(cells))
        cells.append(cell(output[-1], cells[-1]))
        if output[-1] in stop or len(output) >= max_tokens or len(cells) >= max_model_len:
            return output


def prompt_of(length: int, *, first: int = 1) -> list[int]:
    """Return tokens that rise from ``first``."""
    return list(range(first, first + length))


def preempting() -> tuple[Engine, Sequence, Sequence]:
    """Two requests of which the younger must give its KV blocks to the older at the next step."""
    engine = Engine(num_blocks=1 + 4, block_tokens=4)
    older, younger = engine.add(prompt_of(4), max_tokens=9), engine.add(prompt_of(4, first=9), max_tokens=9)
    while older.computed < 8:
        engine.step()
    return engine, older, younger


def shape(batch: Batch | None) -> list[tuple[int, int, int, bool]]:
    """Return (key, start, count, samples) of each entry."""
    return [] if batch is None else [(e.sequence.key, e.start, e.count, e.samples) for e in batch.entries]
