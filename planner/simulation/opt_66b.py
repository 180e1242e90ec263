"""OPT-66B as FlexPipe's table has it, in the simulator's terms: for simulations without a model or a profile.

The table (section on motivation) gives load time, compute of a stage, communication and largest batch for 4 to 32
stages, "one request batch, sequence 4096", on A100s of 80 GB. What it leaves open is decided here:

- The largest batch is 32 sequences for each stage at every depth, so the compute of a stage is taken as one decoding
  step of a micro-batch of 32 sequences with 4096 tokens each. Reading the stage's weights once is a fixed part of it;
  the rest is in proportion to the tokens in the KV cache. (Reading 32 x 4096 tokens of KV at 4 stages takes 41 ms at
  the card's bandwidth, and the weights 16 ms, of the table's 70 ms.)
- Prompts are bound by arithmetic: 2 FLOPs for each parameter and token, at half of the card's peak.
- All those sequences do not fit the memory of four such cards. The KV capacity here is what memory allows.
- Warm starts: parameters over PCIe from host memory, and a second for everything else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from planner.layer_costs import Batch
from planner.prediction import PipelineTimes
from planner.simulation.shape import Shape, Shapes

WEIGHT_BYTES: Final = 120e9
KV_BYTES_PER_TOKEN: Final = 2 * 64 * 9216 * 2  # keys and values of 64 decoders in fp16
DEVICE_BYTES: Final = 80 * 10**9
_USABLE: Final = 0.9
_BANDWIDTH_BYTES_PER_S: Final = 1.9e12
_FLOPS_PER_S: Final = 312e12 * 0.5
_PARAMETERS: Final = 66e9
_PCIE_BYTES_PER_S: Final = 20e9
_TABLE_SEQUENCES, _TABLE_CONTEXT = 32, 4096
_HOP_S: Final = 0.0021
_STEP_TOKENS: Final = 2048
_LEAST_KV_TOKENS: Final = 24_000  # 16 conversations
_PAUSE_S: Final = 0.010
_PROCESS_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    num_stages: int
    load_s: float
    compute_s: float
    max_batch: int


TABLE: Final = (
    Row(num_stages=4, load_s=47.14, compute_s=0.06994, max_batch=128),
    Row(num_stages=8, load_s=13.05, compute_s=0.03663, max_batch=256),
    Row(num_stages=16, load_s=9.19, compute_s=0.01867, max_batch=512),
    Row(num_stages=32, load_s=5.43, compute_s=0.00967, max_batch=1024),
)


def shapes() -> Shapes:
    """Return the granularities of the table."""
    return {row.num_stages: _shape(row) for row in TABLE}


def _shape(row: Row) -> Shape:
    stages = row.num_stages
    kv_bytes = KV_BYTES_PER_TOKEN / stages
    weight_bytes = int(WEIGHT_BYTES / stages)
    warm_s = weight_bytes / _PCIE_BYTES_PER_S + _PROCESS_S
    return Shape(
        num_stages=stages,
        times=PipelineTimes(
            stages=(_stage_time(row),) * stages,
            hops=(lambda _tokens: _HOP_S,) * (stages - 1),
            kv_capacity_tokens=int((DEVICE_BYTES * _USABLE - weight_bytes) / kv_bytes),
            max_sequences=row.max_batch,
            max_step_tokens=_STEP_TOKENS,
        ),
        stage_weight_bytes=weight_bytes,
        stage_kv_bytes_per_token=kv_bytes,
        min_kv_tokens=_LEAST_KV_TOKENS,
        cold_s=row.load_s,
        warm_s=min(warm_s, row.load_s),
        prepare_s=min(warm_s, row.load_s),
        pause_s=_PAUSE_S,
    )


def _stage_time(row: Row) -> Callable[[Batch], float]:
    weights_s = WEIGHT_BYTES / row.num_stages / _BANDWIDTH_BYTES_PER_S
    context_s = (row.compute_s - weights_s) / (_TABLE_SEQUENCES * _TABLE_CONTEXT)
    token_s = 2 * _PARAMETERS / row.num_stages / _FLOPS_PER_S

    def time_s(batch: Batch) -> float:
        """Weights are read while arithmetic goes on, so the longer of the two counts."""
        return max(weights_s, batch.tokens * token_s) + batch.context_tokens * context_s

    return time_s
