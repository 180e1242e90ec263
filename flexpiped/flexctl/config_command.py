"""``flexctl config`` and ``flexctl reload``: what is configured, whether a file is right, what a reload does.

``check`` and ``schema`` work without a daemon.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from flexpiped.config_text import schema, toml_value
from flexpiped.flexctl.client import AdminClient
from flexpiped.flexctl.commands import Exit
from flexpiped.flexctl.terminal import Screen
from flexpiped.flexctl.text import Colour, Paint
from flexpiped.reload import compare
from flexpiped.settings import Settings


def show(client: AdminClient, screen: Screen, options: Namespace) -> Exit:
    """Show every key that is in force, as a configuration file."""
    answer = client.call("GET", "/config")
    screen.write([json.dumps(answer)] if options.json else [f"{key} = {toml_value(answer[key])}" for key in answer])
    return Exit.DONE


def check(_client: AdminClient, screen: Screen, options: Namespace) -> Exit:
    """Say whether a file is right, with the files that it names, as a reload would find it."""
    problems = compare(Settings(), Path(options.file)).problems
    if options.json:
        screen.write([json.dumps({"file": options.file, "problems": list(problems)})])
    elif problems:
        print("\n".join(problems), file=sys.stderr)
    else:
        screen.write([f"{options.file}: ok"])
    return Exit.USAGE if problems else Exit.DONE


def schema_(_client: AdminClient, screen: Screen, _options: Namespace) -> Exit:
    """Write the JSON schema of configuration files, for editors."""
    screen.write([json.dumps(schema(), indent=2)])
    return Exit.DONE


def diff(client: AdminClient, screen: Screen, options: Namespace) -> Exit:
    """Show what differs between the daemon's file and what is in force."""
    return _show_report(client.call("GET", "/config/diff"), screen, as_json=options.json)


def reload(client: AdminClient, screen: Screen, options: Namespace) -> Exit:
    """Have the daemon read its file again."""
    answer = client.call("POST", "/reload")
    if not options.json:
        screen.write([answer["message"]])
    if not answer["changes"] and not options.json:
        return Exit.DONE
    return _show_report(answer, screen, as_json=options.json)


def _show_report(report: dict[str, Any], screen: Screen, *, as_json: bool) -> Exit:
    if as_json:
        screen.write([json.dumps(report)])
    elif report["problems"]:
        print("\n".join(report["problems"]), file=sys.stderr)
    else:
        screen.write(report_lines(report, screen.paint))
    return Exit.USAGE if report["problems"] else Exit.DONE


def report_lines(report: dict[str, Any], paint: Paint) -> list[str]:
    """Return one line for each key that differs: before, after, and whether a restart is needed."""
    if not report["changes"]:
        return ["nothing differs"]
    width = max(len(change["key"]) for change in report["changes"])
    return [
        f"{change['key']:<{width}}  {change['before']} -> {change['after']}  "
        + (paint("live", Colour.GREEN) if change["live"] else paint("needs a restart", Colour.YELLOW))
        for change in report["changes"]
    ]
