"""Sets of tokens as bits: 32 a word, the first token in the lowest bit, as llguidance writes them."""

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.int32]


def words_for(vocab_size: int) -> int:
    """Return how many words hold a bit for each token."""
    return -(-vocab_size // 32)


def allow_all(words: Words, vocab_size: int) -> None:
    """Set the bit of every token of the vocabulary."""
    words[:] = -1
    if vocab_size % 32:
        words.view(np.uint32)[-1] = (1 << vocab_size % 32) - 1


def allow_only(words: Words, token_ids: tuple[int, ...]) -> None:
    """Set the bits of these tokens, and no others."""
    bits = np.zeros(len(words) * 32, dtype=np.uint8)
    bits[list(token_ids)] = 1
    words[:] = np.packbits(bits, bitorder="little").view(np.int32)


def forbid(words: Words, token_ids: list[int]) -> None:
    """Clear the bits of these tokens, unless none would be left."""
    before = words.copy()
    ids = np.array(token_ids, dtype=np.int64)
    ids = ids[ids < len(words) * 32]
    np.bitwise_and.at(words.view(np.uint32), ids >> 5, ~(np.uint32(1) << (ids & 31).astype(np.uint32)))
    if not words.any():
        words[:] = before


def is_set(words: Words, size: int) -> npt.NDArray[np.bool_]:
    """Return one boolean per token."""
    return np.unpackbits(words.view(np.uint8), count=size, bitorder="little").view(np.bool_)
