"""Token for token what transformers generates: float32, greedy, at 1, 2 and the most stages."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from engines.errors import UnsupportedByEngine
from tests.support import checkpoints
from tests.support.family_checkpoints import (
    KINDS,
    MAX_MODEL_LEN,
    NUM_DECODERS,
    VARIANTS,
    config_of,
    make_family,
    make_gemma3_that_sees_images,
)
from tests.support.generated import generated_by_transformers
from tests.support.native import CACHE, collect, even, gpt2, layout, llama, move, moved_under, request, running

pytestmark = [pytest.mark.engine, pytest.mark.real_loop]

PROMPT = tuple(range(20, 57))
NEW_TOKENS = 48


def sharded_tied_llama() -> Path:
    return checkpoints.make_llama(
        CACHE / "llama-tied-sharded", num_layers=5, tie_word_embeddings=True, shards=3, seed=3
    )


@pytest.mark.parametrize(
    ("make", "num_decoders"), [(llama, 8), (gpt2, 6), (sharded_tied_llama, 5)], ids=["llama", "gpt2", "tied-sharded"]
)
async def test_tokens_equal_transformers_at_1_2_and_the_most_stages(
    make: Callable[[], Path], num_decoders: int
) -> None:
    directory = make()
    expected = generated_by_transformers(directory, PROMPT, NEW_TOKENS)
    async with running(directory, even(1, num_decoders), threads=0) as engine:  # one stage takes all cores
        assert (await collect(engine, request(PROMPT, max_tokens=NEW_TOKENS)))[0] == expected
        for stages in (2, num_decoders):
            await move(engine, even(stages, num_decoders))
            assert (await collect(engine, request(PROMPT, max_tokens=NEW_TOKENS)))[0] == expected


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"llama", "gpt2", *VARIANTS}))
async def test_every_family_gives_the_tokens_of_transformers_at_any_stages_and_across_refactorings(kind: str) -> None:
    """Tied tables lie in shards. Commit compares the KV blocks of source and destination."""
    directory = make_family(kind, shards=3 if config_of(kind).tie_word_embeddings else 1)
    expected = generated_by_transformers(directory, PROMPT, NEW_TOKENS)
    wanted = request(PROMPT, max_tokens=NEW_TOKENS)
    async with running(directory, even(1, NUM_DECODERS), max_model_len=MAX_MODEL_LEN) as engine:
        assert (await collect(engine, wanted))[0] == expected
        for stages in (2, NUM_DECODERS):
            moving = asyncio.create_task(move(engine, even(stages, NUM_DECODERS)))
            while not moving.done():
                assert (await collect(engine, wanted))[0] == expected
            assert (await moving).epoch is not None
            assert (await collect(engine, wanted))[0] == expected


async def test_of_a_checkpoint_that_sees_images_the_text_part_is_served() -> None:
    directory = make_gemma3_that_sees_images()
    expected = generated_by_transformers(directory, PROMPT, NEW_TOKENS)
    async with running(directory, even(1, NUM_DECODERS), max_model_len=MAX_MODEL_LEN) as engine:
        await move(engine, even(NUM_DECODERS, NUM_DECODERS))
        assert (await collect(engine, request(PROMPT, max_tokens=NEW_TOKENS)))[0] == expected


async def test_an_uneven_start_layout_on_other_devices_gives_the_same() -> None:
    expected = generated_by_transformers(gpt2(), PROMPT, NEW_TOKENS)
    pipeline = layout(1, 5, num_decoders=6, devices=("cpu:7", "cpu:0", "cpu:3"))
    async with running(gpt2(), pipeline) as engine:
        assert (await collect(engine, request(PROMPT, max_tokens=NEW_TOKENS)))[0] == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
async def test_kv_blocks_are_equal_at_commit_in_every_dtype(dtype: str) -> None:
    """Commit compares the checksum of every live KV block on source and destination, and fails if one differs."""
    async with running(llama(), even(2), dtype=dtype) as engine:
        targets = [even(stages) for stages in (4, 1, 2)]
        for tokens, _ in await moved_under(engine, targets, lambda: collect(engine, request(PROMPT, max_tokens=200))):
            assert len(tokens) == 200
        assert engine.epoch == len(targets)


async def test_rotary_positions_that_no_table_holds_are_refused_at_start() -> None:
    words = r"'longrope' is supported up to the 128 tokens .* max_model_len = 128"
    with pytest.raises(UnsupportedByEngine, match=words):
        async with running(make_family("phi3"), even(1, NUM_DECODERS)):
            pass


@pytest.mark.parametrize(
    ("key", "value", "words"), [("rms_norm_eps", "1e-5", "rms_norm_eps"), ("hidden_act", "zeal", "KeyError: 'zeal'")]
)
async def test_a_config_that_transformers_does_not_take_is_refused_in_its_words(
    key: str, value: object, words: str, tmp_path: Path
) -> None:
    for file in llama().iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(UnsupportedByEngine, match=rf"config\.json: transformers refuses it: .*{words}"):
        async with running(tmp_path, even(1)):
            pass


async def test_an_unsupported_model_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "num_hidden_layers": 2}')
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(UnsupportedByEngine, match="mamba"):
        async with running(tmp_path, even(1)):
            pass
