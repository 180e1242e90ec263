"""A profile: what layers of one model were measured to take, as few explained terms, and how well those explain it.

The terms are those of ``planner.profile_terms``; ``planner.profile_fit`` finds what each takes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Final

from planner.errors import InvalidProfile
from planner.layer_costs import Batch
from planner.model_graph import Layer, LayerKind, ModelGraph
from planner.profile_terms import Term, layer_amounts, stage_amounts
from topology.device import Device, DeviceKind
from topology.units import plural

HIGH_RESIDUAL: Final = 0.1  # mean of a fit, beyond which its predictions are not to be relied on


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
