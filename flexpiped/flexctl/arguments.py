"""Options of the commands that do not bring theirs along."""

import argparse

from flexpiped.flexctl import plan_command
from flexpiped.flexctl.traffic_options import positive
from flexpiped.flexctl.which_model import add_model_argument


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


def top_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--control", action="store_true", help="let keys change the number of stages")
    parser.add_argument("--every", metavar="S", type=positive, default=1.0, help="seconds between readings (default 1)")
    add_model_argument(parser)


def rebalance_arguments(parser: argparse.ArgumentParser) -> None:
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


def scale_arguments(parser: argparse.ArgumentParser) -> None:
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


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stages", metavar="N", type=stages, default="auto", help="only with so many stages")
    plan_command.add_arguments(parser)


def topology_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--measure", action="store_true", help="measure every pair of devices of this host, and keep it"
    )
    parser.add_argument("--save", metavar="FILE", help="write a snapshot that the planner and this command read")
    parser.add_argument("--topology", metavar="FILE", help="show a snapshot, or a machine by name (dgx-h100)")


def profile_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="of this configuration, instead of what the daemon serves")
    parser.add_argument("--model", metavar="DIR", help="of this model")
    parser.add_argument("--of", metavar="NAME", help="of this model of the daemon, where it serves several")
    parser.add_argument("--short", action="store_true", help="a few seconds only, and less exact")


def key_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="whose key it is")
    parser.add_argument(
        "--scope", action="append", choices=("infer", "read", "admin"), help="what it opens (default: infer)"
    )


def history_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", metavar="N", type=int, default=50, help="the last N events (default 50)")
    parser.add_argument(
        "--kind", metavar="KIND", action="append", default=[], help="only these: refactoring, engine, ..."
    )


def events_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--follow", action="store_true", help="go on with what happens")
    parser.add_argument("--since", metavar="N", type=int, default=0, help="only events after number N")


def check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the file to read")


def completion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh"), help="the shell that is to complete")
