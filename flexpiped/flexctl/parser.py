"""The command line of ``flexctl`` as a table, one row per command; completion and manual pages are made from it too."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from flexpiped import __version__
from flexpiped.flexctl import (
    arguments,
    auto_commands,
    bench_command,
    commands,
    lora_command,
    model_command,
    plan_command,
    simulate_command,
)
from flexpiped.flexctl.client import AdminClient
from flexpiped.flexctl.commands import Exit
from flexpiped.flexctl.terminal import Screen
from flexpiped.flexctl.which_model import add_model_argument


class Run(Protocol):
    """What a command does."""

    def __call__(self, client: AdminClient, screen: Screen, options: argparse.Namespace, /) -> Exit:
        """Return the exit code.

        Raises:
            CtlError
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command, or one part of a command that has ``parts`` (and then no ``run``)."""

    name: str
    about: str
    run: Run | None = None
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda _parser: None
    parts: tuple["Command", ...] = ()


def _row(
    name: str, about: str, run: Run, add_arguments: Callable[[argparse.ArgumentParser], None] = lambda _parser: None
) -> Command:
    """Return a command that has no parts."""
    return Command(name=name, about=about, run=run, add_arguments=add_arguments)


@dataclass(frozen=True, slots=True)
class Late:
    """A command whose module is imported only when it runs: the others start without it."""

    module: str
    function: str

    def load(self) -> Run:
        """Import the module and return what the command does."""
        found: Run = getattr(import_module(f"flexpiped.flexctl.{self.module}"), self.function)
        return found

    def __call__(self, client: AdminClient, screen: Screen, options: argparse.Namespace, /) -> Exit:
        return self.load()(client, screen, options)


_CONFIG = (
    _row("show", "every key that is in force", Late("config_command", "show")),
    _row(
        "check",
        "say whether a file is right; without a daemon",
        Late("config_command", "check"),
        arguments.check_arguments,
    ),
    _row("schema", "JSON schema of such files, for editors; without a daemon", Late("config_command", "schema_")),
    _row("diff", "what a reload would do; changes nothing", Late("config_command", "diff")),
)

_MODEL = (
    _row("list", "each model: its state, engine, stages and files", model_command.list_),
    _row("start", "start a model that was stopped, or did not start", model_command.start, model_command.add_name),
    _row(
        "stop",
        "stop a model: its streams finish first, and a restart leaves it stopped",
        model_command.stop,
        model_command.add_stop_arguments,
    ),
    _row(
        "swap",
        "serve other files under a model's name: beside the old ones where both have room, else after them",
        model_command.swap,
        model_command.add_swap_arguments,
    ),
)

_LORA = (
    _row(
        "list",
        "each LoRA adapter: how many requests are under way with it, and its directory",
        lora_command.list_,
        add_model_argument,
    ),
    _row(
        "load", "have one more while serving, until the daemon ends", lora_command.load, lora_command.add_load_arguments
    ),
    _row(
        "unload",
        "take one away while serving: streams under way with it finish",
        lora_command.unload,
        lora_command.add_unload_arguments,
    ),
)

COMMANDS = (
    _row(
        "status",
        "what is served, on which devices, how busy, and the last handover",
        commands.status,
        add_model_argument,
    ),
    _row(
        "top",
        "the status as a live screen, with what happens; changes nothing unless --control is given",
        Late("top_command", "top"),
        arguments.top_arguments,
    ),
    _row(
        "rebalance",
        "change the number, cuts or devices of the stages, or the engine, while serving",
        commands.rebalance,
        arguments.rebalance_arguments,
    ),
    _row(
        "scale",
        "how many replicas serve: more start on devices that are free, fewer finish what they do and end",
        commands.scale,
        arguments.scale_arguments,
    ),
    _row(
        "plan",
        "what would serve the workload best, and why; moves nothing",
        plan_command.plan,
        arguments.plan_arguments,
    ),
    Command(
        name="model", about="which models are served; start, stop and swap one while the others serve", parts=_MODEL
    ),
    Command(name="lora", about="which LoRA adapters a model serves; load and unload them while it serves", parts=_LORA),
    _row(
        "topology",
        "devices, what joins them and what is free on each; also without a daemon",
        Late("topology_command", "topology"),
        arguments.topology_arguments,
    ),
    _row(
        "profile",
        "measure what the model's layers take on this host; plans rest on it",
        Late("profile_command", "profile"),
        arguments.profile_arguments,
    ),
    _row(
        "bench",
        "send requests to any OpenAI-compatible server, and show latencies and goodput",
        bench_command.bench,
        bench_command.add_arguments,
    ),
    _row(
        "key",
        "make an API key: it is shown once, and the hash is what to add to the file of http.api_keys",
        Late("key_command", "key"),
        arguments.key_arguments,
    ),
    Command(
        name="config", about="what is configured, whether a file is right, and what a reload would do", parts=_CONFIG
    ),
    _row(
        "reload",
        "have the daemon read its configuration again: what can be live is applied, a wrong one changes nothing",
        Late("config_command", "reload"),
    ),
    _row(
        "simulate",
        "what the policy, or another system, would do under a trace; asks no daemon",
        simulate_command.simulate,
        simulate_command.add_arguments,
    ),
    _row(
        "history",
        "what happened, over restarts of the daemon too, and with which layout a restart begins",
        commands.history,
        arguments.history_arguments,
    ),
    _row(
        "auto",
        "whether the number of stages follows the traffic by itself",
        auto_commands.auto,
        auto_commands.add_auto_arguments,
    ),
    _row(
        "decisions",
        "what was decided by itself and why, oldest first",
        auto_commands.decisions,
        auto_commands.add_decisions_arguments,
    ),
    _row("events", "what happened, oldest first", commands.events, arguments.events_arguments),
    _row(
        "completion",
        "what a shell needs to complete flexctl commands: put it where the shell looks for it",
        Late("completion_command", "completion"),
        arguments.completion_arguments,
    ),
)


def flexctl_parser() -> argparse.ArgumentParser:
    """Return the parser; what it reads has ``run``, the function of the command."""
    everywhere = argparse.ArgumentParser(add_help=False)
    everywhere.add_argument("--socket", metavar="PATH", default=argparse.SUPPRESS, help="admin socket of the daemon")
    everywhere.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="JSON for programs")
    parser = argparse.ArgumentParser(
        prog="flexctl",
        description="Ask a running flexpiped what it is doing, and have it change its layout while it serves.",
        epilog="Exit codes: 0 done, 1 failed, 2 usage, 3 daemon not reachable, 4 refused or infeasible.",
        parents=[everywhere],
    )
    parser.add_argument("--version", action="version", version=f"flexctl {__version__}")
    _add(parser, COMMANDS, everywhere, metavar="COMMAND")
    return parser


def _add(
    parser: argparse.ArgumentParser, rows: tuple[Command, ...], everywhere: argparse.ArgumentParser, *, metavar: str
) -> None:
    known = parser.add_subparsers(metavar=metavar, required=True)
    for row in rows:
        added = known.add_parser(row.name, parents=[everywhere], help=row.about, description=_sentence(row.about))
        row.add_arguments(added)
        if row.parts:
            _add(added, row.parts, everywhere, metavar="PART")
        else:
            added.set_defaults(run=row.run)


def _sentence(about: str) -> str:
    return f"{about[0].upper()}{about[1:]}."
