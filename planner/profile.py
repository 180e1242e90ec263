"""A profile: what layers of one model were measured to take, as few explained terms, and how well those explain it.

A stage's time is the sum of its layers' and its own. Each is linear in what the step computes:

    stage      a step (message, positions) + tokens (activations in and out)
    embedding  tokens
    decoder    a call (launches, weights read once) + more than one token (a product of matrices, no longer with a
               vector) + tokens, the first ones and the rest apart + context read + pairs attended to
    head       a call (weights of the LM head) + more than one row + rows of logits

The factors are fitted to measured stages of several layouts at once, never negative, by the least mean relative error,
once for each number of threads, and apart for stages that compute alone and beside others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import fmean
from typing import Final

import numpy as np
import numpy.typing as npt

from planner.errors import InvalidProfile
from planner.layer_costs import Batch
from planner.model_graph import Layer, LayerKind, ModelGraph
from topology.device import Device, DeviceKind
from topology.units import plural

SOME_TOKENS: Final = 64  # up to here a product of matrices is bound by reading weights, from here on by arithmetic
HIGH_RESIDUAL: Final = 0.1  # mean of a fit, beyond which its predictions are not to be relied on
_REWEIGHTED: Final = 12
_SMALL_ERROR: Final = 0.01
_Matrix = npt.NDArray[np.float64]


class Term(Enum):
    """What time is spent on; the value is its name in files and for people."""

    STAGE_STEP = "stage, each step"
    STAGE_TOKEN = "stage, each token"
    EMBEDDING_TOKEN = "embedding, each token"
    DECODER_CALL = "decoder, each call"
    DECODER_SEVERAL = "decoder, more than one token"
    DECODER_SOME_TOKENS = f"decoder, each token up to {SOME_TOKENS}"
    DECODER_MANY_TOKENS = "decoder, each token beyond"
    DECODER_CONTEXT = "decoder, each token of context read"
    DECODER_PAIR = "decoder, each pair attended"
    HEAD_CALL = "head, each call"
    HEAD_SEVERAL = "head, more than one row"
    HEAD_ROW = "head, each row of logits"


def stage_amounts(batch: Batch) -> dict[Term, float]:
    """Return how much of each term a stage needs beside its layers."""
    return {Term.STAGE_STEP: 1.0, Term.STAGE_TOKEN: float(batch.tokens)}


def layer_amounts(kind: LayerKind, batch: Batch, *, window_tokens: int | None = None) -> dict[Term, float]:
    """Return how much of each term one layer needs."""
    match kind:
        case LayerKind.EMBEDDING:
            return {Term.EMBEDDING_TOKEN: float(batch.tokens)}
        case LayerKind.HEAD:
            rows = batch.sequences
            return {Term.HEAD_CALL: 1.0, Term.HEAD_SEVERAL: float(rows > 1), Term.HEAD_ROW: float(rows)}
        case LayerKind.DECODER:
            return {
                Term.DECODER_CALL: 1.0,
                Term.DECODER_SEVERAL: float(batch.tokens > 1),
                Term.DECODER_SOME_TOKENS: float(min(batch.tokens, SOME_TOKENS)),
                Term.DECODER_MANY_TOKENS: float(max(0, batch.tokens - SOME_TOKENS)),
                Term.DECODER_CONTEXT: batch.cached(window_tokens),
                Term.DECODER_PAIR: batch.attended(window_tokens),
            }


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One stage, one batch: the mean time of its steps. ``beside_others``: other stages computed meanwhile."""

    threads: int
    beside_others: bool
    num_decoders: int
    has_embedding: bool
    has_head: bool
    batch: Batch
    busy_s: float

    def amounts(self) -> dict[Term, float]:
        """Return how much of each term the stage's step needed."""
        found = stage_amounts(self.batch)
        if self.has_embedding:
            found |= layer_amounts(LayerKind.EMBEDDING, self.batch)
        found |= {
            term: self.num_decoders * amount for term, amount in layer_amounts(LayerKind.DECODER, self.batch).items()
        }
        return found | (layer_amounts(LayerKind.HEAD, self.batch) if self.has_head else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Seconds of each term on stages of ``threads``; ``residuals`` are relative errors, one for each observation."""

    threads: int
    beside_others: bool
    seconds: Mapping[Term, float]
    residuals: tuple[float, ...]

    @property
    def mean_residual(self) -> float:
        return fmean(map(abs, self.residuals))

    @property
    def name(self) -> str:
        """Return which stages it is of, for people."""
        return f"stages of {plural(self.threads, 'thread')} {'beside others' if self.beside_others else 'alone'}"

    def time_s(self, amounts: Mapping[Term, float]) -> float:
        return sum(self.seconds[term] * amount for term, amount in amounts.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileKey:
    """What a profile is valid for."""

    model: str  # digest of what decides its times
    dtype: str
    engine: str
    device_kind: DeviceKind
    device_name: str
    cores: int  # of all stages together
    torch_version: str
    threads_per_device: int = 0  # that a stage has at most; 0: a single one has all cores


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The fits of one model on one kind of device. ``measured_at`` is written for people, in UTC."""

    key: ProfileKey
    model_name: str
    measured_at: str
    decoder_weight_bytes: int
    fits: tuple[Fit, ...]

    @property
    def mean_residual(self) -> float:
        return fmean(abs(each) for fit in self.fits for each in fit.residuals)

    @property
    def source(self) -> str:
        """Return where the times come from, and what is to be said against them."""
        return f"{self.origin}; {self.warning}" if self.warning else self.origin

    @property
    def origin(self) -> str:
        """Return where the times come from, as a sentence."""
        return (
            f"measured {self.measured_at} on {self.key.device_name or self.key.device_kind.value}, {self.key.engine} "
            f"engine, torch {self.key.torch_version} (mean residual {self.mean_residual:.1%})"
        )

    @property
    def warning(self) -> str:
        """Return what is to be said of fits that explain their measurements badly; empty where all do well."""
        bad = [fit for fit in self.fits if fit.mean_residual > HIGH_RESIDUAL]
        if not bad:
            return ""
        named = ", ".join(f"{fit.mean_residual:.1%} for {fit.name}" for fit in bad)
        return (
            f"warning: mean residual {named}: above {HIGH_RESIDUAL:.0%}, so predictions may be as far off; "
            "measure again while nothing else runs"
        )

    def fit_for(self, *, threads: int, beside_others: bool) -> Fit:
        """Return the fit for stages of so many threads, else of the nearest number of threads that was measured.

        Raises:
            InvalidProfile: There is none at all.
        """
        if not self.fits:
            raise InvalidProfile("the profile has no fits")
        return min(
            self.fits, key=lambda fit: (abs(fit.threads - threads), fit.beside_others is not beside_others, fit.threads)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredCosts:
    """``LayerCosts`` from a profile; ``beside_others``: while other stages compute on the same host."""

    profile: Profile
    beside_others: bool = False

    @property
    def source(self) -> str:
        return self.profile.source

    def layer_s(self, layer: Layer, device: Device, batch: Batch) -> float:
        """Raises ``InvalidProfile`` for a device of another kind, or a layer that is not the measured model's."""
        if layer.kind is LayerKind.DECODER and layer.weight_bytes != self.profile.decoder_weight_bytes:
            raise InvalidProfile(
                f"the profile is of decoders of {self.profile.decoder_weight_bytes} bytes; "
                f"{layer.name} has {layer.weight_bytes}"
            )
        return self._fit(device).time_s(layer_amounts(layer.kind, batch, window_tokens=layer.window_tokens))

    def stage_overhead_s(self, device: Device, batch: Batch) -> float:
        """Raises as ``layer_s``."""
        return self._fit(device).time_s(stage_amounts(batch))

    def _fit(self, device: Device) -> Fit:
        key = self.profile.key
        if device.kind is not key.device_kind or (device.name and device.name != key.device_name):
            where = key.device_name or key.device_kind.value
            raise InvalidProfile(f"the profile was measured on {where}, not on {device.name or device.id}")
        return self.profile.fit_for(threads=device.threads or 1, beside_others=self.beside_others)


def fit_observations(observations: Sequence[Observation]) -> tuple[Fit, ...]:
    """Return a fit for each number of threads, alone and beside others where both were observed.

    Raises:
        InvalidProfile: There are too few observations to tell the terms apart.
    """
    groups: dict[tuple[int, bool], list[Observation]] = {}
    for each in observations:
        groups.setdefault((each.threads, each.beside_others), []).append(each)
    if not groups:
        raise InvalidProfile("nothing was measured")
    return tuple(_fit(group, threads, beside) for (threads, beside), group in sorted(groups.items()))


def _fit(group: Sequence[Observation], threads: int, beside_others: bool) -> Fit:
    terms = list(Term)
    if len(group) < len(terms):
        raise InvalidProfile(f"{len(group)} measurements with {threads} threads cannot tell {len(terms)} terms apart")
    amounts = np.array([[each.amounts().get(term, 0.0) for term in terms] for each in group])
    times = np.array([each.busy_s for each in group])
    seconds = _least_absolute(amounts / times[:, None])
    residuals = amounts @ seconds / times - 1
    return Fit(
        threads=threads,
        beside_others=beside_others,
        seconds=dict(zip(terms, seconds.tolist(), strict=True)),
        residuals=tuple(residuals.tolist()),
    )


def _least_absolute(relative: _Matrix) -> npt.NDArray[np.float64]:
    """Return the non-negative factors with the smallest mean relative error: few disturbed measurements count little.

    Least squares again and again, each row weighed by the inverse of its last error.
    """
    weights = np.ones(len(relative))
    for _ in range(_REWEIGHTED):
        found = non_negative_least_squares(relative * weights[:, None], weights)
        weights = 1 / np.sqrt(np.maximum(np.abs(relative @ found - 1), _SMALL_ERROR))
    return found


def non_negative_least_squares(matrix: _Matrix, target: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the non-negative ``x`` that minimises ``|matrix x - target|``.

    Source: Lawson and Hanson, Solving Least Squares Problems, 1974, chapter 23.
    """
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    scaled = matrix / scale
    count = scaled.shape[1]
    solution, active = np.zeros(count), np.zeros(count, dtype=bool)
    for _ in range(10 * count):
        gradient = scaled.T @ (target - scaled @ solution)
        gradient[active] = -np.inf
        if active.all() or gradient.max() <= 1e-10 * max(1.0, float(np.linalg.norm(target))):
            break
        active[int(gradient.argmax())] = True
        while True:
            trial = np.zeros(count)
            trial[active] = np.linalg.lstsq(scaled[:, active], target, rcond=None)[0]
            negative = active & (trial <= 0)
            if not negative.any():
                solution = trial
                break
            steps = solution[negative] / np.maximum(solution[negative] - trial[negative], 1e-300)
            solution = solution + steps.min() * (trial - solution)
            active &= solution > 1e-15
            solution[~active] = 0.0
            if not active.any():
                break
    return np.asarray(solution / scale)


def model_digest_fields(graph: ModelGraph) -> dict[str, object]:
    """Return what of a model decides its times: two models alike in these share a profile."""
    return {
        "model_type": graph.model_type,
        "dtype": graph.dtype,
        "hidden_size": graph.hidden_size,
        "vocab_size": graph.vocab_size,
        "layers": [
            [layer.kind.value, layer.weight_bytes, layer.kv_bytes_per_token, layer.flops_per_token]
            for layer in graph.layers
        ],
    }
