"""Sets of tokens as bits: 32 a word, the first token in the lowest bit, as llguidance writes them."""

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.int32]


def words_for(vocab_size: int) -> int:
    """Return how many words hold a bit for each token."""
    return -(-vocab_size // 32)


def mask_from(token_ids: tuple[int, ...], words: Words) -> None:
    """Set the bits of ``token_ids`` in ``words``, and no others."""
    bits = np.zeros(len(words) * 32, dtype=np.uint8)
    bits[list(token_ids)] = 1
    words[:] = np.packbits(bits, bitorder="little").view(np.int32)


def is_set(words: Words, size: int) -> npt.NDArray[np.bool_]:
    """Return one boolean per token."""
    return np.unpackbits(words.view(np.uint8), count=size, bitorder="little").view(np.bool_)
