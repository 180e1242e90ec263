"""What the core has counted since its start, and the engine's counters made of that and of what is now."""

from dataclasses import dataclass

from engines.native.boot import Boot
from engines.native.scheduler import Scheduler
from engines.protocol import EngineCounters


@dataclass(slots=True)
class StepTotals:
    """The core counts here."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    refactorings: int = 0


def counters_of(totals: StepTotals, scheduler: Scheduler, *, boot: Boot, worker_restarts: int) -> EngineCounters:
    """Return totals and readings as the daemon has them of any engine."""
    caches = boot.options.prefix_caching
    return EngineCounters(
        running=scheduler.num_running,
        waiting=scheduler.num_waiting,
        kv_blocks_used=scheduler.kv_blocks_used,
        kv_blocks_capacity=scheduler.kv_capacity,
        kv_block_tokens=boot.limits.kv_block_tokens,
        prompt_tokens_total=totals.prompt_tokens,
        generated_tokens_total=totals.generated_tokens,
        preemptions_total=scheduler.preemptions,
        steps_total=totals.steps,
        worker_restarts_total=worker_restarts,
        refactorings_total=totals.refactorings,
        prefix_queried_tokens_total=scheduler.prefix_queries if caches else None,
        prefix_hit_tokens_total=scheduler.prefix_hits if caches else None,
        kv_blocks_cached=scheduler.kv_blocks_cached if caches else None,
        kv_device_bytes=boot.options.kv_device_bytes or None,
    )
