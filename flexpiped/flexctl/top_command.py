"""``flexctl top``: the status as a live screen."""

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from flexpiped.flexctl.client import AdminClient, BadUsage
from flexpiped.flexctl.commands import Exit
from flexpiped.flexctl.terminal import Screen
from flexpiped.flexctl.which_model import status_of


class AskedDaemon:
    """The ``Daemon`` that answers at an admin socket."""

    def __init__(self, client: AdminClient) -> None:
        self._client = client

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return self._client.call(method, path, body)

    def events_since(self, sequence: int) -> list[dict[str, Any]]:
        return list(self._client.stream("GET", f"/events?since={sequence}"))


def top(client: AdminClient, _screen: Screen, options: argparse.Namespace) -> Exit:
    """Show it until the user leaves. The first answer is waited for before the screen is taken."""
    if options.json or not sys.stdout.isatty():
        raise BadUsage("no_terminal", "top needs a terminal; flexctl status --json is for programs")
    status_of(client.call("GET", "/status"), options.model)
    from flexpiped.flexctl.top_app import TopApp

    TopApp(AskedDaemon(client), may_change=options.control, period_s=options.every, model=options.model).run()
    return Exit.DONE
