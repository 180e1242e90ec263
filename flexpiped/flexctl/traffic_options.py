"""Which requests come: the options that ``flexctl bench`` and ``flexctl simulate`` share. Standard library only."""

import math
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from flexpiped.flexctl.client import BadUsage

if TYPE_CHECKING:
    from planner.traces import Trace
    from planner.workload import Slo


def positive(text: str) -> float:
    """Return a positive number. Raises as argparse wants it."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ArgumentTypeError(f'a positive number, not "{text}"')
    return value


def not_negative(text: str) -> float:
    """Return a number from 0 on. Raises as argparse wants it."""
    return 0.0 if text.strip() in ("0", "0.0") else positive(text)


def count(text: str) -> int:
    """Return a whole number of at least 1. Raises as argparse wants it."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f'a whole number of at least 1, not "{text}"')
    return int(text)


def add_traffic(parser: ArgumentParser) -> None:
    """Add the options."""
    traffic = parser.add_argument_group("requests", "from a trace file, or drawn at a rate and CV (gamma arrivals)")
    traffic.add_argument("--trace", metavar="FILE", help="Azure CSV or Mooncake JSON lines")
    traffic.add_argument("--rate", metavar="N", type=positive, help="requests a second (default 1)")
    traffic.add_argument("--cv", metavar="X", type=not_negative, help="CV of the times between them (default 1)")
    traffic.add_argument("--prompt", metavar="TOKENS", type=count, help="mean length of prompts (default 256)")
    traffic.add_argument("--output", metavar="TOKENS", type=count, help="mean length of answers (default 128)")
    traffic.add_argument(
        "--length-cv", metavar="X", type=not_negative, help="CV of both lengths (default 0: all alike)"
    )
    traffic.add_argument("--duration", metavar="S", type=positive, help="only so many seconds (drawn: default 60)")
    traffic.add_argument("--requests", metavar="N", type=count, help="at most so many requests")
    traffic.add_argument("--seed", metavar="N", type=int, default=0, help="of all that is drawn (default 0)")
    traffic.add_argument("--skip", metavar="S", type=not_negative, default=0.0, help="leave out a trace's beginning")
    traffic.add_argument("--speed", metavar="X", type=positive, default=1.0, help="arrivals so many times as fast")
    traffic.add_argument(
        "--prompt-scale", metavar="X", type=positive, default=1.0, help="prompts so many times as long"
    )
    traffic.add_argument(
        "--output-scale", metavar="X", type=positive, default=1.0, help="answers so many times as long"
    )
    traffic.add_argument("--max-prompt", metavar="TOKENS", type=count, help="cut longer prompts")
    traffic.add_argument("--max-output", metavar="TOKENS", type=count, help="cut longer answers")
    targets = parser.add_argument_group("targets", "goodput counts the requests that meet both")
    targets.add_argument("--slo-ttft", metavar="S", type=positive, help="time to the first token")
    targets.add_argument("--slo-tpot", metavar="S", type=positive, help="mean time between two tokens")


def slo_of(options: Namespace) -> "Slo":
    """Return the targets."""
    from planner.workload import Slo

    return Slo(ttft_s=options.slo_ttft, tpot_s=options.slo_tpot)


def trace_of(options: Namespace) -> "Trace":
    """Return the requests that the options ask for. Raises: BadUsage."""
    from flexpiped.load.trace_file import read_trace
    from planner.errors import InvalidTrace, InvalidWorkload
    from planner.traces import Reshape, drawn_trace, reshaped
    from planner.workload import Workload

    drawn = [name for name in ("rate", "cv", "prompt", "output", "length_cv") if getattr(options, name) is not None]
    if options.trace and drawn:
        raise BadUsage("bad_input", f"--trace has its own arrivals and lengths; without --{drawn[0].replace('_', '-')}")
    try:
        if options.trace:
            trace = read_trace(Path(options.trace))
        else:
            lengths_cv = options.length_cv or 0.0
            wanted = Workload(
                rate_per_s=options.rate or 1.0,
                cv=1.0 if options.cv is None else options.cv,
                prompt_tokens_mean=float(options.prompt or 256),
                prompt_tokens_cv=lengths_cv,
                output_tokens_mean=float(options.output or 128),
                output_tokens_cv=lengths_cv,
            )
            trace = drawn_trace(wanted, duration_s=(options.duration or 60.0) * options.speed, seed=options.seed)
        return reshaped(
            trace,
            Reshape(
                speed=options.speed,
                prompt_scale=options.prompt_scale,
                output_scale=options.output_scale,
                max_prompt_tokens=options.max_prompt,
                max_output_tokens=options.max_output,
                duration_s=options.duration,
                limit=options.requests,
                skip_s=options.skip,
            ),
        )
    except (InvalidTrace, InvalidWorkload) as error:
        raise BadUsage("bad_trace", str(error)) from None
