"""A profile as JSON: written by whoever measured, read strictly."""

import json
from collections.abc import Mapping
from typing import Final, TypeVar

from planner.errors import InvalidProfile
from planner.profile import Fit, Profile, ProfileKey
from planner.profile_terms import Term
from topology.device import DeviceKind

T = TypeVar("T")
VERSION: Final = 2  # 1 had fewer terms


def profile_to_json(profile: Profile) -> dict[str, object]:
    """Return what a file holds; ``parse_profile`` reads it."""
    key = profile.key
    return {
        "version": VERSION,
        "model_name": profile.model_name,
        "measured_at": profile.measured_at,
        "key": {
            "model": key.model,
            "dtype": key.dtype,
            "engine": key.engine,
            "device_kind": key.device_kind.value,
            "device_name": key.device_name,
            "cores": key.cores,
            "torch_version": key.torch_version,
        }
        | ({"threads_per_device": key.threads_per_device} if key.threads_per_device else {}),
        "decoder_weight_bytes": profile.decoder_weight_bytes,
        "fits": [
            {
                "threads": fit.threads,
                "beside_others": fit.beside_others,
                "seconds": {term.value: fit.seconds[term] for term in Term},
                "residuals": list(fit.residuals),
            }
            for fit in profile.fits
        ],
    }


def parse_profile(text: str | bytes) -> Profile:
    """Return the profile that ``text`` holds.

    Raises:
        InvalidProfile: It is no profile of this version; the message says where it goes wrong.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise InvalidProfile(f"a profile must be JSON: {error}") from error
    top = _Reader(values, where="profile")
    if top.take("version", int) != VERSION:
        version = top.values["version"]
        raise InvalidProfile(f"profile.version must be {VERSION}, not {version!r}: measure again with flexctl profile")
    profile = Profile(
        model_name=top.take("model_name", str),
        measured_at=top.take("measured_at", str),
        key=_key(_Reader(top.take("key", dict), where="profile.key")),
        decoder_weight_bytes=top.take("decoder_weight_bytes", int),
        fits=tuple(
            _fit(_Reader(each, where=f"profile.fits[{index}]")) for index, each in enumerate(top.take("fits", list))
        ),
    )
    top.refuse_rest()
    return profile


class _Reader:
    """Takes the fields of one JSON object; what it refuses, it names."""

    def __init__(self, values: object, *, where: str) -> None:
        if not isinstance(values, dict):
            raise InvalidProfile(f"{where} must be an object")
        self.values: Mapping[str, object] = values
        self._where = where
        self._taken: set[str] = set()

    def may_take(self, name: str, kind: type[T], otherwise: T) -> T:
        """Take a field that older files do not have."""
        return self.take(name, kind) if name in self.values else otherwise

    def take(self, name: str, kind: type[T]) -> T:
        value = self.values.get(name)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise InvalidProfile(f"{self._where}.{name} must be {_NAMES[kind]}, not {value!r}")
        self._taken.add(name)
        return value

    def refuse_rest(self) -> None:
        strange = sorted(self.values.keys() - self._taken)
        if strange:
            raise InvalidProfile(f"{self._where} has an unknown key {strange[0]!r}")


_NAMES: Final[Mapping[type, str]] = {
    int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list", dict: "an object",
}  # fmt: skip


def _key(reader: _Reader) -> ProfileKey:
    kind = reader.take("device_kind", str)
    if kind not in {each.value for each in DeviceKind}:
        raise InvalidProfile(f"profile.key.device_kind {kind!r} is not a kind of device")
    key = ProfileKey(
        model=reader.take("model", str),
        dtype=reader.take("dtype", str),
        engine=reader.take("engine", str),
        device_kind=DeviceKind(kind),
        device_name=reader.take("device_name", str),
        cores=reader.take("cores", int),
        torch_version=reader.take("torch_version", str),
        threads_per_device=reader.may_take("threads_per_device", int, 0),
    )
    reader.refuse_rest()
    return key


def _fit(reader: _Reader) -> Fit:
    seconds = _Reader(reader.take("seconds", dict), where="profile.fits[].seconds")
    fit = Fit(
        threads=reader.take("threads", int),
        beside_others=reader.take("beside_others", bool),
        seconds={term: seconds.take(term.value, float) for term in Term},
        residuals=tuple(map(float, reader.take("residuals", list))),
    )
    seconds.refuse_rest()
    reader.refuse_rest()
    if not fit.residuals or min(fit.seconds.values()) < 0:
        raise InvalidProfile("profile.fits[]: a fit has residuals, and no term takes less than no time")
    return fit
