"""``flexctl profile``: measures layer times of a model on this host and keeps what explains them. Imported lazily."""

import asyncio
import json
import os
import time
from argparse import Namespace
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import msgspec

from engines.native.timing import measure_layers
from engines.native.timing_messages import StageObserved, TimingPoint, TimingStarted
from flexpiped.config_file import load_config
from flexpiped.flexctl.client import AdminClient, CtlError
from flexpiped.flexctl.commands import Exit
from flexpiped.flexctl.offline_errors import offline_errors
from flexpiped.flexctl.profile_lines import profile_lines, progress_line
from flexpiped.flexctl.terminal import Screen
from flexpiped.models import model_source
from flexpiped.profiles import ProfileStore, ProfileTarget, fitted, profile_folder, profile_target
from flexpiped.settings import Settings
from planner.errors import InvalidProfile
from planner.profile import Profile
from planner.profile_file import profile_to_json

_SECONDS_A_POINT: Final = 0.15
_SECONDS_A_POINT_SHORT: Final = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    target: ProfileTarget
    is_daemon: bool


def profile(client: AdminClient, screen: Screen, options: Namespace) -> Exit:
    """Measure, fit, show, keep."""
    with offline_errors():
        wanted = _wanted(client, options)
        if wanted.is_daemon and not options.json:
            screen.write(
                ["the daemon serves meanwhile: measuring competes with it, so both are slower, and figures too high"]
            )
        found = asyncio.run(_measured(wanted.target, screen, options))
        kept = _keep(client, found, is_daemon=wanted.is_daemon)
    if options.json:
        screen.write([json.dumps({"profile": profile_to_json(found), "file": kept})])
    else:
        screen.write([*profile_lines(found, paint=screen.paint), f"kept in {kept}"])
    return Exit.DONE


def _wanted(client: AdminClient, options: Namespace) -> _Wanted:
    """Return what to measure: a configuration or model that is named, else what the daemon serves."""
    if options.config is None and options.model is None:
        answer: Any = client.call("GET", _of(options, "/profile/target"))
        return _Wanted(target=msgspec.convert(answer, ProfileTarget), is_daemon=True)
    settings = Settings() if options.config is None else load_config(Path(options.config))
    if options.model is not None:
        settings = replace(settings, model=options.model)
    return _Wanted(target=profile_target(settings, source=model_source(settings)), is_daemon=False)


def _of(options: Namespace, path: str) -> str:
    return path if options.of is None else f"{path}?model={quote(options.of, safe='')}"


async def _measured(target: ProfileTarget, screen: Screen, options: Namespace) -> Profile:
    """Measure and fit, showing how far it is."""
    stages: list[StageObserved] = []
    started: TimingStarted | None = None
    budget_s = _SECONDS_A_POINT_SHORT if options.short else _SECONDS_A_POINT
    began_s = time.monotonic()
    async with aclosing(measure_layers(target.options, budget_s=budget_s)) as reports:
        async for report in reports:
            match report:
                case TimingStarted():
                    started = report
                case TimingPoint():
                    stages += report.stages
                    if started is not None and not options.json:
                        elapsed_s = time.monotonic() - began_s
                        screen.live(progress_line(report, of=started.num_points, elapsed_s=elapsed_s))
    if started is None:
        raise InvalidProfile("nothing was measured")
    return fitted(
        target,
        stages,
        torch_version=started.torch_version,
        cores=started.cores,
        measured_at=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )


def _keep(client: AdminClient, found: Profile, *, is_daemon: bool) -> str:
    """Keep a profile where plans look for it: the daemon's folder if it is the daemon's model, else the user's."""
    if not is_daemon:
        return str(ProfileStore(folder=profile_folder(os.environ, home=Path.home())).save(found))
    try:
        return str(client.call("POST", "/profile", profile_to_json(found))["file"])
    except CtlError as error:
        raise InvalidProfile(f"measured, but the daemon cannot keep it: {error}") from None
