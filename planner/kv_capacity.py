"""How many KV blocks a layout has: of one size whatever the layout, or as many as a budget of each device lets it have.

The engine sizes its KV cache by this, and the planner predicts by it what a layout will have.
"""

from dataclasses import dataclass
from itertools import chain

from planner.holdings import holdings, kv_bytes
from planner.layout import Pipeline
from planner.model_graph import ModelGraph


@dataclass(frozen=True, slots=True, kw_only=True)
class KvInAll:
    """So much over all layers together: every layout has as many KV blocks."""

    total_bytes: int
    block_tokens: int

    def blocks(self, graph: ModelGraph, *_pipelines: Pipeline) -> int:
        """Return the number of KV blocks, whichever layouts hold them."""
        return self.total_bytes // max(1, graph.kv_bytes_per_token * self.block_tokens)

    def least_blocks(self, graph: ModelGraph) -> int:
        """Return the number that every layout has."""
        return self.blocks(graph)

    def most_blocks(self, graph: ModelGraph, _num_devices: int) -> int:
        """Return the number that no layout on so many devices exceeds."""
        return self.blocks(graph)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvPerDevice:
    """So much on each device that carries a stage: layouts of more stages have more KV blocks."""

    device_bytes: int
    block_tokens: int

    def blocks(self, graph: ModelGraph, *pipelines: Pipeline) -> int:
        """Return the number of KV blocks, which is that of the device with the most layers.

        Of several pipelines, as in a handover, a device holds the layers of all of them.
        """
        devices = {device for pipeline in pipelines for device in pipeline.device_ids}
        held = [holdings(pipeline, graph) for pipeline in pipelines]
        largest = max(
            kv_bytes(set(chain.from_iterable(each.get(device, ()) for each in held)), slots=self.block_tokens)
            for device in devices
        )
        return self.device_bytes // max(1, largest)

    def tokens(self, graph: ModelGraph, *pipelines: Pipeline) -> int:
        """Return the same as token slots."""
        return self.blocks(graph, *pipelines) * self.block_tokens

    def least_blocks(self, graph: ModelGraph) -> int:
        """Return the number that every layout has: that of all layers on one device."""
        return self.device_bytes // max(1, graph.kv_bytes_per_token * self.block_tokens)

    def most_blocks(self, graph: ModelGraph, num_devices: int) -> int:
        """Return a number that no layout on so many devices exceeds: some device has a fair share, or a whole layer."""
        share = -(-graph.kv_bytes_per_token // num_devices)
        largest = max(share, max(layer.kv_bytes_per_token for layer in graph.layers))
        return self.device_bytes // max(1, largest * self.block_tokens)


KvSize = KvInAll | KvPerDevice
