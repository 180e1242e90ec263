"""What is said where a tokenizer's files are missing or broken, as after a download that was interrupted."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from engines.text.client import TextService
from engines.text.errors import TextStartFailed
from engines.text.tokenizer_files import hint_at

WHOLE = {"tokenizer.json": "{}", "tokenizer_config.json": '{"tokenizer_class": "GPT2Tokenizer"}'}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:1f2e\n"


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        (WHOLE, ""),
        ({**WHOLE, "tokenizer.json": POINTER}, "tokenizer.json is a git-lfs pointer, not the file: run git lfs pull"),
        ({**WHOLE, "tokenizer.json": '{"a'}, "tokenizer.json is not valid JSON: "),
        ({**WHOLE, "special_tokens_map.json": "[]"}, "special_tokens_map.json is not a JSON object"),
        ({"tokenizer.model": "x"}, "there is no tokenizer.json, and for tokenizer.model sentencepiece, tiktoken or "),
        ({}, "there is no tokenizer.json"),
    ],
)
def test_the_file_that_is_wrong_is_named(files: Mapping[str, str], hint: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert hint_at(tmp_path).startswith(hint)
    assert bool(hint_at(tmp_path)) is bool(hint)


@pytest.mark.real_loop
async def test_a_tokenizer_without_words_does_not_start(tmp_path: Path) -> None:
    """transformers makes one of a class name alone, which reads any text as none."""
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    service = TextService(model=tmp_path)
    with pytest.raises(TextStartFailed, match=r"no tokenizer can be read from .*: there is no tokenizer\.json$"):
        await service.start()
    await service.close()
