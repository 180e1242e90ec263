"""Predictions of what replicas of each granularity would do, by the planner's own model, remembered by lengths."""

from collections.abc import Mapping
from dataclasses import replace
from math import ceil, exp, log

from planner.prediction import Pipeline, Prediction, best_cvs
from planner.simulation.fleet import Fleet
from planner.simulation.shape import Shape, Shapes
from planner.workload import Slo, Workload

_LENGTH_STEP = 0.25  # of their logarithm: lengths this near are answered from the same tables


class Outlooks:
    """Predictions of the shapes by the planner's own model, remembered by lengths."""

    def __init__(self, shapes: Shapes, slo: Slo) -> None:
        self._shapes = shapes
        self._slo = slo
        self._pipelines: dict[tuple[int, int, int, int], Pipeline] = {}
        self._best_cvs: dict[tuple[int, int, int], Mapping[int, float | None]] = {}

    def pipeline(self, shape: Shape, workload: Workload, *, kv_tokens: int) -> Pipeline:
        """Return the tables of a shape for such lengths."""
        prompt, output = _bucket(workload.prompt_tokens_mean), _bucket(workload.output_tokens_mean)
        key = (shape.num_stages, prompt, output, _bucket(kv_tokens))
        if key not in self._pipelines:
            lengths = _lengths(workload, prompt, output)
            self._pipelines[key] = Pipeline(shape.times_with(max(kv_tokens, 1)), lengths)
        return self._pipelines[key]

    def predict(
        self, shape: Shape, workload: Workload, *, kv_tokens: int | None = None, replicas: int = 1
    ) -> Prediction:
        kv_tokens = shape.times.kv_capacity_tokens if kv_tokens is None else kv_tokens
        return self.pipeline(shape, workload, kv_tokens=kv_tokens).predict(workload, self._slo, replicas=replicas)

    def best_cvs(self, workload: Workload) -> Mapping[int, float | None]:
        """Return nu_k of each shape: at the rate that an equal number of devices of each would have to serve."""
        prompt, output = _bucket(workload.prompt_tokens_mean), _bucket(workload.output_tokens_mean)
        key = (prompt, output, _bucket(max(workload.rate_per_s, 1e-3) * 1000))
        if key not in self._best_cvs:
            ordered = sorted(self._shapes)
            capacity = min(self.predict(self._shapes[each], workload).capacity_per_s / each for each in ordered)
            replicas = [max(1, ceil(workload.rate_per_s / max(1e-9, capacity * 0.75) / each)) for each in ordered]
            found = best_cvs(
                [self._shapes[each].times for each in ordered],
                _lengths(workload, prompt, output),
                self._slo,
                replicas=replicas,
            )
            self._best_cvs[key] = dict(zip(ordered, found, strict=True))
        return self._best_cvs[key]


def _bucket(value: float) -> int:
    return round(log(max(1.0, value)) / _LENGTH_STEP)


def _lengths(workload: Workload, prompt: int, output: int) -> Workload:

    return replace(
        workload,
        prompt_tokens_mean=max(1.0, exp(prompt * _LENGTH_STEP)),
        output_tokens_mean=max(1.0, exp(output * _LENGTH_STEP)),
    )


def fewest_devices(
    fleet: Fleet, outlooks: Outlooks, workload: Workload, *, load: float, late_share: float
) -> tuple[int, int]:
    """Return the granularity that serves ``workload`` on the fewest devices, and how many replicas.

    It serves it if the load is at most ``load``, and no more than ``late_share`` of the requests are predicted to miss
    their targets. Where none does, the one with the fewest late requests, as many replicas as there is room for.
    """
    options = []
    for stages, shape in fleet.shapes.items():
        rooms = fleet.pool.rooms(shape, placing=fleet.placing)
        for count in range(1, len(rooms) + 1):
            kv_tokens = sum(rooms[:count]) // count
            found = outlooks.predict(shape, workload, kv_tokens=kv_tokens, replicas=count)
            late = 1 - found.attainment
            serves = found.load <= load and late <= late_share
            if serves or count == len(rooms):
                short = round(max(late, found.load - load), 2)  # predictions tell no finer than that
                options.append(
                    (not serves, count * stages if serves else short, latency_s(found, workload), stages, count)
                )
            if serves:
                break
    if not options:
        return min(fleet.shapes), 0
    *_, stages, count = min(options)
    return stages, count


def latency_s(found: Prediction, workload: Workload) -> float:
    """Return the predicted mean time from arrival to the last token."""
    return found.ttft_s + (workload.output_tokens_mean - 1) * found.tpot_s
