"""Profiles of layer times: what is to be measured, where profiles are kept, and which one fits.

Measuring itself is ``engines.native.timing``; fitting is ``planner.profile``.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from engines.errors import UnsupportedByEngine
from engines.native.options import NativeOptions
from engines.native.timing_messages import StageObserved
from flexpiped.engine_factory import Model, find_files, native_options
from flexpiped.models import for_people
from flexpiped.settings import EngineKind, Settings
from planner.errors import InvalidProfile
from planner.layer_costs import Batch
from planner.model_graph import ModelGraph
from planner.profile import Profile, ProfileKey, model_digest_fields
from planner.profile_file import parse_profile, profile_to_json
from planner.profile_fit import fit_observations
from planner.profile_terms import Observation
from topology.device import DeviceKind
from topology.measured import state_file
from topology.state_files import replace_file

_FOLDER: Final = "profiles"
_NOT_IN_A_NAME: Final = re.compile(r"[^A-Za-z0-9.]+")


class ProfileTarget(msgspec.Struct, frozen=True, kw_only=True):
    """What ``flexctl profile`` has to measure; travels over the admin API."""

    model_name: str
    model_digest: str
    dtype: str
    decoder_weight_bytes: int
    device_name: str
    options: NativeOptions


def profile_target(settings: Settings, *, source: str) -> ProfileTarget:
    """Return what is to be measured for ``settings``. Blocks: reads the model's headers.

    Raises:
        EngineError: There is no such model, or the engine is not one whose layers can be measured.
    """
    if settings.engine is not EngineKind.NATIVE:
        raise UnsupportedByEngine(
            f"flexctl profile measures layers of the native engine, and the engine here is {settings.engine.value}; "
            "its plans rest on the roofline estimate"
        )
    return target_of(settings, find_files(settings, source=source), source=source)


def target_of(settings: Settings, model: Model, *, source: str) -> ProfileTarget:
    """Return what is to be measured of a model whose files are here."""
    return ProfileTarget(
        model_name=for_people(source),
        model_digest=model_digest(model.graph),
        dtype=model.graph.dtype,
        decoder_weight_bytes=model.graph.decoders[0].weight_bytes,
        device_name=cpu_name(),
        options=native_options(settings, model),
    )


def model_digest(graph: ModelGraph) -> str:
    """Return a short digest of what decides a model's times; two models alike in size share it."""
    fields = json.dumps(model_digest_fields(graph), sort_keys=True)
    return hashlib.sha256(fields.encode()).hexdigest()[:16]


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return what the processor calls itself, or nothing where it does not say."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def fitted(
    target: ProfileTarget, stages: list[StageObserved], *, torch_version: str, cores: int, measured_at: str
) -> Profile:
    """Return the profile that explains what was measured.

    Raises:
        InvalidProfile: Too little was measured.
    """
    return Profile(
        key=ProfileKey(
            model=target.model_digest,
            dtype=target.dtype,
            engine=EngineKind.NATIVE.value,
            device_kind=DeviceKind.CPU,
            device_name=target.device_name,
            cores=cores,
            torch_version=torch_version,
            threads_per_device=target.options.threads_per_device,
        ),
        model_name=target.model_name,
        measured_at=measured_at,
        decoder_weight_bytes=target.decoder_weight_bytes,
        fits=fit_observations([_observation(stage) for stage in stages]),
    )


def _observation(stage: StageObserved) -> Observation:
    return Observation(
        threads=stage.threads,
        beside_others=stage.beside_others,
        num_decoders=stage.num_decoders,
        has_embedding=stage.has_embedding,
        has_head=stage.has_head,
        batch=Batch(tokens=stage.tokens, sequences=stage.sequences, context_tokens=stage.context_tokens),
        busy_s=stage.busy_s,
    )


def profile_folder(environment: Mapping[str, str], *, home: Path) -> Path:
    """Return where profiles are kept: ``$STATE_DIRECTORY``, ``$XDG_STATE_HOME`` or ``~/.local/state``, as links are."""
    return state_file(environment, home=home).parent / _FOLDER


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileStore:
    """Profiles in a folder, one file for each key."""

    folder: Path

    def save(self, profile: Profile) -> Path:
        """Keep a profile in place of an older one with the same key; a reader finds one of the two, never half.

        Raises:
            InvalidProfile: It cannot be kept; the message says why.
        """
        path = self.folder / _file_name(profile)
        text = json.dumps(profile_to_json(profile), indent=1) + "\n"
        try:
            replace_file(path, text)
        except OSError as error:
            raise InvalidProfile(f"{path}: cannot be kept: {error.strerror}") from None
        return path

    def find(
        self,
        *,
        model_digest: str,
        dtype: str,
        engine: str,
        device_name: str,
        cores: int,
        threads_per_device: int = 0,
    ) -> tuple[Profile | None, str]:
        """Return the newest profile that is valid for these, or None and why there is none.

        Raises:
            InvalidProfile: None is valid, and one that would fit by its name cannot be read.
        """
        wanted = (model_digest, dtype, engine, device_name, cores, threads_per_device)
        found: list[Profile] = []
        unreadable: list[InvalidProfile] = []
        for path in sorted(self.folder.glob(f"*-{model_digest}-*.json")):
            try:
                found.append(_read(path))
            except InvalidProfile as error:  # of an older version, for instance: one measured since then counts
                unreadable.append(error)
        fitting = [profile for profile in found if _valid_for(profile) == wanted]
        if fitting:
            return max(fitting, key=lambda profile: profile.measured_at), ""
        if unreadable:
            raise unreadable[0]
        return None, f"no profile of this model, dtype, engine and processor in {self.folder}"


def _valid_for(profile: Profile) -> tuple[str, str, str, str, int, int]:
    key = profile.key
    return key.model, key.dtype, key.engine, key.device_name, key.cores, key.threads_per_device


def _file_name(profile: Profile) -> str:
    key = profile.key
    bound = [key.threads_per_device] if key.threads_per_device else []
    rest = json.dumps([key.device_kind.value, key.device_name, key.cores, key.torch_version, *bound])
    digest = hashlib.sha256(rest.encode()).hexdigest()[:8]
    name = _NOT_IN_A_NAME.sub("-", Path(profile.model_name).name).strip("-") or "model"
    return f"{name}-{key.dtype}-{key.engine}-{key.model}-{digest}.json"


def _read(path: Path) -> Profile:
    try:
        return parse_profile(path.read_bytes())
    except OSError as error:
        raise InvalidProfile(f"{path}: {error.strerror}") from None
    except InvalidProfile as error:
        raise InvalidProfile(f"{path}: {error}") from None
