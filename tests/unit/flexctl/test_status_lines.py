"""``flexctl status``: the screen from the answer."""

from typing import Any

from flexpiped.flexctl.status_lines import layers_text, status_lines
from flexpiped.flexctl.text import Paint

MIB = 1 << 20

PROGRESS: dict[str, Any] = {
    "phase": "done",
    "message": "done",
    "elapsed_s": 0.11,
    "weights_bytes": 3 * MIB,
    "weights_total_bytes": 3 * MIB,
    "kv_round": 2,
    "kv_bytes": 812 * 1024,
    "kv_round_bytes": [800 * 1024, 12 * 1024],
    "commit_pause_s": 0.0032,
    "drain_s": 0.0022,
    "returned_bytes": 3 * MIB,
    "epoch": 7,
    "requests_live": 8,
}
RECORD: dict[str, Any] = {
    "number": 12,
    "stages_before": 4,
    "stages_after": 2,
    "result": "done",
    "message": "done",
    "finished_unix_s": 1_000.0,
    "duration_s": 0.11,
    "layers_moved": 4,
    "progress": PROGRESS,
}


def stage(index: int, first: int, end: int) -> dict[str, Any]:
    return {
        "index": index,
        "device_ids": [f"cpu:{index}"],
        "first_decoder": first,
        "end_decoder": end,
        "weights_bytes": 4 * MIB,
        "kv_mapped_bytes": 2 * MIB,
        "busy": 0.61 if index == 0 else None,
        "workers": [{"pid": 17 + index, "pss_bytes": 96 * MIB if index == 0 else None}],
    }


SERVING: dict[str, Any] = {
    "version": "0.1.0",
    "model": {"name": "demo-model", "path": "/srv/demo-model"},
    "engine": "native",
    "api_url": "http://127.0.0.1:8100/v1",
    "uptime_s": 11_520.0,
    "state": "ready",
    "reason": "",
    "epoch": 7,
    "stages": [stage(0, 0, 4), stage(1, 4, 8)],
    "engine_counters": {"running": 8, "waiting": 0, "kv_blocks_used": 212, "kv_blocks_capacity": 640},
    "tokens_per_s": 412.3,
    "ttft": {"p50_s": 0.021, "p99_s": 0.048},
    "tpot": {"p50_s": 0.0041, "p99_s": 0.006},
    "under_way": None,
    "last_handover": RECORD,
}
STARTING: dict[str, Any] = SERVING | {
    "state": "starting",
    "reason": "loading weights",
    "epoch": None,
    "stages": [],
    "engine_counters": None,
    "tokens_per_s": None,
    "ttft": None,
    "tpot": None,
    "last_handover": None,
    "uptime_s": 1.2,
}


def test_the_whole_screen() -> None:
    assert "\n".join(status_lines(SERVING, now_unix_s=1_125.0)) == (
        "demo-model   native   epoch 7   2 stages                                        ready, up 3 h 12 min\n"
        "  8 running   0 waiting   412 tok/s   TTFT p50 21 ms  p99 48 ms   TPOT p50 4.1 ms  p99 6.0 ms\n"
        "  stage  device  layers          weights  KV mapped  PSS     KV blocks used / capacity        busy\n"
        "  0      cpu:0   embedding, 0-3  4 MiB    2 MiB      96 MiB  ######..............  212 / 640  61 %\n"
        "  1      cpu:1   4-7, head       4 MiB    2 MiB      -       ######..............  212 / 640  -\n"
        "handover #12   4 -> 2 stages, 2 min ago: 4 layers, 3 MiB weights, 812 KiB KV in 2 rounds, "
        "commit pause 3.2 ms, 8 requests went on\n"
        "model          /srv/demo-model\n"
        "API            http://127.0.0.1:8100/v1   flexpiped 0.1.0"
    )


def test_a_kv_budget_of_each_device_is_shown_with_what_is_mapped_of_it() -> None:
    counters = SERVING["engine_counters"] | {"kv_device_bytes": 32 * MIB}
    lines = status_lines(SERVING | {"engine_counters": counters}, now_unix_s=0.0)
    assert any("  2 of 32 MiB  " in line for line in lines)


def test_how_much_of_the_prompts_was_in_the_kv_cache() -> None:
    told = {"prefix_queried_tokens_total": 20_000, "prefix_hit_tokens_total": 12_800, "kv_blocks_cached": 300}
    counters = SERVING["engine_counters"] | told
    lines = status_lines(SERVING | {"engine_counters": counters}, now_unix_s=0.0)
    assert lines[2] == "  prefix cache   64% hits (12,800 of 20,000 tokens)   300 KV blocks kept"

    nothing_yet = counters | {"prefix_queried_tokens_total": 0, "prefix_hit_tokens_total": 0}
    for silent in (nothing_yet, SERVING["engine_counters"] | dict.fromkeys(told)):
        assert not any("prefix" in line for line in status_lines(SERVING | {"engine_counters": silent}, now_unix_s=0.0))


def window(window_s: float, cv: float | str, *, requests_per_s: float | str = 3.2) -> dict[str, float | str]:
    return {"window_s": window_s, "requests_per_s": requests_per_s, "cv": cv}


def test_how_requests_come_over_each_window() -> None:
    arrivals = [window(30.0, 1.1), window(180.0, 2.4, requests_per_s=0.9)]
    lines = status_lines(SERVING | {"arrivals": arrivals}, now_unix_s=0.0)
    assert lines[2] == "  load   3.20 requests/s   CV 1.10 (30 s)  2.40 (180 s)"

    starting = status_lines(STARTING | {"arrivals": arrivals}, now_unix_s=0.0)
    assert starting[2] == lines[2]  # those who wait for it count as well


def test_of_arrivals_that_say_nothing_the_reason_is_said() -> None:
    few = "too few requests to say"
    arrivals = [window(30.0, few), window(180.0, few), window(1800.0, 1.9)]
    lines = status_lines(SERVING | {"arrivals": arrivals}, now_unix_s=0.0)
    assert lines[2] == f"  load   3.20 requests/s   CV {few} (30 s, 180 s)  1.90 (1800 s)"

    unmeasured = [window(30.0, few, requests_per_s="not measured yet")]
    lines = status_lines(SERVING | {"arrivals": unmeasured}, now_unix_s=0.0)
    assert lines[2] == f"  load   requests/s not measured yet   CV {few} (30 s)"


def test_where_nobody_counts_arrivals_nothing_is_said_of_them() -> None:
    for status in (SERVING, SERVING | {"arrivals": []}):
        assert not any("load" in line for line in status_lines(status, now_unix_s=0.0))


def test_before_it_is_ready_the_reason_is_said_and_nothing_unmeasured_shown() -> None:
    lines = status_lines(STARTING, now_unix_s=0.0)

    assert lines[0].endswith("starting, up 1 s")
    assert lines[1] == "  loading weights"
    assert len(lines) == 4


def test_missing_values_say_why() -> None:
    lines = status_lines(SERVING | {"tokens_per_s": None, "ttft": None, "tpot": None}, now_unix_s=0.0)

    assert lines[1] == "  8 running   0 waiting   tok/s not measured yet   TTFT and TPOT: no request yet"


def test_a_replica_handover_moved_no_layer() -> None:
    how = "8 of 8 requests taken over: 5 KV copied (41 MiB), 3 computed again"
    by_replica = RECORD | {"way": "replica", "message": f"the second instance serves, {how}"}
    lines = status_lines(SERVING | {"last_handover": by_replica}, now_unix_s=1_000.0)
    assert f"handover #12   4 -> 2 stages, 0 s ago: by replica, {how}" in lines

    other = by_replica | {"engine_before": "native", "engine_after": "vllm"}
    lines = status_lines(SERVING | {"last_handover": other}, now_unix_s=1_000.0)
    assert f"handover #12   native -> vllm, 4 -> 2 stages, 0 s ago: by replica, {how}" in lines


def test_an_aborted_handover_says_why() -> None:
    aborted = RECORD | {"result": "aborted", "message": "cancelled before commit"}

    lines = status_lines(SERVING | {"last_handover": aborted}, now_unix_s=1_000.0)

    assert "handover #12   4 -> 2 stages, 0 s ago: aborted, cancelled before commit" in lines


def test_a_refactoring_under_way_is_shown() -> None:
    lines = status_lines(SERVING | {"under_way": "handover #13, in phase sync"}, now_unix_s=1_000.0)

    assert "now            handover #13, in phase sync" in lines


def test_the_last_decision_of_automatic_control_is_shown_unless_that_is_off() -> None:
    decided = {"message": "2 -> 4 stages: load 95%", "fields": {"verb": "change"}}

    def shown(mode: str, decision: dict[str, Any] | None) -> list[str]:
        auto = {"mode": mode, "decision": decision}
        lines = status_lines(SERVING | {"auto": auto}, now_unix_s=0.0)
        assert f"2 stages   auto {mode}  " in lines[0]
        return [line for line in lines if line.startswith("decision")]

    assert shown("on", decided) == ["decision       2 -> 4 stages: load 95%"]
    assert shown("dry-run", decided) == ["decision       2 -> 4 stages: load 95%   (auto dry-run)"]
    assert shown("on", None) == ["decision       none yet"]
    assert shown("off", decided) == []
    plain = status_lines(SERVING, now_unix_s=0.0)
    assert not any("auto" in line or "decision" in line for line in plain)


def test_colour_changes_no_word() -> None:
    plain = status_lines(SERVING, now_unix_s=0.0)
    painted = status_lines(SERVING, now_unix_s=0.0, paint=Paint(enabled=True))

    assert [line.replace("\x1b[32m", "").replace("\x1b[0m", "") for line in painted] == plain


def test_layers_in_words() -> None:
    assert layers_text(stage(0, 0, 8), is_first=True, is_last=True) == "embedding, 0-7, head"
    assert layers_text(stage(1, 3, 4), is_first=False, is_last=False) == "3"
    assert layers_text(stage(0, 0, 0), is_first=True, is_last=False) == "embedding"
    assert layers_text(stage(1, 4, 4), is_first=False, is_last=False) == "none"


def test_what_a_stage_runs_is_shown_where_the_engine_has_both() -> None:
    stages = [stage(0, 0, 4) | {"runs": "compiled"}, stage(1, 4, 8) | {"runs": "eager"}]
    lines = status_lines(SERVING | {"stages": stages}, now_unix_s=1_125.0)
    table = [line for line in lines if line.startswith("  ") and ("runs" in line or "cpu:" in line)]
    assert [line.split()[-1] for line in table] == ["runs", "compiled", "eager"]
    plain = status_lines(SERVING, now_unix_s=1_125.0)
    assert not any("runs" in line for line in plain)


def test_parameters_in_host_memory_are_told_where_some_are_to_stay() -> None:
    cache = {"budget_bytes": 64 * MIB, "held_bytes": 4 * MIB, "idle_bytes": MIB, "layers": 10, "idle_layers": 2}
    cache |= {"hits_total": 3, "misses_total": 10, "given_up_total": 0, "refused_total": 0}
    lines = status_lines(SERVING | {"parameter_cache": cache}, now_unix_s=1_000.0)
    assert (
        "parameters     4 MiB of 64 MiB in host memory: 10 layers, 2 of them without a stage; found 3 of 13 times"
        in lines
    )
    off = cache | {"budget_bytes": 0}
    assert not [line for line in status_lines(SERVING | {"parameter_cache": off}, now_unix_s=0) if "parameters" in line]
