"""A program: neighbours take GPU memory 64 MiB a look, up to nothing left, and give it back; told by NVML's stand-in.

The daemon's own watch, planner and refactorings see it with a fake engine, in three stories: on one GPU and on all,
with a KV cache that cannot be resized, and on all with one that can. What was told is the last line that is printed.
"""

import asyncio
import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from engines.fake import FAKE_CAPABILITIES, FakeEngine
from engines.protocol import EngineCapabilities
from flexpiped.hardware import host_topology
from flexpiped.neighbourhood import Neighbourhood
from flexpiped.settings import EngineKind, EnginesSettings, Settings, VllmSettings
from flexpiped.target_resolver import PlannerResolver
from planner.layout import Pipeline, pipeline_of
from planner.neighbourhood import NeighbourConstants
from tests.support.graphs import weighted_graph
from tests.support.until import until
from tests.support.virtual_time import VirtualTimeLoop
from tests.unit.planner.planning_questions import question
from tests.unit.test_scaling import ScaleStand
from topology.host_memory import FreeMemory
from topology.units import GIB, KIB, MIB

STEP_MIB, LOOK_S = 64, 2.0
_FROM_MIB, _ALL_MIB = 76 * 1024, 80 * 1024 - 512 - 2  # of each GPU: all but what the driver keeps
_KV_BYTES_PER_TOKEN = 64 * KIB  # 4 GiB for all KV blocks of a fake engine
_CONSTANTS = NeighbourConstants(keep_free_bytes=512 * MIB, grow_after_s=30.0)
_GRAPH = weighted_graph([2 * GIB] * 8, kv_bytes_per_token=_KV_BYTES_PER_TOKEN // 8)


class Stand(ScaleStand):
    """One replica of two stages on the first two GPUs, as the planner sees them now."""

    def __init__(self) -> None:
        super().__init__()
        settings = replace(
            Settings(), engine=EngineKind.VLLM, engines=EnginesSettings(vllm=VllmSettings(python=Path("/nowhere")))
        )
        self.now_s = 0.0
        self.topology = lambda: host_topology(settings)
        asked = question(graph=_GRAPH, topology=self.topology())
        self.resolver = PlannerResolver(  # type: ignore[assignment]
            lambda: replace(asked, topology=self.topology()), clock=itertools.repeat(0.0).__next__
        )
        self.watch = Neighbourhood(
            _CONSTANTS,
            replicas=lambda: self.replicas.all,
            kv_bytes_per_token=lambda: _KV_BYTES_PER_TOKEN,
            devices=lambda: self.topology().devices,
            refactorings=self.refactorings,
            events=self.events,
            host=lambda: FreeMemory(free_bytes=64 * GIB, bound="the host"),
            clock=lambda: self.now_s,
        )

    async def begin(self, capabilities: EngineCapabilities) -> None:
        gpus = [device.id for device in self.topology().devices]
        first = pipeline_of(device_ids=gpus[:2], cuts=[4], num_decoders=8)

        def make(pipeline: Pipeline, epoch: int) -> FakeEngine:
            return FakeEngine(pipeline=pipeline, epoch=epoch, capabilities=capabilities)

        self.workshop.engines.append(make(first, 0))
        await self.replicas.add(first, factory=lambda _pipeline, _epoch: self.workshop.engines[0])

    async def look(self) -> list[Any]:
        """Look once, and let what follows end; return what was told, with the layout and the size of the KV cache."""
        before = self.events.last_sequence
        await self.watch.look()
        await until(lambda: self.refactorings.under_way is None)
        self.now_s += LOOK_S
        told = [event for event in self.events.since(before) if event.kind.value == "devices"]
        [engine] = self.replicas.engines
        blocks = (await engine.counters()).kv_blocks_capacity
        return [[event.fields["change"], event.message, list(engine.pipeline.device_ids), blocks] for event in told]


async def story(*gpus: int, capabilities: EngineCapabilities) -> list[Any]:
    """Return what is told while neighbours on these GPUs take all of them, stay a minute, and leave."""
    stand, found = Stand(), list[Any]()
    await stand.begin(capabilities)
    up = range(_FROM_MIB, _ALL_MIB, STEP_MIB)
    for held_mib in (*up, *[_ALL_MIB] * 30, *reversed(up), *[_FROM_MIB] * 30, *[0] * 30):
        os.environ["FAKE_NVML_HELD"] = ",".join(f"{gpu}:999:{held_mib}" for gpu in gpus)
        found += [[held_mib, *told] for told in await stand.look()]
    await stand.refactorings.close()
    await stand.replicas.close()
    return found


async def main() -> None:
    fixed = replace(FAKE_CAPABILITIES, kv_range=None)
    stories = {
        "one": await story(0, capabilities=fixed),
        "all": await story(0, 1, 2, 3, capabilities=fixed),
        "all, resizing": await story(0, 1, 2, 3, capabilities=FAKE_CAPABILITIES),
    }
    print(json.dumps(stories))


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(main())
