"""``flexctl model``: which models a daemon serves, and how they come, go, and give way to others while it runs."""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from flexpiped.flexctl.client import AdminClient, NotReachable
from flexpiped.flexctl.commands import Exit
from flexpiped.flexctl.terminal import Screen
from flexpiped.flexctl.text import table
from flexpiped.flexctl.traffic_options import positive

_EXITS: Final = {"done": Exit.DONE, "refused": Exit.REFUSED}


def add_name(parser: ArgumentParser) -> None:
    """Say whose model it is, and whether to wait."""
    parser.add_argument("name", metavar="NAME", help="name of the model, as flexctl model list shows it")
    parser.add_argument("--no-wait", action="store_true", help="return at once; flexctl events --follow tells the rest")


def add_stop_arguments(parser: ArgumentParser) -> None:
    """Say how ``flexctl model stop`` is called."""
    add_name(parser)
    parser.add_argument(
        "--deadline", metavar="S", type=positive, help="cut streams off after S seconds (default: as configured)"
    )


def add_swap_arguments(parser: ArgumentParser) -> None:
    """Say how ``flexctl model swap`` is called."""
    add_name(parser)
    parser.add_argument("path", metavar="PATH", help="directory or hub id of what takes its place")


def list_(client: AdminClient, screen: Screen, options: Namespace) -> Exit:
    """Show each model: its state, engine, stages and files."""
    answer = client.call("GET", "/models")
    if options.json:
        screen.write([json.dumps(answer)])
        return Exit.DONE
    rows: list[tuple[str, ...]] = [("model", "state", "engine", "stages", "requests", "path")]
    rows += [_row(each) for each in answer["models"]]
    notes = [f"  {each['name']}: {note}" for each in answer["models"] if (note := each["change"] or each["reason"])]
    screen.write([*table(rows, gap="  "), *notes])
    return Exit.DONE


def _row(model: Mapping[str, Any]) -> tuple[str, ...]:
    path = model["path"] if model["is_as_configured"] else f"{model['path']} (by hand)"
    return (model["name"], model["state"], model["engine"], str(model["stages"]), str(model["requests"]), path)


def start(client: AdminClient, screen: Screen, options: Namespace) -> Exit:
    """Start a model that was stopped, or did not start."""
    return _change(client, screen, options, "/models/start", {})


def stop(client: AdminClient, screen: Screen, options: Namespace) -> Exit:
    """Stop a model: its streams finish first."""
    more = {} if options.deadline is None else {"deadline_s": options.deadline}
    return _change(client, screen, options, "/models/stop", more)


def swap(client: AdminClient, screen: Screen, options: Namespace) -> Exit:
    """Serve other files under a model's name."""
    path = Path(options.path).expanduser()
    source = str(path.resolve()) if path.is_dir() else options.path
    return _change(client, screen, options, "/models/swap", {"path": source})


def _change(client: AdminClient, screen: Screen, options: Namespace, path: str, more: dict[str, Any]) -> Exit:
    body = {"model": options.name, "wait": not options.no_wait, **more}
    if options.no_wait:
        answer = client.call("POST", path, body)
        screen.write([json.dumps(answer) if options.json else "begun; follow it: flexctl events --follow"])
        return Exit.DONE
    for event in client.stream("POST", path, body):
        screen.write([json.dumps(event) if options.json else event["message"]])
        if event["fields"]["state"] == "ended":
            return _EXITS.get(event["fields"]["result"], Exit.FAILED)
    raise NotReachable("connection_lost", "the daemon ended before the change did")
