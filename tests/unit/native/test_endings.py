"""Which tokens end a sequence, by the files that published models have."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from engines.checkpoint import Checkpoint
from engines.errors import UnsupportedByEngine
from engines.native.endings import eos_token_ids

NONE: Mapping[str, object] = {}


def endings(
    directory: Path, *, config: Mapping[str, object] = NONE, generation: Mapping[str, object] = NONE, default: Any = 2
) -> tuple[int, ...]:
    checkpoint = Checkpoint(directory=directory, config=config, generation_config=generation, tensors={}, files=())
    return eos_token_ids(checkpoint, default=default, vocab_size=100)


def write(directory: Path, name: str, value: object) -> None:
    (directory / name).write_text(json.dumps(value))


def test_the_generation_config_comes_before_the_config_and_that_before_the_default(tmp_path: Path) -> None:
    llama3 = {"eos_token_id": [9, 8, 7]}  # end of text, of a message, of a turn
    assert endings(tmp_path, config={"eos_token_id": 8}, generation=llama3) == (9, 8, 7)
    assert endings(tmp_path, config={"eos_token_id": 8}, generation={"eos_token_id": None}) == (8,)
    assert endings(tmp_path, config={"eos_token_id": [8]}) == (8,)
    assert endings(tmp_path) == (2,)
    assert endings(tmp_path, default=None) == ()
    assert endings(tmp_path, generation={"eos_token_id": []}) == ()


def test_the_tokenizers_own_ends_a_sequence_too(tmp_path: Path) -> None:
    """Chat models made of others often name the new end of an answer there alone."""
    added = {"32": {"content": "<|im_end|>", "special": True}, "2": {"content": "</s>"}}
    write(tmp_path, "tokenizer_config.json", {"eos_token": "<|im_end|>", "added_tokens_decoder": added})
    assert endings(tmp_path, config={"eos_token_id": 2}) == (2, 32)
    write(tmp_path, "tokenizer_config.json", {"eos_token": {"content": "<|im_end|>"}})
    assert endings(tmp_path) == (2,)  # nothing says which one that is
    write(tmp_path, "tokenizer.json", {"added_tokens": [{"id": 33, "content": "<|im_end|>"}]})
    assert endings(tmp_path) == (2, 33)
    (tmp_path / "tokenizer_config.json").write_text("version https://git-lfs.github.com/spec/v1")
    assert endings(tmp_path) == (2,)


def test_what_is_no_token_is_refused_and_what_cannot_come_is_left_out(tmp_path: Path) -> None:
    assert endings(tmp_path, generation={"eos_token_id": [5, 100, -1, 5]}) == (5,)
    for wrong in ("2", [2, "3"], True, [[1]], 2.5):
        with pytest.raises(UnsupportedByEngine, match=r"generation_config\.json: eos_token_id must be a token id or"):
            endings(tmp_path, generation={"eos_token_id": wrong})
