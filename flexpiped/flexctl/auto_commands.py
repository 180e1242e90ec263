"""``flexctl auto`` and ``flexctl decisions``: what the daemon does by itself, and why."""

import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from typing import Any

from flexpiped.flexctl.client import AdminClient
from flexpiped.flexctl.commands import Exit
from flexpiped.flexctl.terminal import Screen
from flexpiped.flexctl.which_model import add_model_argument, of_model

_MEANINGS = {
    "on": "the number of stages follows the traffic",
    "off": "nothing changes by itself",
    "dry-run": "decisions are shown, and nothing changes",
}


def add_auto_arguments(parser: ArgumentParser) -> None:
    """Say how ``flexctl auto`` is called."""
    parser.add_argument("mode", choices=tuple(_MEANINGS), help="on, off, or decide and only say so")
    add_model_argument(parser)


def add_decisions_arguments(parser: ArgumentParser) -> None:
    """Say how ``flexctl decisions`` is called."""
    parser.add_argument("--follow", action="store_true", help="go on with what is decided")
    parser.add_argument("--since", metavar="N", type=int, default=0, help="only decisions after number N")
    add_model_argument(parser)


def auto(client: AdminClient, screen: Screen, options: Namespace) -> Exit:
    """Change whether the daemon adapts by itself, until it ends: a restart begins with what the configuration says."""
    answer = client.call("POST", of_model("/auto", options), {"mode": options.mode})
    screen.write([json.dumps(answer) if options.json else f"auto {answer['mode']}: {_MEANINGS[answer['mode']]}"])
    return Exit.DONE


def decisions(client: AdminClient, screen: Screen, options: Namespace) -> Exit:
    """Show what was decided, and with ``--follow`` what is."""
    path = f"/decisions?since={options.since}" + ("&follow=1" if options.follow else "")
    none_yet = True
    for decision in client.stream("GET", of_model(path, options)):
        none_yet = False
        screen.write([json.dumps(decision) if options.json else decision_line(decision)])
    if none_yet and not options.json:
        screen.write(["no decisions; they are made while flexctl auto is on or dry-run"])
    return Exit.DONE


def decision_line(decision: Mapping[str, Any]) -> str:
    """Return one decision as one line, in local time; what a dry run would have changed is marked."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(decision["time_unix_s"]))
    fields = decision["fields"]
    is_dry = fields.get("mode") == "dry-run" and fields.get("verb") != "keep"
    return f"{when}  {'(dry run) ' if is_dry else ''}{decision['message']}"
