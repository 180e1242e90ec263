"""Times of pipelines that share their devices in other ways: what two of the baselines are made of."""

from collections.abc import Callable
from dataclasses import replace

from planner.layer_costs import Batch
from planner.prediction import PipelineTimes


def multiplexed(times: PipelineTimes, *, overlap: float) -> PipelineTimes:
    """Return times of a pipeline in which prompts run beside decoding on their own share of each GPU.

    Source: Duan et al., MuxServe, ICML 2024: prefill and decoding jobs share a GPU's SMs in space and time, as decoding
    waits for memory and leaves SMs idle. ``overlap``: the part of a prompt's time that is hidden that way.
    """

    def hidden(stage: Callable[[Batch], float]) -> Callable[[Batch], float]:
        def time_s(batch: Batch) -> float:
            if batch.tokens == batch.sequences:
                return stage(batch)
            least = stage(Batch(tokens=1, sequences=1, context_tokens=1))
            return least + (stage(batch) - least) * (1 - overlap)

        return time_s

    return replace(times, stages=tuple(hidden(each) for each in times.stages), stages_beside=())


def sharing_tensors(times: PipelineTimes, *, instances: int) -> PipelineTimes:
    """Return times of instances of a model that share one copy of its parameters, and the devices' time.

    Source: Li et al., Tetris, USENIX ATC 2022: instances in one place map the same tensors, so memory is saved; each
    runs its own batches, so parameters are read once for each of them.
    """

    def shared(stage: Callable[[Batch], float]) -> Callable[[Batch], float]:
        def time_s(batch: Batch) -> float:
            count = min(instances, batch.sequences)
            part = Batch(
                tokens=max(1, batch.tokens // count),
                sequences=max(1, batch.sequences // count),
                context_tokens=max(batch.tokens // count, batch.context_tokens / count),
            )
            return count * stage(part)

        return time_s

    return replace(times, stages=tuple(shared(each) for each in times.stages), stages_beside=())
