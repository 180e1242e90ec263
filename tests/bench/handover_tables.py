"""The tables and verdicts of the handover benchmark."""

from collections.abc import Sequence

from tests.bench.handover_figures import MoveFigures, Undisturbed
from tests.bench.handover_legs import phase_durations
from tests.bench.stats import median
from tests.bench.tables import Bound, mib, ms, table, times

_MOVES = [
    *("move", "moves", "took ms", "prepare", "sync", "commit", "retire", "drain", "pause", "rounds", "KV MiB"),
    *("weights MiB", "engine gap", "of p99", "control", "client gap", "control", "ratio"),
]


def print_undisturbed(title: str, layouts: Sequence[Undisturbed]) -> None:
    """Print the gaps without a move."""
    rows = [[str(u.stages), str(u.samples), ms(u.p50_s), ms(u.p99_s), ms(u.longest_s)] for u in layouts if u.samples]
    if rows:
        table(title, ["stages", "gaps", "p50 ms", "p99 ms", "longest ms"], rows)


def print_moves(title: str, moves: Sequence[MoveFigures]) -> None:
    """Print medians over the moves of each kind, and over all."""
    kinds = list(dict.fromkeys((m.leg.before, m.leg.after) for m in moves))
    rows = [
        _row(f"{kind[0]} -> {kind[1]}", [m for m in moves if (m.leg.before, m.leg.after) == kind]) for kind in kinds
    ]
    table(title, _MOVES, [*rows, _row("all", moves)])


def bounds_of(where: str, moves: Sequence[MoveFigures], *, is_direct: bool, commit_limit_ms: float) -> list[Bound]:
    """Return what is required of these moves."""
    client = Bound(
        what=f"{where}: largest client-side gap / that without a move",
        value=median(m.client_ratio for m in moves),
        limit=1.5,
        at_most=True,
    )
    if not is_direct:
        return [client]
    return [
        Bound(
            what=f"{where}: largest engine-side gap / undisturbed p99",
            value=median(m.engine_ratio for m in moves),
            limit=2.0,
            at_most=True,
        ),
        Bound(
            what=f"{where}: commit pause",
            value=median(_pause_s(m) for m in moves) * 1e3,
            limit=commit_limit_ms,
            at_most=True,
            unit="ms",
        ),
        client,
    ]


def _row(name: str, moves: Sequence[MoveFigures]) -> list[str]:
    phases = [phase_durations(m.leg.reports) for m in moves]
    last = [m.leg.reports[-1] for m in moves]
    return [
        name,
        str(len(moves)),
        ms(median(m.leg.move_s for m in moves)),
        *(ms(median(p[phase] for p in phases)) for phase in ("prepare", "sync", "commit", "retire")),
        ms(median(r.drain_s or 0.0 for r in last)),
        ms(median(_pause_s(m) for m in moves)),
        f"{median(r.kv_round for r in last):g}",
        mib(median(r.kv_bytes for r in last)),
        mib(median(r.weights_bytes for r in last)),
        ms(median(m.engine_gap_s for m in moves)),
        times(median(m.engine_ratio for m in moves)),
        ms(median(m.engine_control_s for m in moves)),
        ms(median(m.client_gap_s for m in moves)),
        ms(median(m.client_control_s for m in moves)),
        times(median(m.client_ratio for m in moves)),
    ]


def _pause_s(move: MoveFigures) -> float:
    pause_s = move.leg.reports[-1].commit_pause_s
    return float("nan") if pause_s is None else pause_s
