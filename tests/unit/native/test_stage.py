"""Micro-batches through stages, in one process: the tokens of transformers, wherever the cuts lie and the KV moves."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engines.checkpoint import read_checkpoint
from engines.native.messages import Draw, RunStep
from engines.native.stage import Sampled
from planner.model_graph import build_model_graph
from tests.support import checkpoints
from tests.support.family_checkpoints import KINDS, make_family
from tests.unit.native.stages import (
    NEW_TOKENS,
    NUM_DECODERS,
    PROMPT,
    Stages,
    Worker,
    expected_logprob,
    expected_tokens,
    int32,
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make_llama(tmp_path_factory.mktemp("models") / "llama", num_layers=NUM_DECODERS)


@pytest.fixture(params=KINDS)
def directory(request: pytest.FixtureRequest) -> Path:
    return make_family(request.param)


@pytest.fixture
def _rotary_comes_back() -> Iterator[None]:
    """Compiling replaces a function of transformers' modules, which other tests use."""
    modules = [sys.modules[name] for name in list(sys.modules) if name.startswith("transformers.models.")]
    before = [(module, module.apply_rotary_pos_emb) for module in modules if hasattr(module, "apply_rotary_pos_emb")]
    yield
    for module, function in before:
        module.apply_rotary_pos_emb = function


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


LIKE_LLAMA = ("mistral", "qwen2", "qwen3")


@pytest.mark.usefixtures("_rotary_comes_back")
@pytest.mark.parametrize("cuts", [(), (1, 2, 3)], ids=["one", "four"])
def test_greedy_tokens_of_compiled_families_equal_transformers(
    directory: Path, kernel: Path, cuts: tuple[int, ...]
) -> None:
    expected = expected_tokens(directory)  # before anything of transformers is replaced
    logprob = expected_logprob(directory)
    stages = Stages(directory, kernel, cuts=cuts, compiles=True)
    assert tuple(stages.decode([stages.prefill(chunk=11)], NEW_TOKENS - 1)) == expected
    (_, (told,)) = Stages(directory, kernel, cuts=cuts, compiles=True).step([(0, 0, PROMPT)])
    assert told == pytest.approx(logprob, abs=1e-4)


@pytest.mark.usefixtures("_rotary_comes_back")
@pytest.mark.parametrize("kind", KINDS)
def test_families_like_llama_run_whole_decoders(kind: str, kernel: Path) -> None:
    family = Worker(make_family(kind), kernel, compiles=True).family
    assert (family.compiled is not None) == (kind in LIKE_LLAMA or family.config.model_type == "llama")


@pytest.mark.usefixtures("_rotary_comes_back")
@pytest.mark.parametrize("kind", LIKE_LLAMA)
def test_a_token_has_the_same_bits_alone_and_in_a_batch(kind: str, kernel: Path) -> None:
    """Products, attention and all: what a token becomes does not depend on who else is there, nor on chunks."""
    alone, crowded = (Stages(make_family(kind), kernel, compiles=True) for _ in range(2))
    (first, (logprob,)) = alone.step([(0, 0, PROMPT)])
    # So many rows that their products are computed otherwise:
    crowded.step([(1, 0, list(range(100, 150))), (0, 0, PROMPT[:9])])
    (tokens, logprobs) = crowded.step([(0, 9, PROMPT[9:]), (1, 50, [7])])
    assert (tokens[0], logprobs[0]) == (first[0], logprob)


@pytest.mark.usefixtures("_rotary_comes_back")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["gemma2", "mixtral", "opt", "qwen2"])
def test_weights_in_16_bits_stay_so_and_are_computed_in_float32(kind: str, dtype: str, kernel: Path) -> None:
    directory = make_family(kind, dtype=dtype)
    expected = expected_tokens(directory)
    stages = Stages(directory, kernel, cuts=(2,), compiles=True)
    assert tuple(stages.decode([stages.prefill()], NEW_TOKENS - 1)) == expected
    worker = stages.workers[1]
    assert worker.family.linear is not None
    if worker.family.linear.reads(getattr(torch, dtype)):
        assert worker.family.model.lm_head.weight.dtype is getattr(torch, dtype)
        assert worker.layers.weights_bytes < 0.75 * converted_bytes(directory, kernel)


def converted_bytes(directory: Path, kernel: Path) -> int:
    """Return the bytes of the same layers with every weight converted."""
    return Stages(directory, kernel, cuts=(2,)).workers[1].layers.weights_bytes


@pytest.mark.usefixtures("_rotary_comes_back")
def test_a_decoder_that_left_is_forgotten_and_comes_back(llama: Path, kernel: Path) -> None:
    stages = Stages(llama, kernel, compiles=True)
    tokens = [stages.prefill()]
    layers = stages.workers[0].layers
    layers.drop("2")
    with pytest.raises(KeyError):
        stages.decode([*tokens], 1)
    layers.attach("2", layers.read("2"))
    stages.prefill()
    assert tuple(stages.decode(tokens, NEW_TOKENS - 1)) == expected_tokens(llama)


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
