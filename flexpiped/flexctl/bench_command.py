"""``flexctl bench``: sends requests to a server and says what they saw. Imported lazily."""

import json
import os
import sys
import time
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from flexpiped.flexctl.client import AdminClient, BadUsage, NotReachable
from flexpiped.flexctl.commands import Exit
from flexpiped.flexctl.output_file import ensure_writable, write_text
from flexpiped.flexctl.terminal import Screen
from flexpiped.flexctl.traffic_options import add_traffic, positive, slo_of, trace_of

if TYPE_CHECKING:
    from flexpiped.load.target import Target
    from planner.request_figures import Figures, RequestTimes
    from planner.traces import Trace

_REDRAWN_S = 0.1


def add_arguments(parser: ArgumentParser) -> None:
    """Add what ``flexctl bench`` takes."""
    parser.add_argument("--url", metavar="URL", help="of an OpenAI-compatible API; default: what the daemon serves")
    parser.add_argument("--model", metavar="NAME", help="model to ask for; default: the first that the server offers")
    parser.add_argument(
        "--chat", action="store_true", help="chat completions of words, instead of prompts of token ids"
    )
    parser.add_argument(
        "--strict", action="store_true", help="send nothing that OpenAI's API does not know (ignore_eos)"
    )
    parser.add_argument("--timeout", metavar="S", type=positive, default=600.0, help="of a request (default 600)")
    parser.add_argument("--details", metavar="FILE", help="write the times of every request here, as JSON lines")
    add_traffic(parser)


def bench(client: AdminClient, screen: Screen, options: Namespace) -> Exit:
    """Send the requests, show how far it is, then the figures. Failed requests are counted, and make it fail."""
    import asyncio

    trace = trace_of(options)
    if options.details:
        ensure_writable(options.details)
    ended: list[RequestTimes] = []
    try:
        found = asyncio.run(_replayed(_target(client, options), trace, screen, options, ended))
    except KeyboardInterrupt:
        if ended:
            _tell(ended, screen, options)
            print(f"flexctl: interrupted; only the {len(ended)} requests that had ended are counted", file=sys.stderr)
        raise
    return Exit.FAILED if _tell(found, screen, options).failed else Exit.DONE


def _tell(found: "list[RequestTimes]", screen: Screen, options: Namespace) -> "Figures":
    """Show the figures of the requests, and write down each where that was asked for."""
    from flexpiped.flexctl.bench_lines import bench_lines
    from planner.request_figures import figures

    result = figures(found, slo_of(options))
    if options.json:
        screen.write([json.dumps(asdict(result) | {"failures": _failures(found)})])
    else:
        screen.write(bench_lines(result, slo_of(options), failures=_failures(found), paint=screen.paint))
    if options.details:
        write_text(options.details, "".join(json.dumps(asdict(each)) + "\n" for each in found))
    return result


def _target(client: AdminClient, options: Namespace) -> "Target":
    from flexpiped.load.target import BadTarget, Endpoint, Target, parse_url

    url = options.url or client.call("GET", "/status").get("api_url") or ""
    key = os.environ.get("OPENAI_API_KEY", "")
    try:
        return Target(
            url=parse_url(url),
            model=options.model or "",
            endpoint=Endpoint.CHAT if options.chat else Endpoint.COMPLETIONS,
            strict=options.strict,
            timeout_s=options.timeout,
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
    except BadTarget as error:
        raise BadUsage("bad_url", str(error)) from None


async def _replayed(
    target: "Target", trace: "Trace", screen: Screen, options: Namespace, ended: "list[RequestTimes]"
) -> "list[RequestTimes]":
    """Send the requests and return how they went, in order of arrival; ``ended`` gets each as it ends."""
    from flexpiped.flexctl.bench_lines import progress_line
    from flexpiped.load.replay import NoServer, Progress, find_model, replay
    from flexpiped.load.target import BadTarget

    try:
        found = await find_model(target)  # a server that is not there is told of before anything is sent
    except NoServer as error:
        raise NotReachable("not_reachable", str(error)) from None
    except BadTarget as error:
        if not target.model:
            raise BadUsage("bad_url", str(error)) from None
        found = target.model
    shown_s = 0.0

    def show(progress: Progress) -> None:
        nonlocal shown_s
        if not options.json and time.monotonic() - shown_s > _REDRAWN_S:
            shown_s = time.monotonic()
            screen.live(progress_line(progress))

    target = replace(target, model=target.model or found)
    return await replay(target, trace, seed=options.seed, on_progress=show, on_ended=ended.append)


def _failures(found: "list[RequestTimes]") -> dict[str, int]:
    counts: dict[str, int] = {}
    for each in found:
        if each.failure:
            counts[each.failure] = counts.get(each.failure, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
