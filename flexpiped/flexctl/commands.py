"""The commands of ``flexctl``: each calls the admin API and writes what came back. Returns the exit code."""

import json
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flexpiped.flexctl.client import AdminClient, BadUsage, CtlError, NotReachable, Refused
from flexpiped.flexctl.rebalance_lines import (
    View,
    advance,
    current_line,
    end_lines,
    is_by_replica,
    is_scaling,
    named_lines,
    need_lines,
    plan_lines,
)
from flexpiped.flexctl.status_lines import status_lines
from flexpiped.flexctl.terminal import Screen
from flexpiped.flexctl.text import Paint, wrapped
from flexpiped.flexctl.which_model import of_model, status_of
from topology.units import plural


class Exit(IntEnum):
    DONE = 0
    FAILED = 1
    USAGE = 2
    NOT_REACHABLE = 3
    REFUSED = 4


def exit_code_of(error: CtlError) -> Exit:
    """Return the exit code that stands for ``error``."""
    match error:
        case NotReachable():
            return Exit.NOT_REACHABLE
        case Refused():
            return Exit.REFUSED
        case BadUsage():
            return Exit.USAGE
        case _:
            return Exit.FAILED


def status(client: AdminClient, screen: Screen, options: Namespace) -> Exit:
    """Show what the daemon is doing."""
    answer = status_of(client.call("GET", "/status"), options.model)
    if options.json:
        screen.write([json.dumps(answer)])
        return Exit.DONE
    for index, each in enumerate(answer.get("models", [answer])):
        lines = status_lines(each, now_unix_s=time.time(), paint=screen.paint)
        screen.write(["", *lines] if index else lines)
    return Exit.DONE


def rebalance(client: AdminClient, screen: Screen, options: Namespace) -> Exit:
    """Change the layout while requests are running, or say what that would do, or roll it back."""
    if options.cancel:
        answer = client.call("POST", of_model("/rebalance/cancel", options))
        screen.write([json.dumps(answer) if options.json else answer["message"]])
        return Exit.DONE
    body = {"replica": options.replica, "engine": options.engine, "on": options.on}
    return _carry_out(client, screen, options, body)


def scale(client: AdminClient, screen: Screen, options: Namespace) -> Exit:
    """Have more or fewer replicas serve, or say what that would do."""
    return _carry_out(client, screen, options, {"replicas": options.replicas, "on": options.on})


def _carry_out(client: AdminClient, screen: Screen, options: Namespace, asked: dict[str, Any]) -> Exit:
    body = {name: value for name, value in asked.items() if value is not None} | _body(options)
    if options.wait and not options.dry_run:
        return _wait(client.stream("POST", of_model("/rebalance", options), body), screen, as_json=options.json)
    answer = client.call("POST", of_model("/rebalance", options), body)
    screen.write([json.dumps(answer)] if options.json else _answer_lines(answer, screen.paint))
    return _verdict(answer)


def events(client: AdminClient, screen: Screen, options: Namespace) -> Exit:
    """Show what happened, and with ``--follow`` what happens."""
    path = f"/events?since={options.since}" + ("&follow=1" if options.follow else "")
    shown = ""
    for event in client.stream("GET", path):
        if options.json:
            screen.write([json.dumps(event)])
        elif event["message"] != shown:  # a phase reports its progress many times
            screen.write([event_line(event)])
            shown = event["message"]
    return Exit.DONE


def history(client: AdminClient, screen: Screen, options: Namespace) -> Exit:
    """Show what happened before, over restarts of the daemon, and what should be running."""
    kinds = "".join(f"&kind={quote(kind)}" for kind in options.kind)
    answer = client.call("GET", f"/history?limit={options.limit}{kinds}")
    if options.json:
        screen.write([json.dumps(answer)])
        return Exit.DONE
    screen.write(history_lines(answer))
    return Exit.DONE


def history_lines(answer: Mapping[str, Any]) -> list[str]:
    """Return what was and what is intended as lines; what could not be written down is told last."""
    lines = [event_line(event) for event in answer["events"]]
    if answer.get("intents"):
        known = {name: intent for name, intent in answer["intents"].items() if intent is not None}
        lines += [f"{name}: {_intent_line(intent)}" for name, intent in known.items()]
    elif answer["intent"] is not None:
        lines.append(_intent_line(answer["intent"]))
    if answer["incomplete_since_start"] is not None:
        lines.append(f"incomplete since the daemon started: {answer['incomplete_since_start']}")
    return lines


def _intent_line(intent: dict[str, Any]) -> str:
    stages = [len(each) for each in (intent["stages"], *intent["further_replicas"])]
    each = ", ".join(plural(count, "stage") for count in stages)
    what = each if len(stages) == 1 else f"{len(stages)} replicas ({each})"
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(intent["since_unix_s"]))
    return f"a restart begins with {what} of {intent['engine']} ({intent['reason']}, {when})"


def event_line(event: dict[str, Any]) -> str:
    """Return one event as one line, in local time."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time_unix_s"]))
    number = event["fields"].get("handover")
    subject = event["kind"] if number is None else f"{event['kind']} #{number}"
    model = event["fields"].get("model") if event["kind"] != "model" else None
    return f"{when}  {subject:<16}  {f'{model}: ' if model else ''}{event['message']}"


def _body(options: Namespace) -> dict[str, Any]:
    body: dict[str, Any] = {"dry_run": options.dry_run, "wait": options.wait}
    if options.layout is None:
        return body | {"stages": options.stages}
    try:
        return body | {"layout": Path(options.layout).read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise BadUsage("unreadable_layout", f"{options.layout}: {reason}") from None


def _answer_lines(answer: dict[str, Any], paint: Paint) -> list[str]:
    proposal = answer["proposal"]
    if not proposal["feasible"]:
        return named_lines("infeasible", "; ".join(proposal["sentences"]), paint=paint)
    if not proposal["changes_something"]:
        return wrapped("; ".join(proposal["sentences"]), head="nothing to do: ")
    if answer["state"] == "dry_run":
        return [*plan_lines(proposal), *need_lines(proposal), "dry run: nothing was moved"]
    return [
        *plan_lines(proposal),
        f"started handover #{answer['handover']}; follow it: flexctl events --follow (next time: --wait)",
    ]


def _verdict(answer: dict[str, Any]) -> Exit:
    return Exit.DONE if answer["proposal"]["feasible"] else Exit.REFUSED


def _wait(answers: Iterator[dict[str, Any]], screen: Screen, *, as_json: bool) -> Exit:
    """Show each phase as it happens; the last event has the record of how it ended."""
    view = View()
    for answer in answers:
        if as_json:
            screen.write([json.dumps(answer)])
        if "proposal" in answer:  # one plain answer: there was nothing to do
            if not as_json:
                screen.write(_answer_lines(answer, screen.paint))
            return _verdict(answer)
        fields = answer["fields"]
        if not as_json:
            view = _show(fields, view, screen)
        if fields["state"] == "ended":
            return Exit.DONE if fields["record"]["result"] == "done" else Exit.FAILED
    raise NotReachable("connection_lost", "the daemon ended before the refactoring did")


def _show(fields: dict[str, Any], view: View, screen: Screen) -> View:
    match fields["state"]:
        case "plan":
            screen.write(plan_lines(fields))
            view = View(by_replica=is_by_replica(fields) or is_scaling(fields))
        case "progress":
            view, lines = advance(view, fields["progress"])
            screen.write(lines)
            screen.live(current_line(view))
        case _:
            screen.write(end_lines(fields["record"], paint=screen.paint))
    return view
