"""The command line of ``flexctl`` as a table, one row per command; completion and manual pages are made from it too."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from flexpiped import __version__
from flexpiped.flexctl import (
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
from flexpiped.flexctl.traffic_options import positive
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


def stages(text: str) -> int | str:
    """Read what ``--stages`` takes."""
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'a number of at least 1, or "auto", not "{text}"')
    return int(text)


def count(text: str) -> int:
    """Read a number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'a number of at least 1, not "{text}"')
    return int(text)


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


def _top_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--control", action="store_true", help="let keys change the number of stages")
    parser.add_argument("--every", metavar="S", type=positive, default=1.0, help="seconds between readings (default 1)")
    add_model_argument(parser)


def _rebalance_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--stages", metavar="N", type=stages, help='number of stages, or "auto" (default)')
    what.add_argument("--layout", metavar="FILE", help="layout file: cuts and devices of every stage")
    what.add_argument("--cancel", action="store_true", help="roll back the refactoring under way")
    parser.add_argument(
        "--engine",
        choices=("native", "vllm", "sglang"),
        help="by an engine of this kind, which takes over from the one in force",
    )
    parser.add_argument(
        "--replica", action="store_true", help="by a second instance that takes over, even where it could be in place"
    )
    parser.add_argument("--on", metavar="NUMBER", type=count, help="the replica to change (default: the main one)")
    _carrying_out_arguments(parser)


def _scale_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--replicas", metavar="N", type=count, required=True, help="how many there are to be")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--stages", metavar="N", type=stages, help="of those that come, or leave (default: any)")
    what.add_argument("--layout", metavar="FILE", help="layout file of the one that comes")
    parser.add_argument("--on", metavar="NUMBER", type=count, help="the replica that leaves first")
    _carrying_out_arguments(parser)


def _carrying_out_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="say what would move and whether it fits; move nothing")
    parser.add_argument("--wait", action="store_true", help="show the progress and return when it is done")
    add_model_argument(parser)


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stages", metavar="N", type=stages, default="auto", help="only with so many stages")
    plan_command.add_arguments(parser)


def _topology_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--measure", action="store_true", help="measure every pair of devices of this host, and keep it"
    )
    parser.add_argument("--save", metavar="FILE", help="write a snapshot that the planner and this command read")
    parser.add_argument("--topology", metavar="FILE", help="show a snapshot, or a machine by name (dgx-h100)")


def _profile_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="of this configuration, instead of what the daemon serves")
    parser.add_argument("--model", metavar="DIR", help="of this model")
    parser.add_argument("--of", metavar="NAME", help="of this model of the daemon, where it serves several")
    parser.add_argument("--short", action="store_true", help="a few seconds only, and less exact")


def _key_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="whose key it is")
    parser.add_argument(
        "--scope", action="append", choices=("infer", "read", "admin"), help="what it opens (default: infer)"
    )


def _history_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", metavar="N", type=int, default=50, help="the last N events (default 50)")
    parser.add_argument(
        "--kind", metavar="KIND", action="append", default=[], help="only these: refactoring, engine, ..."
    )


def _events_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--follow", action="store_true", help="go on with what happens")
    parser.add_argument("--since", metavar="N", type=int, default=0, help="only events after number N")


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the file to read")


def _completion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh"), help="the shell that is to complete")


_CONFIG = (
    Command(name="show", about="every key that is in force", run=Late("config_command", "show")),
    Command(
        name="check",
        about="say whether a file is right; without a daemon",
        run=Late("config_command", "check"),
        add_arguments=_check_arguments,
    ),
    Command(
        name="schema",
        about="JSON schema of such files, for editors; without a daemon",
        run=Late("config_command", "schema_"),
    ),
    Command(name="diff", about="what a reload would do; changes nothing", run=Late("config_command", "diff")),
)

_MODEL = (
    Command(
        name="list",
        about="each model: its state, engine, stages and files",
        run=model_command.list_,
    ),
    Command(
        name="start",
        about="start a model that was stopped, or did not start",
        run=model_command.start,
        add_arguments=model_command.add_name,
    ),
    Command(
        name="stop",
        about="stop a model: its streams finish first, and a restart leaves it stopped",
        run=model_command.stop,
        add_arguments=model_command.add_stop_arguments,
    ),
    Command(
        name="swap",
        about="serve other files under a model's name: beside the old ones where both have room, else after them",
        run=model_command.swap,
        add_arguments=model_command.add_swap_arguments,
    ),
)

_LORA = (
    Command(
        name="list",
        about="each LoRA adapter: how many requests are under way with it, and its directory",
        run=lora_command.list_,
        add_arguments=add_model_argument,
    ),
    Command(
        name="load",
        about="have one more while serving, until the daemon ends",
        run=lora_command.load,
        add_arguments=lora_command.add_load_arguments,
    ),
    Command(
        name="unload",
        about="take one away while serving: streams under way with it finish",
        run=lora_command.unload,
        add_arguments=lora_command.add_unload_arguments,
    ),
)

COMMANDS = (
    Command(
        name="status",
        about="what is served, on which devices, how busy, and the last handover",
        run=commands.status,
        add_arguments=add_model_argument,
    ),
    Command(
        name="top",
        about="the status as a live screen, with what happens; changes nothing unless --control is given",
        run=Late("top_command", "top"),
        add_arguments=_top_arguments,
    ),
    Command(
        name="rebalance",
        about="change the number, cuts or devices of the stages, or the engine, while serving",
        run=commands.rebalance,
        add_arguments=_rebalance_arguments,
    ),
    Command(
        name="scale",
        about="how many replicas serve: more start on devices that are free, fewer finish what they do and end",
        run=commands.scale,
        add_arguments=_scale_arguments,
    ),
    Command(
        name="plan",
        about="what would serve the workload best, and why; moves nothing",
        run=plan_command.plan,
        add_arguments=_plan_arguments,
    ),
    Command(
        name="model",
        about="which models are served; start, stop and swap one while the others serve",
        parts=_MODEL,
    ),
    Command(
        name="lora",
        about="which LoRA adapters a model serves; load and unload them while it serves",
        parts=_LORA,
    ),
    Command(
        name="topology",
        about="devices, what joins them and what is free on each; also without a daemon",
        run=Late("topology_command", "topology"),
        add_arguments=_topology_arguments,
    ),
    Command(
        name="profile",
        about="measure what the model's layers take on this host; plans rest on it",
        run=Late("profile_command", "profile"),
        add_arguments=_profile_arguments,
    ),
    Command(
        name="bench",
        about="send requests to any OpenAI-compatible server, and show latencies and goodput",
        run=bench_command.bench,
        add_arguments=bench_command.add_arguments,
    ),
    Command(
        name="key",
        about="make an API key: it is shown once, and the hash is what to add to the file of http.api_keys",
        run=Late("key_command", "key"),
        add_arguments=_key_arguments,
    ),
    Command(
        name="config",
        about="what is configured, whether a file is right, and what a reload would do",
        parts=_CONFIG,
    ),
    Command(
        name="reload",
        about="have the daemon read its configuration again: what can be live is applied, a wrong one changes nothing",
        run=Late("config_command", "reload"),
    ),
    Command(
        name="simulate",
        about="what the policy, or another system, would do under a trace; asks no daemon",
        run=simulate_command.simulate,
        add_arguments=simulate_command.add_arguments,
    ),
    Command(
        name="history",
        about="what happened, over restarts of the daemon too, and with which layout a restart begins",
        run=commands.history,
        add_arguments=_history_arguments,
    ),
    Command(
        name="auto",
        about="whether the number of stages follows the traffic by itself",
        run=auto_commands.auto,
        add_arguments=auto_commands.add_auto_arguments,
    ),
    Command(
        name="decisions",
        about="what was decided by itself and why, oldest first",
        run=auto_commands.decisions,
        add_arguments=auto_commands.add_decisions_arguments,
    ),
    Command(
        name="events",
        about="what happened, oldest first",
        run=commands.events,
        add_arguments=_events_arguments,
    ),
    Command(
        name="completion",
        about="what a shell needs to complete flexctl commands: put it where the shell looks for it",
        run=Late("completion_command", "completion"),
        add_arguments=_completion_arguments,
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
