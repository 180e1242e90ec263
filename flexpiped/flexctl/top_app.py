"""The screen of ``flexctl top``: what the daemon does, read anew every second. Only this module imports textual."""

import asyncio
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, ClassVar, Final, Protocol
from urllib.parse import quote

from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.widgets import Footer, RichLog, Sparkline, Static

from flexpiped.flexctl.client import CtlError
from flexpiped.flexctl.commands import event_line
from flexpiped.flexctl.rebalance_lines import View
from flexpiped.flexctl.status_lines import status_lines
from flexpiped.flexctl.top_lines import change_lines, follow, stage_map
from flexpiped.flexctl.which_model import several_note, status_of
from topology.errors import BadSnapshot
from topology.snapshot import from_json
from topology.topology import Topology

_RATES_KEPT: Final = 120


class Daemon(Protocol):
    """What is asked of the admin API. Every method blocks, and raises ``CtlError``."""

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the answer to one request."""

    def events_since(self, sequence: int) -> list[dict[str, Any]]:
        """Return what happened after event ``sequence``."""


class TopApp(App[None]):
    """Shows one daemon; one that goes away is shown as gone, and again when it is back.

    Args:
        may_change: Whether keys may change the layout; without it the screen only shows.
        period_s: Between two readings.
        model: The one that is shown, where there are several; None: the first.
    """

    CSS = """
    VerticalScroll { height: auto; max-height: 80%; }
    #now, #stages, #change, #said { height: auto; padding: 0 1; }
    #rate { height: 3; margin: 0 1; }
    #events { height: 1fr; min-height: 4; border-top: solid $primary; }
    #said { color: $warning; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "quit"),
        Binding("plus", "more", "one stage more"),
        Binding("minus", "fewer", "one stage fewer"),
        Binding("c", "cancel", "cancel the change"),
    ]

    def __init__(self, daemon: Daemon, *, may_change: bool, period_s: float = 1.0, model: str | None = None) -> None:
        super().__init__()
        self._daemon = daemon
        self._may_change = may_change
        self._period_s = period_s
        self._model = model
        self._shown = ""  # the name of the model that is shown, where there are several
        self._rates: list[float] = []
        self._last_event = 0
        self._num_stages = 0
        self._progress = View()  # of the change under way
        self._topology: Topology | None = None
        self._known_devices: set[str] = set()  # those that had a stage when the topology was asked for

    def compose(self) -> ComposeResult:
        """Lay the screen out, the answer first."""
        with VerticalScroll():
            yield Static("asking the daemon", id="now", markup=False)
            yield Static("", id="stages", markup=False)
            yield Sparkline([], id="rate")
            yield Static("", id="change", markup=False)
            yield Static("", id="said", markup=False)
        yield RichLog(id="events", markup=False, wrap=True)
        yield Footer()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:  # noqa: ARG002
        """Say whether a key does something: those that change the layout do so only where that was asked for."""
        return self._may_change or action not in ("more", "fewer", "cancel")

    async def on_mount(self) -> None:
        """Read at once, and from then on again and again."""
        await self.refresh_now()
        self.set_interval(self._period_s, self.refresh_now)

    async def refresh_now(self) -> None:
        """Read the daemon and show it."""
        try:
            answer = await asyncio.to_thread(self._daemon.call, "GET", "/status")
            status = status_of(answer, self._model)
            happened = await asyncio.to_thread(self._daemon.events_since, self._last_event)
        except CtlError as error:
            self._last_event = 0  # one that comes back counts from the beginning
            self._progress, self._known_devices = View(), set()
            self._say("#now", str(error))
            return
        links = await self._links_of(status)
        if not self.query("#now"):
            return  # the user has left while the daemon was asked
        self._num_stages = len(status["stages"])
        note = several_note(answer)
        self._shown = status["model"]["name"] if note else ""
        self._say("#now", "\n".join([*([note] if note else []), *status_lines(status, now_unix_s=time.time())]))
        self._take(happened)
        self._say("#stages", "\n".join(stage_map(status, links)))
        self._say("#change", "\n".join(change_lines(status, self._progress)))
        if status["tokens_per_s"] is not None:
            self._rates = [*self._rates, status["tokens_per_s"]][-_RATES_KEPT:]
            self.query_one("#rate", Sparkline).data = self._rates

    def _take(self, happened: list[dict[str, Any]]) -> None:
        for event in happened:
            self._last_event = event["sequence"]
            self.query_one("#events", RichLog).write(event_line(event))
            if event["fields"].get("model", self._shown) == self._shown:
                self._progress = follow(self._progress, event["fields"])

    async def _links_of(self, status: Mapping[str, Any]) -> Topology | None:
        """Return what joins the devices; it is asked for when one has a stage that had none before."""
        devices = {each for stage in status["stages"] for each in stage["device_ids"]}
        if not devices <= self._known_devices:
            self._known_devices |= devices
            with suppress(CtlError, BadSnapshot):  # the screen does without
                answer = await asyncio.to_thread(self._daemon.call, "GET", "/topology")
                self._topology = from_json(json.dumps(answer["topology"]), file="the daemon's answer")
        return self._topology

    async def action_more(self) -> None:
        """Have one stage more."""
        await self._change("/rebalance", {"stages": self._num_stages + 1})

    async def action_fewer(self) -> None:
        """Have one stage fewer."""
        await self._change("/rebalance", {"stages": max(self._num_stages - 1, 1)})

    async def action_cancel(self) -> None:
        """Roll back what is under way."""
        await self._change("/rebalance/cancel", None)

    async def _change(self, path: str, body: Mapping[str, Any] | None) -> None:
        try:
            picked = f"{path}?model={quote(self._shown, safe='')}" if self._shown else path
            answer = await asyncio.to_thread(self._daemon.call, "POST", picked, body)
        except CtlError as error:
            self._say("#said", f"refused: {error}")
            return
        proposal = answer.get("proposal")
        said = answer.get("message", "") if proposal is None else "; ".join(proposal["sentences"])
        self._say("#said", said)
        await self.refresh_now()

    def _say(self, where: str, text: str) -> None:
        self.query_one(where, Static).update(text)
