"""A simulation as one HTML page: figures and a timeline. Inline SVG, no outside resource, nothing to run. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from planner.simulation.outcome import Outcome, Sample

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 900, 150, 60, 20
_COLOURS = ("#1f6fb2", "#d2691e", "#2e8b57", "#8b3a8b", "#b22222", "#666666")
_POINTS = 900  # of a line: more cannot be told apart

Point = tuple[float, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One curve; a value that is missing interrupts it. ``steps``: it keeps each value until the next."""

    name: str
    points: Sequence[Point]
    steps: bool = False


def report(title: str, facts: Sequence[tuple[str, str]], outcome: Outcome) -> str:
    """Return the page. ``facts``: what to say of the run, name and value."""
    charts = [chart(name, unit, lines) for name, unit, lines in timelines(outcome.samples)]
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in facts)
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f"<table>{rows}</table>{''.join(charts)}{_decisions(outcome.samples)}</body></html>\n"
    )


def timelines(samples: Sequence[Sample]) -> list[tuple[str, str, list[Line]]]:
    """Return the charts of a timeline: name, unit, curves."""
    kinds = sorted({stages for each in samples for stages in each.replicas})
    granularity = [
        Line(
            name=f"{stages} stages",
            points=[(each.at_s, float(each.replicas.get(stages, 0))) for each in samples],
            steps=True,
        )
        for stages in kinds
    ]
    return [
        ("granularity", "replicas", granularity),
        ("arrivals", "requests/s (180 s)", [Line(name="rate", points=[(e.at_s, e.rate_per_s) for e in samples])]),
        ("CV of arrivals", "(180 s)", [Line(name="CV", points=[(e.at_s, e.cv) for e in samples])]),
        (
            "queue",
            "requests",
            [
                Line(name="without first token", points=[(e.at_s, float(e.queue)) for e in samples], steps=True),
                Line(name="running", points=[(e.at_s, float(e.running)) for e in samples], steps=True),
            ],
        ),
        (
            "latency",
            "s, mean of those that ended",
            [
                Line(name="first token", points=[(e.at_s, e.ttft_s) for e in samples]),
                Line(name="whole request", points=[(e.at_s, e.latency_s) for e in samples]),
            ],
        ),
        (
            "reserved devices",
            "",
            [Line(name="devices", points=[(e.at_s, float(e.devices)) for e in samples], steps=True)],
        ),
    ]


def chart(name: str, unit: str, lines: Sequence[Line]) -> str:
    """Return one chart with its axes and legend."""
    values = [value for line in lines for _, value in line.points if value is not None]
    end_s = max((at_s for line in lines for at_s, _ in line.points), default=0.0) or 1.0
    top = max(values, default=0.0) or 1.0
    drawn = "".join(
        f"<path d='{_path(line, end_s, top)}' fill='none' stroke='{_COLOURS[index % len(_COLOURS)]}'/>"
        for index, line in enumerate(lines)
    )
    legend = "".join(
        f"<tspan fill='{_COLOURS[index % len(_COLOURS)]}' dx='12'>{escape(line.name)}</tspan>"
        for index, line in enumerate(lines)
    )
    marks = "".join(
        f"<text x='{_LEFT + share * _WIDTH:.0f}' y='{_HEIGHT + 15}' text-anchor='middle'>{share * end_s / 60:.3g} min"
        "</text>"
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    )
    return (
        f"<h2>{escape(name)} <small>{escape(unit)}</small></h2>"
        f"<svg viewBox='0 -18 {_LEFT + _WIDTH + 30} {_HEIGHT + _BOTTOM + 20}' role='img' aria-label='{escape(name)}'>"
        f"<text x='{_LEFT}' y='-6'>{legend}</text>"
        f"<line x1='{_LEFT}' y1='{_HEIGHT}' x2='{_LEFT + _WIDTH}' y2='{_HEIGHT}' class='axis'/>"
        f"<line x1='{_LEFT}' y1='0' x2='{_LEFT}' y2='{_HEIGHT}' class='axis'/>"
        f"<text x='{_LEFT - 4}' y='8' text-anchor='end'>{top:.3g}</text>"
        f"<text x='{_LEFT - 4}' y='{_HEIGHT}' text-anchor='end'>0</text>{marks}{drawn}</svg>"
    )


def _path(line: Line, end_s: float, top: float) -> str:
    """Return the drawing commands. Of points that are too near each other the highest stays, so no peak is lost."""
    every = max(1, -(-len(line.points) // _POINTS))
    parts: list[str] = []
    pen_down, last_y = False, 0.0
    for start in range(0, len(line.points), every):
        piece = line.points[start : start + every]
        at_s = piece[0][0]
        value = max((each for _, each in piece if each is not None), default=None)
        if value is None:
            pen_down = False
            continue
        x, y = _LEFT + at_s / end_s * _WIDTH, _HEIGHT * (1 - value / top)
        if pen_down and line.steps:
            parts.append(f"L{x:.1f} {last_y:.1f}")
        parts.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}")
        pen_down, last_y = True, y
    return "".join(parts)


def _decisions(samples: Sequence[Sample]) -> str:
    """Return what was decided, without what was kept."""
    acted = [each for each in samples if not each.reason.startswith(("keep", "static"))]
    rows = "".join(f"<tr><td>{each.at_s / 60:.1f} min</td><td>{escape(each.reason)}</td></tr>" for each in acted)
    return f"<h2>decisions</h2><table>{rows}</table>" if rows else ""


_STYLE = (
    "body{font:14px sans-serif;max-width:1000px;margin:2em auto;color:#222}svg{width:100%}"
    "text{font-size:11px}.axis{stroke:#999}td{padding:1px 12px 1px 0;vertical-align:top}small{color:#777}"
    "h2{font-size:15px;margin:1.2em 0 0}"
)
