"""A directory as ``Qwen/Qwen2.5-0.5B-Instruct`` is downloaded, with random weights: of its shape, or of a smaller one.

Configs have the keys of the hub's files, of an older transformers. The embedding has more rows than the tokenizer has
tokens, the head is tied to it, and the tokens of the chat template were added after the vocabulary was trained.
"""

from __future__ import annotations

import argparse
import inspect
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tests.support.checkpoints import causal_model, make

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig, PreTrainedModel

REAL_SHAPE: Final[Mapping[str, int]] = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
}
SMALL_SHAPE: Final[Mapping[str, int]] = {
    "hidden_size": 56,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 640,
}
_ADDED: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")
_SPECIAL: Final = 3  # of them; the others are text
_TRAINED: Final = 512
_TEMPLATE: Final = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# The splitting rule of Qwen's tokenizers.
_WORDS: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_qwen(directory: Path, *, shape: Mapping[str, int] = SMALL_SHAPE) -> Path:
    """Make the directory unless it is there, and return it. Of the real shape it takes 1 GB, half a minute and 3 GB."""
    from transformers import Qwen2Config

    config = Qwen2Config(
        **shape,
        max_position_embeddings=32768,
        max_window_layers=21,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-6,
        sliding_window=32768,
        use_sliding_window=False,
        tie_word_embeddings=True,
        initializer_range=0.02 if shape is REAL_SHAPE else 0.15,
        dtype="bfloat16",
    )
    return make(directory, config, model_of=_mostly_text, num_tokens=_TRAINED, finish=as_on_the_hub)


def _mostly_text(config: PretrainedConfig) -> PreTrainedModel:
    """Return a model whose greedy answers are text: most rows of the table, for which there is no token, are zero."""
    model = causal_model(config)
    model.get_output_embeddings().weight.data[_TRAINED + 64 :] = 0
    return model


def as_on_the_hub(directory: Path) -> None:
    """Replace configs and tokenizer by files like the hub's."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (directory / name).unlink(missing_ok=True)
    tokenizer = _write_tokenizer(directory)
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    saved = json.loads((directory / "config.json").read_text())
    kept = {key: saved[key] for key in (*REAL_SHAPE, "max_position_embeddings", "max_window_layers", "rms_norm_eps")}
    _write(
        directory / "config.json",
        {
            **kept,
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": pad,
            "eos_token_id": end,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "model_type": "qwen2",
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.43.1",
            "use_cache": True,
            "use_sliding_window": False,
        },
    )
    generation = {"bos_token_id": pad, "pad_token_id": pad, "eos_token_id": [end, pad], "do_sample": True}
    _write(directory / "generation_config.json", {**generation, "temperature": 0.7, "top_p": 0.8, "top_k": 20})


def _write_tokenizer(directory: Path) -> Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated", invert=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_TRAINED, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((inspect.getsource(module) for module in (argparse, inspect, typing)), trainer)
    tokenizer.model.save(str(directory))  # vocab.json and merges.txt
    tokenizer.add_tokens([AddedToken(text, special=i < _SPECIAL, normalized=False) for i, text in enumerate(_ADDED)])
    tokenizer.save(str(directory / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    _write(
        directory / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(tokenizer.token_to_id(text)): {"content": text, **flags, "special": i < _SPECIAL}
                for i, text in enumerate(_ADDED)
            },
            "additional_special_tokens": list(_ADDED[1:_SPECIAL]),
            "bos_token": None,
            "chat_template": _TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 131072,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    return tokenizer


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2))
