"""Tiny tokenizers, made in milliseconds: byte level as GPT-2 and Llama 3 have it, and SentencePiece's way."""

import functools
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS = "<|begin|>", "<|end|>"
VOCAB_SIZE = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'clown' %}{{ raise_exception('no clowns') }}{% endif %}"
    "{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CORPUS = (
    "Once upon a time there was a pipeline of stages. The quick brown fox jumps over the lazy dog, and over 42 others.",
    "Träume über Flüsse, naïve cafés; 漢字と仮名; привет мир; 🙂🙃 done.\n\n\tdef main() -> None: return None",
)


@functools.cache
def byte_level_tokenizer() -> Tokenizer:
    """Ids 0 and 1 are special (begin, end); the others are bytes and merges, of which many split characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS * 4,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens([AddedToken("<tool> ✓", special=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return tokenizer


@functools.cache
def byte_fallback_tokenizer() -> Tokenizer:
    """Llama 2's way: ``▁`` for spaces, raw bytes for characters outside the vocabulary, one leading space stripped."""
    words = ["▁", "▁Once", "▁upon", "a", "b", "é", "▁the", "漢", "x", " ", "▁▁", ","]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {token: index for index, token in enumerate([BOS, EOS, "<unk>", *byte_tokens, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>", ignore_merges=True))
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def word_piece_tokenizer() -> Tokenizer:
    """BERT's way: what a token reads as depends on whether it is the first."""
    tokens = ["[UNK]", "hello", "##s", "##ing", "world", ".", ",", "'", "do", "n", "t", "漢"]
    tokenizer = Tokenizer(models.WordPiece({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def write_model_directory(directory: Path, *, chat_template: str = CHAT_TEMPLATE) -> Path:
    """Write what the text process needs of a model: tokenizer and chat template."""
    byte_level_tokenizer().save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "chat_template": chat_template,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
