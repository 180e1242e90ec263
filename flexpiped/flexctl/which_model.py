"""Which of several models a command is about: ``--model NAME``."""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from flexpiped.flexctl.client import Refused
from topology.units import plural


def add_model_argument(parser: ArgumentParser) -> None:
    """Take ``--model``."""
    parser.add_argument("--model", metavar="NAME", help="the model that is meant, where the daemon serves several")


def of_model(path: str, options: Namespace) -> str:
    """Return a path of the admin API, for the model that was named; without a name as it is."""
    if options.model is None:
        return path
    return f"{path}{'&' if '?' in path else '?'}model={quote(options.model, safe='')}"


def status_of(answer: Mapping[str, Any], name: str | None) -> Mapping[str, Any]:
    """Return the status of one model from that of the daemon; without a name that of the first.

    Raises:
        Refused: There is no such model.
    """
    if name is None:
        return answer
    every: list[Mapping[str, Any]] = answer.get("models", [answer])
    found = next((each for each in every if each["model"]["name"] == name), None)
    if found is None:
        known = ", ".join(each["model"]["name"] for each in every)
        raise Refused("unknown_model", f"there is no model {name!r} here; there are: {known}")
    return found


def several_note(answer: Mapping[str, Any]) -> str:
    """Return how many models there are, for a screen that shows one of them."""
    names = [each["model"]["name"] for each in answer.get("models", ())]
    if len(names) < 2:
        return ""
    return f"{plural(len(names), 'model')}: {', '.join(names)}; --model NAME shows another one"
