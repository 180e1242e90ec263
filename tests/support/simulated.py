"""Small pieces for tests of the simulator: times of a stage as a formula, and one replica under a trace."""

from collections.abc import Sequence

from planner.layer_costs import Batch
from planner.prediction import PipelineTimes
from planner.request_figures import RequestTimes
from planner.simulation.clock import Clock
from planner.simulation.replica import Replica, SimulatedRequest
from planner.simulation.step_times import StepTimes
from planner.traces import TraceRequest

CALL_S, PROMPT_TOKEN_S, TOKEN_S = 0.010, 0.00005, 0.0005


def stage_s(batch: Batch) -> float:
    per_token = TOKEN_S if batch.tokens == batch.sequences else PROMPT_TOKEN_S
    return CALL_S + batch.tokens * per_token


def pipeline_of(
    stages: int = 1, *, slots: int = 64, kv_tokens: int = 0, max_step_tokens: int = 100_000, hop_s: float = 0.001
) -> PipelineTimes:
    """Return a pipeline over which the work of one stage is spread evenly."""
    return PipelineTimes(
        stages=(lambda batch: stage_s(batch) / stages,) * stages,
        hops=(lambda _tokens: hop_s,) * (stages - 1),
        kv_capacity_tokens=kv_tokens or slots * 300,
        max_sequences=slots,
        max_step_tokens=max_step_tokens,
    )


def request(number: int = 0, *, at_s: float = 0.0, prompt: int = 200, output: int = 100) -> SimulatedRequest:
    return SimulatedRequest(number=number, arrival_s=at_s, prompt_tokens=prompt, output_tokens=output)


def served(times: PipelineTimes, trace: Sequence[TraceRequest]) -> list[SimulatedRequest]:
    """Return the requests of a trace after one replica has served them, in order of their end."""
    clock, ended = Clock(), list[SimulatedRequest]()
    replica = Replica(clock, StepTimes(times), name="only", on_end=ended.append)
    for number, each in enumerate(trace):
        made = request(number, at_s=each.arrival_s, prompt=each.prompt_tokens, output=each.output_tokens)
        clock.at(each.arrival_s, lambda made=made: replica.submit(made))  # type: ignore[misc]
    clock.run(until_s=1e9)
    return ended


def times_of(ended: Sequence[SimulatedRequest]) -> list[RequestTimes]:
    return [
        RequestTimes(
            arrival_s=each.arrival_s,
            first_token_s=each.first_token_s,
            end_s=each.end_s,
            prompt_tokens=each.prompt_tokens,
            output_tokens=each.output_tokens,
        )
        for each in ended
    ]
