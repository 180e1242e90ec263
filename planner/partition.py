"""Cutting a model into stages: bytes of a stage, the most even cuts, and why a number of stages cannot fit.

The cuts here know nothing of devices, so what they reach is a bound for ``planner.even_pipeline``, which does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import add

from planner.model_graph import ModelGraph
from planner.plan import PlanRequest
from topology.units import format_bytes, format_bytes_apart


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCosts:
    """Bytes to place. A piece is the decoders between two neighbouring legal cuts; cuts here count pieces.

    ``first`` and ``last`` are what the first and the last stage hold besides, ``fixed`` what every stage does.
    """

    pieces: tuple[int, ...]
    first: int = 0
    last: int = 0
    fixed: int = 0

    @property
    def total_bytes(self) -> int:
        """All but what every stage holds."""
        return sum(self.pieces) + self.first + self.last

    def bytes_of_cuts(self, cuts: Sequence[int]) -> tuple[int, ...]:
        """Return the bytes of each stage. Each cut is the first piece of the next stage."""
        total = list(accumulate(self.pieces, initial=0))
        sizes = [total[end] - total[first] + self.fixed for first, end in pairwise((0, *cuts, len(self.pieces)))]
        sizes[0] += self.first
        sizes[-1] += self.last
        return tuple(sizes)


def piece_bounds(graph: ModelGraph) -> tuple[int, ...]:
    """Return the first decoder of each piece, and the number of decoders at the end."""
    return (0, *graph.legal_cuts, graph.num_decoders)


def stage_costs(request: PlanRequest, num_stages: int) -> StageCosts:
    """Return the bytes that ``request`` has to place on ``num_stages`` stages."""
    graph = request.graph
    shared = graph.shared_bytes if num_stages == 1 else 0  # a tied table is held once where both ends are together
    sizes = [layer.weight_bytes + request.kv_bytes_per_decoder for layer in graph.decoders]
    return StageCosts(
        pieces=tuple(sum(sizes[first:end]) for first, end in pairwise(piece_bounds(graph))),
        first=graph.embedding.weight_bytes,
        last=graph.head.weight_bytes - shared,
        fixed=request.workspace_bytes,
    )


def unevenness(sizes: Sequence[int]) -> int:
    """Return how far stages are from equal: the sum over stages of ``|bytes * number of stages - total|``."""
    total = sum(sizes)
    return sum(abs(size * len(sizes) - total) for size in sizes)


def even_cuts(costs: StageCosts, num_stages: int) -> tuple[int, ...]:
    """Return the cuts whose largest stage is smallest, and among those the least uneven; ties go to later cuts.

    Exact, by dynamic programming over (stage, first piece): once for the largest stage, once for the rest.

    Raises:
        ValueError: There are fewer pieces than stages, or no stage.
    """
    count = len(costs.pieces)
    if not 1 <= num_stages <= count:
        raise ValueError(f"{count} pieces cannot be cut into {num_stages} stages")
    total = tuple(accumulate(costs.pieces, initial=0))
    whole = total[-1] + costs.first + costs.last

    def size(stage: int, first: int, end: int) -> int:
        extra = (costs.first if stage == 0 else 0) + (costs.last if stage == num_stages - 1 else 0)
        return total[end] - total[first] + extra

    def uneven(stage: int, first: int, end: int) -> int | None:
        taken = size(stage, first, end)
        return abs(taken * num_stages - whole) if taken <= largest else None

    largest, _ = _best_cuts(count, num_stages, size, max)
    return _best_cuts(count, num_stages, uneven, add)[1]


def _best_cuts(
    count: int,
    num_stages: int,
    price: Callable[[int, int, int], int | None],
    join: Callable[[int, int], int],
) -> tuple[int, tuple[int, ...]]:
    """Return the lowest joined price of all stages and its cuts. ``price`` None forbids a stage; one way must exist."""
    best = {count: 0}  # price of the stages from the current one on, by first piece
    choices: list[dict[int, int]] = []  # end of the stage, by first piece; last stage first
    for stage in reversed(range(num_stages)):
        found: dict[int, tuple[int, int]] = {}
        for first in (0,) if stage == 0 else range(stage, count - (num_stages - stage) + 1):
            for end, rest in best.items():
                own = price(stage, first, end) if end > first else None
                if own is not None and (first not in found or (join(own, rest), -end) < found[first]):
                    found[first] = (join(own, rest), -end)
        best = {first: joined for first, (joined, _) in found.items()}
        choices.append({first: -end for first, (_, end) in found.items()})
    cuts = [0]
    for ends in reversed(choices):
        cuts.append(ends[cuts[-1]])
    return best[0], tuple(cuts[1:-1])


def stage_limit_sentence(*, num_decoders: int, num_devices: int) -> str:
    """Return how many stages there can be at most, and why."""
    limit = min(num_decoders, num_devices)
    layers = "1 decoder layer" if num_decoders == 1 else f"{num_decoders} decoder layers"
    devices = "1 device is" if num_devices == 1 else f"{num_devices} devices are"
    return f"the model has {layers} and {devices} here, so at most {limit} {'stage' if limit == 1 else 'stages'}"


def why_too_big(request: PlanRequest, num_stages: int) -> str | None:
    """Return why ``num_stages`` stages cannot fit the devices, with numbers, as far as that is plain without a search.

    None is no promise: which stage goes where is for the solver to find.
    """
    sizes = sorted((device.memory_usable_bytes for device in request.devices), reverse=True)
    costs = stage_costs(request, num_stages)
    needed, offered = costs.total_bytes + num_stages * costs.fixed, sum(sizes[:num_stages])
    if needed > offered:
        on, offer = _stages_and_offer(num_stages, len(sizes))
        need, have = format_bytes_apart(needed, offered)
        return f"needs {need} {on}, {offer} {have}"
    largest = max(costs.bytes_of_cuts(even_cuts(costs, num_stages)))
    if largest > sizes[0]:
        on = "1 stage" if num_stages == 1 else f"the largest of {num_stages} stages"
        need, have = format_bytes_apart(largest, sizes[0])
        return f"{on} needs at least {need}, the largest device offers {have}"
    return None


def why_no_assignment(request: PlanRequest, num_stages: int) -> str:
    """Return the numbers behind a proof that no choice of cuts and devices fits."""
    costs = stage_costs(request, num_stages)
    needed = costs.total_bytes + num_stages * costs.fixed
    sizes = [device.memory_usable_bytes for device in request.devices]
    beside = " beside what the current layout holds" if request.current else ""
    return (
        f"no way to place {num_stages} stages of {format_bytes(needed)} together fits{beside}: "
        f"{len(sizes)} devices offer {format_bytes(sum(sizes))}, the largest {format_bytes(max(sizes))}"
    )


def _stages_and_offer(num_stages: int, num_devices: int) -> tuple[str, str]:
    on = "on 1 stage" if num_stages == 1 else f"over {num_stages} stages"
    if num_stages == num_devices:
        return on, "the device offers" if num_devices == 1 else f"the {num_devices} devices offer"
    return on, "the largest device offers" if num_stages == 1 else f"the {num_stages} largest devices offer"
