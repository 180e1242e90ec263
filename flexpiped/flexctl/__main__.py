"""``flexctl``: ask a running daemon what it is doing, and have it change its layout.

Exit codes: 0 done, 1 failed, 2 usage, 3 daemon not reachable, 4 refused or infeasible.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from flexpiped import __version__
from flexpiped.admin_socket import candidate_sockets
from flexpiped.flexctl import auto_commands, bench_command, commands, simulate_command
from flexpiped.flexctl.client import AdminClient, CtlError, Refused
from flexpiped.flexctl.commands import Exit
from flexpiped.flexctl.plan_command import add_arguments, plan
from flexpiped.flexctl.terminal import Screen, silence_closed_pipe

_INTERRUPTED = 130  # as shells report a command ended by Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments, argparse.Namespace(socket=None, json=False))
    screen = Screen(sys.stdout, environment=os.environ)
    try:
        return int(options.run(AdminClient(_sockets(options.socket)), screen, options))
    except CtlError as error:
        _report(error, screen, as_json=options.json)
        return int(commands.exit_code_of(error))
    except BrokenPipeError:
        silence_closed_pipe(sys.stdout)
        return int(Exit.DONE)
    except KeyboardInterrupt:
        screen.write([])
        if options.run is commands.rebalance:
            print("flexctl: the refactoring goes on; flexctl rebalance --cancel rolls it back", file=sys.stderr)
        return _INTERRUPTED


def _report(error: CtlError, screen: Screen, *, as_json: bool) -> None:
    if as_json:
        screen.write([json.dumps({"error": {"code": error.code, "message": str(error)}})])
        return
    screen.write([])
    prefix = "refused" if isinstance(error, Refused) else "flexctl"
    print(f"{prefix}: {error}", file=sys.stderr)


def _sockets(chosen: str | None) -> tuple[Path, ...]:
    return candidate_sockets(os.environ, uid=os.getuid()) if chosen is None else (Path(chosen),)


def _topology(client: AdminClient, screen: Screen, options: argparse.Namespace) -> Exit:
    from flexpiped.flexctl.topology_command import topology  # the other commands start without it

    return topology(client, screen, options)


def _profile(client: AdminClient, screen: Screen, options: argparse.Namespace) -> Exit:
    from flexpiped.flexctl.profile_command import profile  # the other commands start without it

    return profile(client, screen, options)


def _config(client: AdminClient, screen: Screen, options: argparse.Namespace) -> Exit:
    from flexpiped.flexctl import config_command  # the other commands start without it

    return config_command.run(client, screen, options)


def _reload(client: AdminClient, screen: Screen, options: argparse.Namespace) -> Exit:
    from flexpiped.flexctl import config_command

    return config_command.reload(client, screen, options)


def _add_config(
    known: "argparse._SubParsersAction[argparse.ArgumentParser]", everywhere: argparse.ArgumentParser
) -> None:
    about = "what is configured, whether a file is right, and what a reload would do"
    configured = known.add_parser("config", help=about)
    configured.set_defaults(run=_config)
    parts = configured.add_subparsers(metavar="PART", dest="part", required=True)
    parts.add_parser("show", parents=[everywhere], help="every key that is in force")
    checked = parts.add_parser("check", parents=[everywhere], help="say whether a file is right; without a daemon")
    checked.add_argument("file", metavar="FILE")
    parts.add_parser("schema", parents=[everywhere], help="JSON schema of such files, for editors; without a daemon")
    parts.add_parser("diff", parents=[everywhere], help="what a reload would do; changes nothing")
    about = "have the daemon read its configuration again: what can be live is applied, a wrong one changes nothing"
    known.add_parser("reload", parents=[everywhere], help=about).set_defaults(run=_reload)


def _key(_client: AdminClient, screen: Screen, options: argparse.Namespace) -> Exit:
    from flexpiped.flexctl.key_command import key

    return key(screen, options)


def _stages(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'a number of at least 1, or "auto", not "{text}"')
    return int(text)


def _parser() -> argparse.ArgumentParser:
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
    known = parser.add_subparsers(metavar="COMMAND", required=True)

    about = "what is served, on which devices, how busy, and the last handover"
    known.add_parser("status", parents=[everywhere], help=about).set_defaults(run=commands.status)

    change = known.add_parser(
        "rebalance",
        parents=[everywhere],
        help="change the number, cuts or devices of the stages, or the engine, while serving",
    )
    change.set_defaults(run=commands.rebalance)
    what = change.add_mutually_exclusive_group()
    what.add_argument("--stages", metavar="N", type=_stages, help='number of stages, or "auto" (default)')
    what.add_argument("--layout", metavar="FILE", help="layout file: cuts and devices of every stage")
    what.add_argument("--cancel", action="store_true", help="roll back the refactoring under way")
    change.add_argument(
        "--engine",
        choices=("native", "vllm", "sglang"),
        help="by an engine of this kind, which takes over from the one in force",
    )
    change.add_argument(
        "--replica", action="store_true", help="by a second instance that takes over, even where it could be in place"
    )
    change.add_argument("--dry-run", action="store_true", help="say what would move and whether it fits; move nothing")
    change.add_argument("--wait", action="store_true", help="show the progress and return when it is done")

    planned = known.add_parser(
        "plan", parents=[everywhere], help="what would serve the workload best, and why; moves nothing"
    )
    planned.set_defaults(run=plan)
    planned.add_argument("--stages", metavar="N", type=_stages, default="auto", help="only with so many stages")
    add_arguments(planned)

    about = "devices, what joins them and what is free on each; also without a daemon"
    seen = known.add_parser("topology", parents=[everywhere], help=about)
    seen.set_defaults(run=_topology)
    seen.add_argument("--measure", action="store_true", help="measure every pair of devices of this host, and keep it")
    seen.add_argument("--save", metavar="FILE", help="write a snapshot that the planner and this command read")
    seen.add_argument("--topology", metavar="FILE", help="show a snapshot, or a machine by name (dgx-h100)")

    about = "measure what the model's layers take on this host; plans rest on it"
    measured = known.add_parser("profile", parents=[everywhere], help=about)
    measured.set_defaults(run=_profile)
    measured.add_argument("--config", metavar="FILE", help="of this configuration, instead of what the daemon serves")
    measured.add_argument("--model", metavar="DIR", help="of this model")
    measured.add_argument("--short", action="store_true", help="a few seconds only, and less exact")

    about = "send requests to any OpenAI-compatible server, and show latencies and goodput"
    loaded = known.add_parser("bench", parents=[everywhere], help=about)
    loaded.set_defaults(run=bench_command.bench)
    bench_command.add_arguments(loaded)

    about = "make an API key: it is shown once, and the hash is what to add to the file of http.api_keys"
    made = known.add_parser("key", parents=[everywhere], help=about)
    made.set_defaults(run=_key)
    made.add_argument("name", metavar="NAME", help="whose key it is")
    made.add_argument(
        "--scope", action="append", choices=("infer", "read", "admin"), help="what it opens (default: infer)"
    )

    _add_config(known, everywhere)

    about = "what the policy, or another system, would do under a trace; asks no daemon"
    simulated = known.add_parser("simulate", parents=[everywhere], help=about)
    simulated.set_defaults(run=simulate_command.simulate)
    simulate_command.add_arguments(simulated)

    about = "what happened, over restarts of the daemon too, and with which layout a restart begins"
    was = known.add_parser("history", parents=[everywhere], help=about)
    was.set_defaults(run=commands.history)
    was.add_argument("--limit", metavar="N", type=int, default=50, help="the last N events (default 50)")
    was.add_argument("--kind", metavar="KIND", action="append", default=[], help="only these: refactoring, engine, ...")

    about = "whether the number of stages follows the traffic by itself"
    chosen = known.add_parser("auto", parents=[everywhere], help=about)
    chosen.set_defaults(run=auto_commands.auto)
    auto_commands.add_auto_arguments(chosen)

    about = "what was decided by itself and why, oldest first"
    decided = known.add_parser("decisions", parents=[everywhere], help=about)
    decided.set_defaults(run=auto_commands.decisions)
    auto_commands.add_decisions_arguments(decided)

    happened = known.add_parser("events", parents=[everywhere], help="what happened, oldest first")
    happened.set_defaults(run=commands.events)
    happened.add_argument("--follow", action="store_true", help="go on with what happens")
    happened.add_argument("--since", metavar="N", type=int, default=0, help="only events after number N")
    return parser


if __name__ == "__main__":
    sys.exit(main())
