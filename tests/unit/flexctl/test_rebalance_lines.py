"""``flexctl rebalance --wait``: one line for each phase."""

from collections.abc import Mapping
from typing import Any

from flexpiped.flexctl.rebalance_lines import View, advance, current_line, end_lines, need_lines, plan_lines

from .test_status_lines import PROGRESS, RECORD

KIB, MIB = 1 << 10, 1 << 20
NOTHING: dict[str, Any] = PROGRESS | {
    "weights_bytes": 0,
    "kv_bytes": 0,
    "kv_round_bytes": [],
    "commit_pause_s": None,
    "drain_s": None,
    "returned_bytes": 0,
    "epoch": None,
}


LOADED = {"weights_bytes": 3 * MIB, "elapsed_s": 0.038}
COPIED = LOADED | {"kv_round_bytes": [812 * KIB, 24 * KIB], "kv_bytes": 836 * KIB, "elapsed_s": 0.079}
COMMITTED = COPIED | {"commit_pause_s": 0.0031, "drain_s": 0.0022, "epoch": 8, "elapsed_s": 0.083}
REPORTS: list[Mapping[str, Any]] = [
    NOTHING | {"phase": "prepare", "elapsed_s": 0.0},
    NOTHING | {"phase": "prepare", "weights_bytes": MIB, "elapsed_s": 0.01},
    NOTHING | LOADED | {"phase": "sync"},
    NOTHING | COPIED | {"phase": "commit"},
    NOTHING | COMMITTED | {"phase": "retire"},
    NOTHING | COMMITTED | {"phase": "done", "returned_bytes": 3 * MIB, "elapsed_s": 0.11},
]


def shown(reports: list[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Return the lines written for good, and what the live line showed after each report."""
    view, written, live = View(), list[str](), list[str]()
    for report in reports:
        view, lines = advance(view, report)
        written += lines
        live.append(current_line(view))
    return written, live


def test_a_change_of_the_engine_is_named() -> None:
    proposal = {
        "current": [{}, {}],
        "target": [{}],
        "way": "replica",
        "engine_before": "native",
        "engine_after": "vllm",
        "moves": ["by a second instance on cpu:0"],
    }
    assert plan_lines(proposal) == ["plan     native -> vllm, 2 -> 1 stage by replica: by a second instance on cpu:0"]


def test_one_line_for_each_phase() -> None:
    written, _ = shown(REPORTS)

    assert written == [
        "prepare  ####################  3 MiB   38 ms",
        "sync     round 1: 812 KiB   round 2: 24 KiB   41 ms",
        "commit   pause 3.1 ms (drain 2.2 ms), epoch 8",
        "retire   3 MiB returned   27 ms",
    ]


def test_the_live_line_follows_the_phase_under_way() -> None:
    _, live = shown(REPORTS)

    assert live == [
        "prepare  ....................  0 B of 3 MiB   0.0 ms",
        "prepare  ######..............  1 MiB of 3 MiB   10 ms",
        "sync     nothing to copy   0.0 ms",
        "commit   under way",
        "retire   0 B returned   0.0 ms",
        "",
    ]


def test_a_rollback_has_its_line() -> None:
    written, _ = shown(
        [
            NOTHING | {"phase": "prepare", "elapsed_s": 0.0},
            NOTHING | {"phase": "roll back", "elapsed_s": 0.1, "message": "cancelled"},
            NOTHING | {"phase": "aborted", "elapsed_s": 0.2, "message": "rolled back"},
        ]
    )

    assert written == ["prepare  no weights to load   0.10 s", "roll back  rolled back"]


def test_the_plan_has_moves_and_numbers() -> None:
    proposal = {
        "current": [{}, {}],
        "target": [{}, {}, {}, {}],
        "moves": ["layers 2-3 cpu:0 -> cpu:2; 4.3 MiB weights, 812 KiB KV"],
        "sentences": ["needs 9 of 96 MiB free on cpu:2"],
    }

    assert plan_lines(proposal) == ["plan     2 -> 4 stages: layers 2-3 cpu:0 -> cpu:2; 4.3 MiB weights, 812 KiB KV"]
    assert need_lines(proposal) == ["         needs 9 of 96 MiB free on cpu:2"]
    assert plan_lines(proposal | {"moves": []}) == ["plan     2 -> 4 stages: nothing moves"]


def test_no_line_is_longer_than_a_terminal_is_wide() -> None:
    moves = [f"{n} cpu:{n % 2} -> cpu:{n}" for n in range(2, 9)]
    proposal = {
        "current": [{}, {}],
        "target": [{}] * 8,
        "moves": moves,
        "sentences": ["GPU-96a87751-3e8a-50b4-bdf0-e1cfd0ff750c needs 12 of 512 MiB more, of which 8 MiB are KV cache"],
    }
    rounds = NOTHING | {"kv_round_bytes": [812 * KIB] * 9}
    written, _ = shown([rounds | {"phase": "sync", "elapsed_s": 0.0}, rounds | {"phase": "commit", "elapsed_s": 0.1}])
    lines = [
        *plan_lines(proposal),
        *need_lines(proposal),
        *written,
        *end_lines(RECORD | {"result": "failed", "message": "the engine died of " + "this and that " * 9}),
    ]
    assert max(map(len, lines)) <= 80
    assert plan_lines(proposal) == [
        "plan     2 -> 8 stages: 2 cpu:0 -> cpu:2, 3 cpu:1 -> cpu:3, 4 cpu:0 -> cpu:4,",
        "         5 cpu:1 -> cpu:5, 6 cpu:0 -> cpu:6, 7 cpu:1 -> cpu:7, 8 cpu:0 -> cpu:8",
    ]


def test_the_end() -> None:
    assert end_lines(RECORD) == ["done in 0.11 s, 8 requests went on"]
    assert end_lines(RECORD | {"result": "failed", "message": "the engine died"}) == ["failed: the engine died"]


def test_a_replica_handover_is_told_in_words() -> None:
    reports = [
        NOTHING | {"phase": phase, "message": message, "elapsed_s": elapsed_s, "epoch": 8}
        for phase, message, elapsed_s in [
            ("prepare", "second instance: loading weights", 0.0),
            ("prepare", "second instance: ready", 2.4),
            ("sync", "0 of 8 requests taken over", 2.4),
            ("sync", "7 of 8 requests taken over", 2.8),
            ("commit", "8 of 8 requests taken over", 2.9),
            ("retire", "the second instance serves, the first one ends", 2.9),
            ("done", "done", 3.3),
        ]
    ]
    view, written, live = View(by_replica=True), list[str](), list[str]()
    for report in reports:
        view, lines = advance(view, report)
        written += lines
        live.append(current_line(view))

    assert written == [
        "prepare  second instance: ready   2.4 s",
        "sync     8 of 8 requests taken over   0.50 s",
        "commit   the second instance is in force, epoch 8",
        "retire   the second instance serves, the first one ends   0.40 s",
    ]
    assert live[3] == "sync     7 of 8 requests taken over   0.40 s"
    assert plan_lines({"current": [{}], "target": [{}] * 2, "moves": ["by a second instance"], "way": "replica"}) == [
        "plan     1 -> 2 stages by replica: by a second instance"
    ]
