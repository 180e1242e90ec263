"""Small random checkpoints in the format of Hugging Face, for tests and benchmarks.

The weights are noise, wide enough that greedy output varies, and equal for equal arguments. Greedy output never has a
special token in it, hence never ends by itself. A checkpoint that is already there with the same arguments is kept.
"""

from __future__ import annotations

import argparse
import inspect
import json
import shutil
import tempfile
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

BOS, EOS = "<|begin|>", "<|end|>"
SPECIAL_TOKENS = [BOS, EOS, "<|system|>", "<|user|>", "<|assistant|>"]  # the first ids
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
COMPLETE = ".complete"  # holds the arguments; written last


def make_llama(
    directory: Path,
    *,
    num_layers: int = 8,
    hidden_size: int = 64,
    intermediate_size: int = 176,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    vocab_size: int = 512,
    max_position_embeddings: int = 2048,
    initializer_range: float = 0.15,
    tie_word_embeddings: bool = False,
    dtype: str = "float32",
    shards: int = 1,
    seed: int = 0,
) -> Path:
    """Make a Llama in ``directory`` unless it is there, and return ``directory``."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        num_hidden_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
        initializer_range=initializer_range,
        tie_word_embeddings=tie_word_embeddings,
        dtype=dtype,
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(EOS),
    )
    return make(directory, config, shards=shards, seed=seed)


def make_untied(directory: Path, *, of: Path) -> Path:
    """Copy the checkpoint ``of`` with a head of its own that equals the embedding to which it was tied.

    Both give the same text; some engines cut only the copy into several pipeline ranks.
    """
    from safetensors.torch import load_file, save_file

    if (directory / COMPLETE).is_file():
        return directory
    shutil.copytree(of, directory, dirs_exist_ok=True)
    tensors = load_file(of / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((of / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    (directory / COMPLETE).write_text("")
    return directory


def make_gpt2(
    directory: Path,
    *,
    num_layers: int = 6,
    hidden_size: int = 64,
    num_heads: int = 4,
    vocab_size: int = 512,
    max_position_embeddings: int = 1024,
    initializer_range: float = 0.3,
    dtype: str = "float32",
    shards: int = 1,
    seed: int = 0,
) -> Path:
    """Make a GPT-2, whose embeddings are tied, in ``directory`` unless it is there, and return ``directory``."""
    from transformers import GPT2Config

    config = GPT2Config(
        n_layer=num_layers,
        n_embd=hidden_size,
        n_head=num_heads,
        vocab_size=vocab_size,
        n_positions=max_position_embeddings,
        initializer_range=initializer_range,
        dtype=dtype,
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(EOS),
    )
    return make(directory, config, shards=shards, seed=seed)


def bench_llama(directory: Path) -> Path:
    """Make the Llama of the benchmarks (8 layers, 8.4 M parameters) in ``directory`` unless it is there."""
    return make_llama(
        directory,
        hidden_size=256,
        intermediate_size=688,
        num_kv_heads=4,
        vocab_size=4096,
        max_position_embeddings=4096,
        initializer_range=0.08,
    )


def causal_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return the language model that ``config`` describes."""
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=config.dtype)  # type: ignore[no-untyped-call]
    return model


def make(
    directory: Path,
    config: PretrainedConfig,
    *,
    model_of: Callable[[PretrainedConfig], PreTrainedModel] = causal_model,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    num_tokens: int | None = None,
    finish: Callable[[Path], None] | None = None,
    shards: int = 1,
    seed: int = 0,
) -> Path:
    """Make the checkpoint beside ``directory`` and rename it, so that nobody ever sees half of one.

    Args:
        num_tokens: Of the tokenizer, where it has fewer than the model has rows for.
        finish: Changes the files before that; it is known by its name where a checkpoint is there already.
    """
    import torch

    finished = f"{finish.__qualname__}, " if finish is not None else ""
    arguments = f"{finished}shards {shards}, seed {seed}, {config.to_json_string()}"
    if _is_complete(directory, arguments):
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        tokens = num_tokens or config.get_text_config().vocab_size
        _write_tokenizer(scratch, vocab_size=tokens, special_tokens=special_tokens)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_of(config)
            model.get_output_embeddings().weight.data[: len(special_tokens)] = 0
        model.save_pretrained(scratch)
        if finish is not None:
            finish(scratch)
        if shards > 1:
            _shard(scratch, shards)
        (scratch / COMPLETE).write_text(arguments)
        _put_in_place(scratch, directory, arguments)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return directory


def _is_complete(directory: Path, arguments: str) -> bool:
    marker = directory / COMPLETE
    return marker.is_file() and marker.read_text() == arguments


def _put_in_place(scratch: Path, directory: Path, arguments: str) -> None:
    scratch.chmod(0o755)
    if directory.exists() and not _is_complete(directory, arguments):
        shutil.rmtree(directory)
    try:
        scratch.rename(directory)
    except OSError:  # another process was faster
        if not _is_complete(directory, arguments):
            raise


def _write_tokenizer(directory: Path, *, vocab_size: int, special_tokens: Sequence[str]) -> None:
    """Write a byte-level BPE tokenizer of exactly ``vocab_size`` tokens, trained on the standard library."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((inspect.getsource(module) for module in (argparse, inspect, typing)), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, not {vocab_size}")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS, chat_template=CHAT_TEMPLATE
    )
    wrapped.save_pretrained(directory, save_jinja_files=False)
    path = directory / "tokenizer_config.json"
    # Other releases of transformers know the tokenizer by this name.
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2))


def _shard(directory: Path, count: int) -> None:
    """Split model.safetensors into ``count`` files, with the index that belongs to them."""
    from safetensors.torch import load_file, save_file

    whole = directory / "model.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    weight_map = dict[str, str]()
    for shard in range(count):
        file = f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
        part = names[len(names) * shard // count : len(names) * (shard + 1) // count]
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    whole.unlink()
