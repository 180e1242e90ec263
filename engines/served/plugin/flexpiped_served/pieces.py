"""Cuts what a handover copies into pieces that each fit a buffer and go to one destination. Pure."""

from collections.abc import Iterator, Mapping, Sequence

Piece = tuple[list[int], list[int]]  # layers, KV block ids


def pieces_of(
    target_of: Mapping[int, int], blocks: Sequence[int], *, block_bytes: int, buffer_bytes: int
) -> Iterator[Piece]:
    """Yield pieces of all layers times all KV blocks.

    Args:
        target_of: The destination of each layer.
        block_bytes: Of one KV block in one layer.
    """
    if not blocks:
        return
    per_buffer = max(1, buffer_bytes // block_bytes)
    for target in sorted(set(target_of.values())):
        layers = sorted(index for index, stage in target_of.items() if stage == target)
        at_once = min(len(layers), max(1, per_buffer // len(blocks)))
        for first in range(0, len(layers), at_once):
            some = layers[first : first + at_once]
            length = max(1, per_buffer // len(some))
            for start in range(0, len(blocks), length):
                yield some, list(blocks[start : start + length])
