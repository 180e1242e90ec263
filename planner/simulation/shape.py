"""What a replica of each granularity is to the simulator: its times, its memory, and what bringing it up takes."""

from dataclasses import dataclass, replace

from planner.prediction import PipelineTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One granularity of the model. Sizes are of the largest stage.

    Attributes:
        times: Of a replica; ``kv_capacity_tokens`` is the most that it uses however much memory there is.
        min_kv_tokens: With less KV cache than this a replica is not worth its devices.
        cold_s, warm_s: Until a new replica serves: parameters from storage, or from the host memory of its hosts.
        prepare_s, pause_s: Of a replica's change to this granularity: the old layout serves meanwhile, then none does.
    """

    num_stages: int
    times: PipelineTimes
    stage_weight_bytes: int
    stage_kv_bytes_per_token: float
    min_kv_tokens: int
    cold_s: float
    warm_s: float
    prepare_s: float = 0.0
    pause_s: float = 0.0

    @property
    def least_bytes(self) -> int:
        """Memory that a device must have free for a stage."""
        return self.stage_weight_bytes + int(self.min_kv_tokens * self.stage_kv_bytes_per_token)

    @property
    def most_bytes(self) -> int:
        return self.stage_weight_bytes + int(self.times.kv_capacity_tokens * self.stage_kv_bytes_per_token)

    def kv_tokens(self, smallest_free_bytes: int) -> int:
        """Return the KV capacity where the fullest device has so much for a stage."""
        if not self.stage_kv_bytes_per_token:
            return self.times.kv_capacity_tokens
        room = int((smallest_free_bytes - self.stage_weight_bytes) / self.stage_kv_bytes_per_token)
        return max(0, min(room, self.times.kv_capacity_tokens))

    def times_with(self, kv_tokens: int) -> PipelineTimes:
        return replace(self.times, kv_capacity_tokens=kv_tokens)


Shapes = dict[int, Shape]  # by number of stages
