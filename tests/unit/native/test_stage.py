"""Micro-batches through stages, in one process: the tokens of transformers, wherever the cuts lie and the KV moves."""

from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engines.checkpoint import read_checkpoint
from engines.native.attention import register
from engines.native.families import build_family
from engines.native.kv_memory import KVMemory
from engines.native.messages import Draw, RunStep, StageSpec
from engines.native.shared import SharedMemory, SharedSizes
from engines.native.specs import specs_of
from engines.native.stage import HeldLayers, Sampled, StageRunner
from engines.native.weights import WeightFiles
from planner.layout import pipeline_of
from planner.model_graph import build_model_graph
from tests.support import checkpoints
from tests.support.family_checkpoints import KINDS, make_family

PROMPT = list(range(20, 51))
NEW_TOKENS = 12
BLOCK_TOKENS = 16
NUM_DECODERS = 4
TABLE = np.array([[9, 3, 5, 1], [2, 8, 4, 7]], dtype=np.int32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make_llama(tmp_path_factory.mktemp("models") / "llama", num_layers=NUM_DECODERS)


@pytest.fixture(params=KINDS)
def directory(request: pytest.FixtureRequest) -> Path:
    return make_family(request.param)


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
    return shared


class Worker:
    """A worker without its process."""

    def __init__(self, directory: Path, library: Path | None, *, dtype: torch.dtype = torch.float32) -> None:
        checkpoint = read_checkpoint(directory)
        config = AutoConfig.from_pretrained(directory)
        family = build_family(config, attention=register(library), max_model_len=64, dtype=dtype)
        self.kv = KVMemory(
            num_decoders=NUM_DECODERS,
            num_slots=10 * BLOCK_TOKENS,
            num_kv_heads=family.num_kv_heads,
            head_dim=family.head_dim,
            dtype=dtype,
        )
        weights = WeightFiles(checkpoint, dtype=dtype)
        self.layers = HeldLayers(family, weights, self.kv, checkpoint.tensors)
        self.runner = StageRunner(family, self.kv, shared=shared_memory(), kv_block_tokens=BLOCK_TOKENS)


class Stages:
    """A pipeline whose stages run one after the other."""

    def __init__(
        self,
        directory: Path,
        library: Path | None,
        *,
        cuts: Iterable[int] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._make = partial(Worker, directory, library, dtype=dtype)
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


@pytest.fixture(params=["compiled", "torch"])
def library(request: pytest.FixtureRequest, kernel: Path) -> Path | None:
    return kernel if request.param == "compiled" else None


@pytest.mark.parametrize("cuts", [(), (2,), (1, 2, 3)], ids=["one", "two", "four"])
def test_greedy_tokens_equal_transformers(directory: Path, kernel: Path, cuts: tuple[int, ...]) -> None:
    stages = Stages(directory, kernel, cuts=cuts)
    assert tuple(stages.decode([stages.prefill()], NEW_TOKENS - 1)) == expected_tokens(directory)


def test_the_same_without_a_compiler(directory: Path) -> None:
    stages = Stages(directory, None, cuts=(1,))
    assert tuple(stages.decode([stages.prefill()], NEW_TOKENS - 1)) == expected_tokens(directory)


def test_log_probabilities_equal_transformers(directory: Path, library: Path | None) -> None:
    """Caps on logits change no greedy token, but these."""
    (_, (logprob,)) = Stages(directory, library).step([(0, 0, PROMPT)])
    assert logprob == pytest.approx(expected_logprob(directory), abs=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["gemma2", "mixtral", "qwen2"])
def test_weights_in_16_bits_are_computed_in_either_type(kind: str, dtype: str, kernel: Path) -> None:
    """In float32 token for token; in their own type as near as its rounding lets two orders of summing be."""
    directory = make_family(kind, dtype=dtype)
    stages = Stages(directory, kernel, cuts=(2,))
    assert tuple(stages.decode([stages.prefill()], NEW_TOKENS - 1)) == expected_tokens(directory)
    own: torch.dtype = getattr(torch, dtype)
    (_, (logprob,)) = Stages(directory, kernel, cuts=(2,), dtype=own).step([(0, 0, PROMPT)])
    assert logprob == pytest.approx(expected_logprob(directory, own), abs=0.1 if own is torch.bfloat16 else 0.02)


def test_the_planner_counts_the_kv_cache_that_a_worker_has(directory: Path) -> None:
    checkpoint = read_checkpoint(directory)
    graph = build_model_graph(checkpoint.config, checkpoint.tensors)
    assert {layer.kv_bytes_per_token for layer in graph.decoders} == {2 * Worker(directory, None).kv.row_bytes}


def test_a_prompt_in_chunks_gives_the_same(directory: Path, kernel: Path) -> None:
    stages = Stages(directory, kernel, cuts=(2,))
    assert tuple(stages.decode([stages.prefill(chunk=7)], NEW_TOKENS - 1)) == expected_tokens(directory)


def test_sequences_of_a_batch_do_not_see_each_other(directory: Path, kernel: Path) -> None:
    stages = Stages(directory, kernel, cuts=(1,))
    tokens = [stages.prefill()]
    other = list(range(100, 140))
    (tokens_of_both, _) = stages.step([(1, 0, other), (0, len(PROMPT), [tokens[-1]])])
    tokens.append(tokens_of_both[1])
    assert tuple(stages.decode(tokens, NEW_TOKENS - 2)) == expected_tokens(directory)


@pytest.mark.parametrize("copies", [True, False], ids=["copied", "control"])
def test_decoders_move_with_their_kv_while_a_sequence_decodes(directory: Path, kernel: Path, *, copies: bool) -> None:
    """Decoder 1 goes from worker 0 to 1 after five tokens; the control leaves its KV cache behind."""
    stages = Stages(directory, kernel, cuts=(2,))
    tokens = stages.decode([stages.prefill()], 4)
    if copies:
        stages.move_kv(source=0, target=1, decoders=[1], num_tokens=len(PROMPT) + 4)
    stages.adopt((1,))
    result = tuple(stages.decode(tokens, NEW_TOKENS - 5))
    assert (result == expected_tokens(directory)) is copies


def test_only_drawn_rows_are_drawn_and_log_probabilities_are_told(llama: Path, kernel: Path) -> None:
    stages = Stages(llama, kernel)
    draw = Draw(row=1, temperature=5.0, top_p=1.0, top_k=0, seed=3, position=0)
    tokens, logprobs = stages.step([(0, 0, PROMPT), (1, 0, PROMPT)], draws=[draw])
    assert tokens[0] == expected_tokens(llama)[0] != tokens[1]
    assert 0 > logprobs[0] > logprobs[1]


def test_a_step_that_samples_nothing_says_nothing(llama: Path, kernel: Path) -> None:
    stages = Stages(llama, kernel)
    message = RunStep(
        step_id=1,
        generation=1,
        rows=int32([0]),
        starts=int32([0]),
        counts=int32([3]),
        tokens=int32(PROMPT[:3]),
        sampled=b"",
        draws=[],
        logprobs=True,
    )
    runner = stages.workers[0].runner
    with torch.inference_mode():
        assert runner.sample(message, *runner.forward(stages.specs[0], message, None)) == Sampled()


@pytest.mark.parametrize("layer", ["embedding", "2", "head"])
def test_a_warm_up_touches_kv_block_0_alone(llama: Path, kernel: Path, layer: str) -> None:
    worker = Worker(llama, kernel)
    worker.layers.attach(layer, worker.layers.read(layer))
    worker.kv.keys[2][:] = 7.0
    with torch.inference_mode():
        worker.runner.warm_up(layer)
    assert worker.kv.keys[2][1:].eq(7.0).all()
