"""What is asked of a model: arrivals, lengths of prompts and answers, and what an answer in time means."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from planner.errors import InvalidWorkload


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Targets of one request. None: no target, so any time will do."""

    ttft_s: float | None = None  # to the first token
    tpot_s: float | None = None  # mean time between two tokens after it

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InvalidWorkload(f"slo.{name} must be a positive number of seconds, not {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests as they arrive. CV: standard deviation over mean, 1 for a Poisson process, above it for bursts.

    The defaults are a calm chat: one request a second, 256 tokens in, 128 out, lengths spread exponentially.
    """

    rate_per_s: float = 1.0
    cv: float = 1.0  # of the times between arrivals
    prompt_tokens_mean: float = 256.0
    prompt_tokens_cv: float = 1.0
    output_tokens_mean: float = 128.0
    output_tokens_cv: float = 1.0

    def __post_init__(self) -> None:
        for name in ("rate_per_s", "prompt_tokens_mean", "output_tokens_mean"):
            _require(name, getattr(self, name), at_least=0.0, above=True)
        for name in ("cv", "prompt_tokens_cv", "output_tokens_cv"):
            _require(name, getattr(self, name), at_least=0.0)
        for name in ("prompt_tokens_mean", "output_tokens_mean"):
            _require(name, getattr(self, name), at_least=1.0)

    @property
    def sequence_tokens_mean(self) -> float:
        """What a sequence takes of the KV cache at its end."""
        return self.prompt_tokens_mean + self.output_tokens_mean


def parse_workload(values: Mapping[str, object]) -> tuple[Workload, Slo]:
    """Return what a workload file says: the fields of ``Workload`` and a table ``slo`` with those of ``Slo``.

    ``values`` is what a JSON or TOML parser made of the file; what is left out has its default.

    Raises:
        InvalidWorkload: An unknown key, or a value that cannot be; the message names the key.
    """
    rest = dict(values)
    targets = rest.pop("slo", {})
    if not isinstance(targets, Mapping):
        raise InvalidWorkload(f"slo must be a table with ttft_s and tpot_s, not {targets!r}")
    workload = Workload(**_numbers(rest, [field.name for field in fields(Workload)], prefix=""))
    return workload, Slo(**_numbers(targets, [field.name for field in fields(Slo)], prefix="slo."))


def _numbers(values: Mapping[str, object], known: list[str], *, prefix: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in values.items():
        if key not in known:
            raise InvalidWorkload(f"unknown key {prefix}{key}; known are: {', '.join(prefix + name for name in known)}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidWorkload(f"{prefix}{key} must be a number, not {value!r}")
        found[key] = float(value)
    return found


def _require(name: str, value: float, *, at_least: float, above: bool = False) -> None:
    if not math.isfinite(value) or value < at_least or (above and value == at_least):
        bound = f"above {at_least:g}" if above else f"at least {at_least:g}"
        raise InvalidWorkload(f"{name} must be a number {bound}, not {value!r}")
