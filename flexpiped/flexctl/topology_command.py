"""``flexctl topology``: a daemon's view of its host, this host without a daemon, or a snapshot. Imported lazily."""

import json
import os
import shutil
import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from flexpiped.flexctl.client import AdminClient, BadUsage, CtlError, Failed, NotReachable
from flexpiped.flexctl.commands import Exit
from flexpiped.flexctl.measuring import measure, plan
from flexpiped.flexctl.terminal import Screen
from flexpiped.flexctl.text import WIDTH, format_age, wrapped
from flexpiped.flexctl.topology_lines import topology_lines
from flexpiped.hardware import Hardware, keep_measurement
from flexpiped.settings import Settings
from topology.cluster import ClusterTopology
from topology.errors import BadSnapshot, NotMeasured, TopologyError
from topology.machines import load_topology
from topology.measured import Measurement, state_file
from topology.snapshot import from_json, to_json
from topology.topology import HostTopology

_NO_DAEMON: Final = "no daemon: looked at this host with default settings"


@dataclass(frozen=True, slots=True, kw_only=True)
class _View:
    """What is shown, and where measured figures of it are kept."""

    topology: HostTopology | ClusterTopology
    source: str
    python: str = sys.executable
    notes: tuple[str, ...] = ()
    is_daemon: bool = False


def topology(client: AdminClient, screen: Screen, options: Namespace) -> Exit:
    """Show devices and links; measure, save."""
    try:
        view = _view(client, options)
        if options.measure:
            view = _measured(client, screen, options, view)
        if options.save is not None:
            _save(Path(options.save), view.topology)
    except BadSnapshot as error:
        raise BadUsage("bad_snapshot", str(error)) from None
    except TopologyError as error:
        raise Failed("topology", str(error)) from None
    if options.json:
        screen.write([json.dumps(json.loads(to_json(view.topology)))])
        return Exit.DONE
    width = max(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns) if sys.stdout.isatty() else WIDTH
    lines = topology_lines(view.topology, width=width, paint=screen.paint, source=view.source)
    notes = [line for note in view.notes for line in wrapped(note, head="  ", width=width)]
    screen.write([*lines, *notes])
    if options.save is not None:
        screen.write([f"saved to {options.save}"])
    return Exit.DONE


def _view(client: AdminClient, options: Namespace) -> _View:
    """Return what to show: the file that is named, else the daemon's view, else this host as it is without one."""
    if options.topology is not None:
        if options.measure:
            raise BadUsage("usage", "--measure measures the devices of this host, not those of a file")
        return _View(topology=load_topology(options.topology), source="")
    try:
        return _of_answer(client.call("GET", "/topology"), source="", is_daemon=True)
    except NotReachable:
        if options.socket is not None:
            raise
    return _of_answer(Hardware(Settings(), python=sys.executable).look(), source=_NO_DAEMON, is_daemon=False)


def _of_answer(answer: Any, *, source: str, is_daemon: bool) -> _View:
    notes = [] if answer["problem"] is None else [f"measured figures are not used: {answer['problem']}"]
    if answer["measured_unix_s"] is not None:
        notes.append(f"measured {_ago(answer['measured_unix_s'])}: {answer['measured_how']}")
    return _View(
        topology=from_json(json.dumps(answer["topology"]), file="the daemon's answer"),
        source=source,
        python=answer["python"],
        notes=tuple(notes),
        is_daemon=is_daemon,
    )


def _measured(client: AdminClient, screen: Screen, options: Namespace, view: _View) -> _View:
    """Measure, keep the figures where the next discovery finds them, and return the view with them."""
    if not isinstance(view.topology, HostTopology):
        raise NotMeasured("only the devices of one host can be measured")
    what = plan(view.topology)
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    found = measure(view.topology, what, python=view.python, screen=screen)
    notes = list(what.notes)
    if load > cores / 2:
        notes.append(f"this machine is busy (load {load:.1f} on {cores} cores): an idle one gives higher figures")
    if view.is_daemon:
        kept = _give_to_daemon(client, found)
        notes.append("measured while the daemon runs: what it computes meanwhile is in the figures")
    else:
        kept = str(keep_measurement(state_file(os.environ, home=Path.home()), found))
    after = _view(client, options)
    return _View(
        topology=after.topology, source=after.source, notes=(*after.notes, *notes, f"figures are kept in {kept}")
    )


def _give_to_daemon(client: AdminClient, found: Measurement) -> str:
    try:
        return str(client.call("POST", "/topology/links", msgspec.to_builtins(found))["file"])
    except CtlError as error:
        raise NotMeasured(f"measured, but the daemon cannot keep it: {error}") from None


def _save(path: Path, found: HostTopology | ClusterTopology) -> None:
    try:
        path.write_text(to_json(found), encoding="utf-8")
    except OSError as error:
        raise NotMeasured(f"{path}: {error.strerror}") from None


def _ago(unix_s: float) -> str:
    return f"{format_age(time.time() - unix_s)} ago"
