"""``flexctl plan``: what the planner would do, asked of the daemon, or worked out from files alone."""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from flexpiped.flexctl.client import AdminClient, BadUsage
from flexpiped.flexctl.commands import Exit
from flexpiped.flexctl.plan_lines import plan_lines
from flexpiped.flexctl.terminal import Screen
from flexpiped.flexctl.which_model import of_model

_FILES = ("config", "topology", "workload", "engine", "replicas")  # any of them: without the daemon


def add_arguments(parser: ArgumentParser) -> None:
    """Add what ``flexctl plan`` takes, but the number of stages."""
    parser.add_argument("--explain", action="store_true", help="every candidate that was considered, and why it lost")
    files = parser.add_argument_group("without a daemon", "any of these plans from files alone, and asks no daemon")
    files.add_argument("--topology", metavar="FILE", help="snapshot of a host or cluster, or a machine by its name")
    files.add_argument("--model", metavar="DIR", help="directory with config.json; else NAME of a model of the daemon")
    files.add_argument("--workload", metavar="FILE", help="workload and targets, as JSON or TOML")
    files.add_argument("--config", metavar="FILE", help="configuration of the daemon, for all that is not given here")
    files.add_argument("--engine", choices=("native", "vllm", "sglang"), help="the engine that is to carry it out")
    files.add_argument("--replicas", metavar="N", type=int, help="at most so many pipelines (default 1)")


def plan(client: AdminClient, screen: Screen, options: Namespace) -> Exit:
    """Show the plan for the workload, with its predictions and reasons. Nothing is moved."""
    offline = any(getattr(options, name) for name in _FILES) or _is_directory(options.model)
    path = of_model("/plan", options)
    answer = _offline(options) if offline else client.call("POST", path, {"stages": options.stages})
    screen.write(
        [json.dumps(answer)] if options.json else plan_lines(answer, explain=options.explain, paint=screen.paint)
    )
    return Exit.DONE if answer["state"] == "planned" else Exit.REFUSED


def _is_directory(model: str | None) -> bool:
    """Whether a directory is meant, and not a name under which the daemon serves a model."""
    return model is not None and (model.startswith(("/", ".", "~")) or Path(model).is_dir())


def _offline(options: Namespace) -> dict[str, Any]:
    """Plan in this process. What that needs is imported only now: every other command starts without it."""
    from flexpiped.flexctl.offline_errors import offline_errors
    from flexpiped.offline_plan import OfflineRequest, offline_plan

    if options.replicas is not None and options.replicas < 1:
        raise BadUsage("bad_replicas", f"--replicas: at least 1, not {options.replicas}")
    request = OfflineRequest(
        config=options.config or "",
        topology=options.topology or "",
        model=options.model or "",
        workload=options.workload or "",
        engine=options.engine or "",
        num_stages=options.stages if isinstance(options.stages, int) else None,
        max_replicas=options.replicas or 1,
    )
    with offline_errors():
        return offline_plan(request)
