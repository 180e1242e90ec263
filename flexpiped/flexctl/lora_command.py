"""``flexctl lora``: which LoRA adapters a model serves, and how they come and go while it does."""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from flexpiped.flexctl.client import AdminClient
from flexpiped.flexctl.commands import Exit
from flexpiped.flexctl.terminal import Screen
from flexpiped.flexctl.text import table
from flexpiped.flexctl.which_model import add_model_argument, of_model
from topology.units import plural


def add_load_arguments(parser: ArgumentParser) -> None:
    """Say how ``flexctl lora load`` is called."""
    add_unload_arguments(parser)
    parser.add_argument("path", metavar="PATH", help="its directory on the daemon's host, as peft saves adapters")


def add_unload_arguments(parser: ArgumentParser) -> None:
    """Say how ``flexctl lora unload`` is called."""
    parser.add_argument("name", metavar="NAME", help="the adapter's name, which requests give as their model")
    add_model_argument(parser)


def list_(client: AdminClient, screen: Screen, options: Namespace) -> Exit:
    """Show each adapter: whether requests may name it, how many are under way with it, and its directory."""
    answer = client.call("GET", of_model("/adapters", options))
    if options.json:
        screen.write([json.dumps(answer)])
        return Exit.DONE
    rows: list[tuple[str, ...]] = [("adapter", "state", "requests", "path")]
    rows += [_row(each) for each in answer["adapters"]]
    screen.write(table(rows, gap="  ") if answer["adapters"] else ["no adapters; flexctl lora load NAME PATH"])
    return Exit.DONE


def _row(adapter: dict[str, Any]) -> tuple[str, ...]:
    state = "leaving" if adapter["is_leaving"] else "serving"
    return (adapter["name"], state, str(adapter["requests"]), adapter["directory"])


def load(client: AdminClient, screen: Screen, options: Namespace) -> Exit:
    """Have one more, until the daemon ends."""
    path = str(Path(options.path).expanduser().absolute())
    answer = client.call("POST", of_model("/adapters/load", options), {"name": options.name, "path": path})
    said = f"requests may name {options.name} now; a restart of the daemon begins with those of its configuration"
    screen.write([json.dumps(answer) if options.json else said])
    return Exit.DONE


def unload(client: AdminClient, screen: Screen, options: Namespace) -> Exit:
    """Take one away: streams under way with it finish."""
    answer = client.call("POST", of_model("/adapters/unload", options), {"name": options.name})
    left = answer["requests"]
    said = f"; {plural(left, 'request')} under way will finish with it" if left else ""
    screen.write([json.dumps(answer) if options.json else f"no request may name {options.name} any more{said}"])
    return Exit.DONE
