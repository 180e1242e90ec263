"""Micro-batches through stages, in one process; and what transformers says to the same."""

from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engines.checkpoint import read_checkpoint
from engines.native.attention import register
from engines.native.compile_family import compile_family
from engines.native.compute import Compute
from engines.native.context import kv_store_of
from engines.native.families import build_family
from engines.native.messages import Draw, RunStep, StageSpec
from engines.native.shared import SharedMemory, SharedSizes
from engines.native.specs import specs_of
from engines.native.stage import HeldLayers, StageRunner
from engines.native.weights import WeightFiles
from planner.layout import pipeline_of

PROMPT = list(range(20, 51))
NEW_TOKENS = 12
BLOCK_TOKENS = 16
NUM_DECODERS = 4
TABLE = np.array([[9, 3, 5, 1], [2, 8, 4, 7]], dtype=np.int32)
NUM_SLOTS = 10 * BLOCK_TOKENS
IN_PLACE = Compute()


@cache
def expected_tokens(directory: Path) -> tuple[int, ...]:
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompt = torch.tensor([PROMPT])
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return tuple(output[0, len(PROMPT) :].tolist())


@cache
def expected_logprob(directory: Path, dtype: torch.dtype = torch.float32) -> float:
    """Return the log-probability of the first token."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT])).logits[0, -1].float()
    return float(logits.log_softmax(dim=-1).max())


def shared_memory() -> SharedMemory:
    shared = SharedMemory(
        SharedSizes(
            num_workers=1,
            max_num_seqs=2,
            max_blocks_per_seq=4,
            hidden_bytes_per_token=4,
            max_num_batched_tokens=1,
            outbox_slots=1,
            staging_bytes=4,
            max_model_len=64,
            vocab_size=512,
        )
    )
    shared.block_table[:] = TABLE
    shared.kv_end_slot = NUM_SLOTS
    return shared


class Worker:
    """A worker without its process."""

    def __init__(
        self,
        directory: Path,
        library: Path | None,
        *,
        dtype: torch.dtype = torch.float32,
        compute: Compute = IN_PLACE,
        compiles: bool = False,
    ) -> None:
        checkpoint = read_checkpoint(directory)
        config = AutoConfig.from_pretrained(directory)
        family = build_family(config, attention=register(library), max_model_len=64, dtype=dtype)
        if compiles:
            assert library is not None
            compile_family(family, library, kv_block_tokens=BLOCK_TOKENS)
        self.family = family
        if compute.own_memory:
            family.move_to(compute.device)
        shared = shared_memory()
        self.kv = kv_store_of(family, shared, compute, num_slots=NUM_SLOTS)
        weights = WeightFiles(checkpoint, dtype=dtype)
        self.layers = HeldLayers(family, weights, self.kv, checkpoint.tensors, compute=compute)
        self.runner = StageRunner(family, self.kv, shared=shared, kv_block_tokens=BLOCK_TOKENS, compute=compute)


class Stages:
    """A pipeline whose stages run one after the other."""

    def __init__(
        self,
        directory: Path,
        library: Path | None,
        *,
        cuts: Iterable[int] = (),
        dtype: torch.dtype = torch.float32,
        compute: Compute = IN_PLACE,
        compiles: bool = False,
    ) -> None:
        self._make = partial(Worker, directory, library, dtype=dtype, compute=compute, compiles=compiles)
        self.workers: dict[int, Worker] = {}
        self.specs: dict[int, StageSpec] = {}
        self.adopt(cuts)

    def adopt(self, cuts: Iterable[int], *, workers: tuple[int, ...] = (0, 1, 2, 3)) -> None:
        """Take up another layout; the KV cache stays where it was."""
        cuts = list(cuts)
        names = [str(worker) for worker in workers[: len(cuts) + 1]]
        pipeline = pipeline_of(device_ids=names, cuts=cuts, num_decoders=NUM_DECODERS)
        self.specs = specs_of(pipeline, {str(worker): worker for worker in workers})
        for index, spec in self.specs.items():
            if index not in self.workers:
                self.workers[index] = self._make()
            layers = self.workers[index].layers
            for layer in set(spec.layers()) - layers.held:
                layers.attach(layer, layers.read(layer))

    def move_kv(self, *, source: int, target: int, decoders: list[int], num_tokens: int) -> None:
        positions = np.arange(num_tokens)
        slots = TABLE[0, positions // BLOCK_TOKENS] * BLOCK_TOKENS + (positions % BLOCK_TOKENS).astype(np.int32)
        ours, theirs = self.workers[source].kv, self.workers[target].kv
        staging = memoryview(bytearray(2 * len(decoders) * num_tokens * ours.row_bytes))
        ours.read_into(decoders, slots, staging)
        theirs.write_from(decoders, slots, staging)

    def step(
        self, entries: list[tuple[int, int, list[int]]], *, draws: Iterable[Draw] = ()
    ) -> tuple[list[int], list[float]]:
        """Run (row, start, tokens) of each sequence; return the next token of each and its log-probability."""
        message = RunStep(
            step_id=1,
            generation=1,
            rows=int32(row for row, _, _ in entries),
            starts=int32(start for _, start, _ in entries),
            counts=int32(len(tokens) for _, _, tokens in entries),
            tokens=int32(token for _, _, tokens in entries for token in tokens),
            sampled=int32(range(len(entries))),
            draws=list(draws),
            logprobs=True,
        )
        hidden: torch.Tensor | None = None
        with torch.inference_mode():
            for index, spec in self.specs.items():
                runner = self.workers[index].runner
                hidden, step = runner.forward(spec, message, hidden)
            assert hidden is not None
            sampled = runner.sample(message, hidden, step)
        return np.frombuffer(sampled.tokens, np.int32).tolist(), np.frombuffer(sampled.logprobs, np.float32).tolist()

    def prefill(self, *, chunk: int = len(PROMPT)) -> int:
        """Run the prompt in row 0; return the first token."""
        token = -1
        for start in range(0, len(PROMPT), chunk):
            ((token,), _) = self.step([(0, start, PROMPT[start : start + chunk])])
        return token

    def decode(self, tokens: list[int], count: int) -> list[int]:
        """Go on in row 0 after ``tokens``; return all of them."""
        for _ in range(count):
            ((token,), _) = self.step([(0, len(PROMPT) + len(tokens) - 1, [tokens[-1]])])
            tokens.append(token)
        return tokens


def int32(values: Iterable[int]) -> bytes:
    return np.fromiter(values, dtype=np.int32).tobytes()
