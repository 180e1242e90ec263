"""How many pipelines of a model fit what is left of a cluster: by stages of any grain, or by whole GPUs of one node.

Pipelines of equal stages are placed one after the other, best fit, until none fits. A stage takes the memory of
its weights, the KV cache of 4,096 tokens and the fixed part; what is left of the device can take another pipeline's.
"""

from bisect import bisect_left
from collections.abc import Sequence

from tests.bench.openb import CARDS, Node
from tests.bench.placement_instances import FIXED_BYTES, ModelShape
from topology.units import GIB

_KV_TOKENS = 4096
_GRAINS = (32, 16, 8, 4)
_TENSOR_PARALLEL = (8, 4)


def pipelines_that_fit(nodes: Sequence[Node], model: ModelShape, *, most: int) -> list[str]:
    """Return the numbers as cells of a table."""
    sizes = [piece.weight_bytes + _KV_TOKENS * piece.kv_bytes_per_token for piece in model.pieces()]
    cells = [str(_by_stages(nodes, sizes, stages=stages, most=most)) for stages in _GRAINS]
    cells += [str(_by_whole_gpus(nodes, sum(sizes), gpus=gpus, most=most)) for gpus in _TENSOR_PARALLEL]
    return cells


def _by_stages(nodes: Sequence[Node], sizes: Sequence[int], *, stages: int, most: int) -> int:
    """Fill the cluster with pipelines of equal stages, the fullest device that has room first."""
    per_stage, more = divmod(len(sizes), stages)
    counts = [per_stage + (stage < more) for stage in range(stages)]
    needs, first = [], 0
    for count in counts:
        needs.append(sum(sizes[first : first + count]) + FIXED_BYTES)
        first += count
    left = sorted(node.free_bytes(gpu) for node in nodes for gpu in range(len(node.used)))
    placed = 0
    while placed < most:
        taken = _best_fit(left, sorted(needs, reverse=True))
        if taken is None:
            break
        left, placed = taken, placed + 1
    return placed


def _best_fit(left: list[int], needs: Sequence[int]) -> list[int] | None:
    """Return what is left once each need has a device of its own, None where there are too few."""
    rest, used = list(left), []
    for need in needs:
        at = bisect_left(rest, need)
        if at == len(rest):
            return None
        used.append(rest.pop(at) - need)
    return sorted(rest + used)


def _by_whole_gpus(nodes: Sequence[Node], total_bytes: int, *, gpus: int, most: int) -> int:
    """Count groups of wholly free GPUs on one node whose memory together holds the model."""
    placed = 0
    for node in nodes:
        memory = CARDS[node.model][0] * GIB - FIXED_BYTES
        free = sum(used == 0 for used in node.used)
        if memory * gpus >= total_bytes:
            placed += free // gpus
    return min(placed, most)
