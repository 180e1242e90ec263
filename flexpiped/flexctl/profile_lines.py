"""A profile as lines for people: progress while it is measured, then terms and how well they explain it. Pure."""

from collections.abc import Sequence
from typing import Final

from engines.native.timing_messages import TimingPoint
from flexpiped.flexctl.text import PLAIN, Colour, Paint, bar, format_duration, table, wrapped
from planner.profile import Fit, Profile
from planner.profile_terms import Term

_FITS_A_TABLE: Final = 3
_NANOSECONDS: Final = 1e9


def progress_line(point: TimingPoint, *, of: int, elapsed_s: float) -> str:
    """Return one line: a bar, what was measured last, and how long the rest will take."""
    left_s = elapsed_s / point.done * (of - point.done)
    return f"{bar(point.done, of)}  {point.done}/{of}  {point.what}   {format_duration(left_s)} left"


def profile_lines(profile: Profile, *, paint: Paint = PLAIN) -> list[str]:
    """Return what each term takes under each fit, and the residuals, in 80 columns; a warning where those are high."""
    lines = wrapped(profile.origin, head=f"{profile.model_name}: ")
    for first in range(0, len(profile.fits), _FITS_A_TABLE):
        lines += _table(profile.fits[first : first + _FITS_A_TABLE])
    beside = any(fit.beside_others for fit in profile.fits)
    lines += ["  * while other stages compute on the same host"] if beside else []
    return lines + [paint(line, Colour.YELLOW) for line in wrapped(profile.warning) if line]


def _table(fits: Sequence[Fit]) -> list[str]:
    heads = ["", *(_head(fit) for fit in fits)]
    rows = [[term.value, *(_seconds(fit.seconds[term]) for fit in fits)] for term in Term]
    count = ["measurements", *(str(len(fit.residuals)) for fit in fits)]
    mean = ["mean residual", *(f"{fit.mean_residual:.1%}" for fit in fits)]
    most = ["90 % of residuals below", *(f"{_percentile(fit, 0.9):.1%}" for fit in fits)]
    return table([heads, *rows, count, mean, most], gap="  ")


def _head(fit: Fit) -> str:
    return f"{fit.threads} {'thread' if fit.threads == 1 else 'threads'}{'*' if fit.beside_others else ''}"


def _seconds(value_s: float) -> str:
    if value_s <= 0:
        return "-"
    if value_s < 1e-6:
        return f"{value_s * _NANOSECONDS:.3g} ns"
    return f"{value_s * 1e6:.3g} us" if value_s < 1e-3 else format_duration(value_s)


def _percentile(fit: Fit, share: float) -> float:
    ordered = sorted(map(abs, fit.residuals))
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
