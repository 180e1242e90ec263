"""What ``flexctl bench`` and ``flexctl simulate`` show of requests, as lines (pure)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from flexpiped.flexctl.text import Colour, Paint, bar, format_age, format_latency, table
from planner.request_figures import SHARES, Distribution, Figures
from planner.workload import Slo
from topology.units import plural

if TYPE_CHECKING:
    from flexpiped.load.replay import Progress

_FAILURES_SHOWN = 3


def progress_line(progress: "Progress") -> str:
    """Return how far a replay is, as one line."""
    failed = f", {progress.failed} failed" if progress.failed else ""
    return (
        f"requests  {bar(progress.ended, progress.of)}  {progress.ended} of {progress.of} ended, "
        f"{progress.sent - progress.ended} in flight{failed}   "
        f"{format_age(progress.elapsed_s)} of {format_age(progress.last_arrival_s)}"
    )


def bench_lines(figures: Figures, slo: Slo, *, failures: Mapping[str, int], paint: Paint) -> list[str]:
    """Return the figures of a run: the answer first, then latencies, then what failed."""
    lines = [
        f"{plural(figures.requests, 'request')} in {format_age(figures.duration_s)}   "
        f"{figures.requests_per_s:.2f} requests/s   {figures.output_tokens_per_s:.0f} tok/s   {_goodput(figures, slo)}"
    ]
    rows = [["", "mean", *(name.replace("_", ".") for name in SHARES), "max"]]
    rows += [_row("TTFT", figures.ttft_s), _row("TPOT", figures.tpot_s), _row("latency", figures.latency_s)]
    lines += table(rows)
    if figures.failed:
        lines.append(f"{paint(plural(figures.failed, 'request') + ' failed', Colour.RED)}")
        lines += [f"  {times} x {reason}" for reason, times in list(failures.items())[:_FAILURES_SHOWN]]
        if len(failures) > _FAILURES_SHOWN:
            lines.append(f"  and {len(failures) - _FAILURES_SHOWN} other reasons; --json has all")
    return lines


def _goodput(figures: Figures, slo: Slo) -> str:
    targets = [
        f"{name} {format_latency(value)}" for name, value in (("TTFT", slo.ttft_s), ("TPOT", slo.tpot_s)) if value
    ]
    if not targets:
        return "goodput - (no targets given)"
    return f"goodput {figures.goodput_per_s:.2f} requests/s ({figures.attainment:.1%} within {', '.join(targets)})"


def _row(name: str, found: Distribution) -> list[str]:
    values = [found.mean, *found.percentiles.values(), found.maximum]
    return [name, *("-" if value is None else format_latency(value) for value in values)]
