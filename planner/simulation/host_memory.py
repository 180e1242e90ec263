"""What simulated hosts keep of the model's parameters, by the rule of the daemon (``planner.parameter_cache``). Pure.

A host keeps what its devices have loaded, up to a budget, and gives up first what was loaded longest ago: on GPUs,
which copy parameters, a stage has no use for the host's memory any more once it has them. The model counts as so many
layers of equal size, of which each stage of any granularity has its share.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Final

from planner.parameter_cache import KeptLayer, KeptLayers, added, left, taken

_LAYERS: Final = 64


@cache
def layers_of(stage: int, num_stages: int) -> tuple[str, ...]:
    """Return the layers of one stage by name. Of more stages than layers, neighbours have one in common."""
    first = stage * _LAYERS // num_stages
    end = max(first + 1, (stage + 1) * _LAYERS // num_stages)
    return tuple(str(layer) for layer in range(first, end))


@dataclass(slots=True, kw_only=True)
class HostMemory:
    """That of one host."""

    budget_bytes: int
    kept: KeptLayers = field(default_factory=KeptLayers)
    names: frozenset[str] = field(default=frozenset())

    def has(self, stage: int, num_stages: int) -> bool:
        """Say whether all layers of a stage are kept."""
        return self.names.issuperset(layers_of(stage, num_stages))

    def load(self, stage: int, num_stages: int, *, weight_bytes: int) -> None:
        """Have one device of the host load a stage: from here on its layers are kept, as far as there is room."""
        names = layers_of(stage, num_stages)
        for name in names:
            self._load(KeptLayer(key=name, name=name, num_bytes=weight_bytes // len(names), users=1))
        self.names = frozenset(each.key for each in self.kept.layers)

    def _load(self, layer: KeptLayer) -> None:
        if self.kept.find(layer.key) is not None:
            self.kept = left(taken(self.kept, layer.key), layer.key)
        elif (found := added(self.kept, layer, budget_bytes=self.budget_bytes)) is not None:
            self.kept = left(found[0], layer.key)


def assigned(hosts: Sequence[HostMemory]) -> tuple[tuple[int, ...], bool]:
    """Return which stage each device gets, of devices on these hosts, and whether all find theirs kept.

    In their order each gets the first stage that its host keeps; the stages that are left go to the devices left.
    """
    num_stages = len(hosts)
    left_over, stages = list(range(num_stages)), list[int | None]()
    for host in hosts:
        kept = next((stage for stage in left_over if host.names and host.has(stage, num_stages)), None)
        if kept is not None:
            left_over.remove(kept)
        stages.append(kept)
    is_warm = not left_over
    return tuple(left_over.pop(0) if stage is None else stage for stage in stages), is_warm
