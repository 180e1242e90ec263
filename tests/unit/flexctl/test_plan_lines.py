"""``flexctl plan``: the answer first, then what it rests on; 80 columns."""

from typing import Any

import pytest

from flexpiped.flexctl.plan_lines import device_names, group_name, plan_lines

MIB = 1 << 20
WORKLOAD = {"rate_per_s": 3.2, "cv": 1.04, "prompt_tokens_mean": 180.0, "output_tokens_mean": 96.0}
SLO: dict[str, float | None] = {"ttft_s": 0.5, "tpot_s": None}
UUID = "GPU-96a87751-3e8a-50b4-bdf0-e1cfd0ff750c"


def stage(device: str, first: int, end: int) -> dict[str, Any]:
    return {"device_ids": [device], "first_decoder": first, "end_decoder": end}


def memory(device: str, needed: int) -> dict[str, Any]:
    return {
        "device_ids": [device],
        "weight_bytes": needed // 2,
        "kv_bytes": needed // 4,
        "workspace_bytes": needed // 4,
        "needed_bytes": needed,
        "usable_bytes": 512 * MIB,
    }


def found(stages: list[dict[str, Any]], **values: Any) -> dict[str, Any]:
    prediction = {
        "ttft_s": 0.019,
        "tpot_s": 0.004,
        "capacity_tokens_per_s": 430.0,
        "goodput_per_s": 3.2,
    }
    return {
        "pipelines": [stages],
        "prediction": prediction | values.pop("prediction", {}),
        "kv_tokens": 10240,
        "best_cv": 1.0,
        "gap": 0.0,
        "nested": True,
        "nested_loss": 0.004,
        "optimal": True,
        "memory": [memory(each["device_ids"][0], 40 * MIB) for each in stages],
    } | values


TWO = {
    "num_stages": 2,
    "degree": 1,
    "verdict": "chosen",
    "reason": "serves 3.2 of 3.2 requests/s in time; best of 2 candidates by goodput",
    "found": found([stage("cpu:0", 0, 4), stage("cpu:1", 4, 8)]),
}
ONE = {
    "num_stages": 1,
    "degree": 1,
    "verdict": "lost",
    "reason": "42 % less goodput: 1.86 of 3.2 requests/s in time",
    "found": found([stage("cpu:0", 0, 8)], prediction={"ttft_s": None, "goodput_per_s": 1.86}),
}
EIGHT = {
    "num_stages": 8,
    "degree": 1,
    "verdict": "infeasible",
    "reason": "needs 141 MiB with KV cache for 10240 tokens, the largest set of 8 free devices offers 96 MiB",
    "found": None,
}


def answer(*candidates: dict[str, Any], state: str = "planned", reason: str = TWO["reason"]) -> dict[str, Any]:  # type: ignore[assignment]
    return {
        "state": state,
        "reason": reason,
        "times_from": "profile measured 2 h ago on this machine (mean residual 4 %)",
        "took_s": 0.012,
        "workload": WORKLOAD,
        "slo": SLO,
        "candidates": list(candidates),
    }


def test_the_answer_comes_first_then_what_it_rests_on() -> None:
    assert plan_lines(answer(ONE, TWO), explain=False) == [
        "chosen  2 stages on cpu:0-1 (optimal, 12 ms)",
        "        serves 3.2 of 3.2 requests/s in time; best of 2 candidates by goodput",
        "        TTFT 19 ms   TPOT 4.0 ms   430 tok/s at most   KV 10,240 tokens",
        "        cuts: nested in those of finer granularities, 0.4 % slower than free",
        "  stage  device  decoders  needs          weights  KV      workspace",
        "  0      cpu:0   0-3       40 of 512 MiB  20 MiB   10 MiB  10 MiB",
        "  1      cpu:1   4-7       40 of 512 MiB  20 MiB   10 MiB  10 MiB",
        "workload  3.2 requests/s, CV 1.04, 180 tokens in, 96 out; targets: TTFT 500 ms",
        "times     profile measured 2 h ago on this machine (mean residual 4 %)",
    ]


def test_a_kv_cache_with_a_budget_of_each_device_says_what_it_takes_of_that() -> None:
    budget = found([stage("cpu:0", 0, 8)])
    budget["memory"] = [memory("cpu:0", 40 * MIB) | {"kv_budget_bytes": 32 * MIB}]
    lines = plan_lines(answer(TWO | {"num_stages": 1, "found": budget}), explain=False)
    assert "  0      cpu:0   0-7       40 of 512 MiB  20 MiB   10 of 32 MiB  10 MiB" in lines


def test_every_candidate_says_why_it_lost() -> None:
    lines = plan_lines(answer(ONE, TWO, EIGHT), explain=True)
    assert "   1       never  4.0 ms  430    1.86       10,240     1        8 %" in lines
    assert "        42 % less goodput: 1.86 of 3.2 requests/s in time" in lines
    assert "*  2       19 ms  4.0 ms  430    3.2        10,240     1        8 %" in lines
    assert any(line.startswith("        infeasible: needs 141 MiB") for line in lines)
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("starts", "lines"),
    [
        (
            {"kept_share": 1.0, "origin": "kept", "expected": [{"num_stages": 1, "now_s": 1.2, "cold_s": 30.0}]},
            [
                "start     100% of the parameters are kept in host memory; a new replica serves",
                "          after 1.2 s with 1 stage (30.0 s from storage)",
            ],
        ),
        (
            {"kept_share": 0.0, "origin": "page cache", "expected": []},
            [
                "start     0% of the parameters are kept in host memory, the files are in the",
                "          page cache; no start was measured",
            ],
        ),
    ],
)
def test_it_says_what_is_kept_and_what_a_new_replica_takes_with_that_and_without(
    starts: dict[str, Any], lines: list[str]
) -> None:
    explained = plan_lines(answer(ONE, TWO) | {"starts": starts}, explain=True)
    assert explained[-4:-2] == lines
    assert plan_lines(answer(ONE, TWO) | {"starts": starts}, explain=False)[-3].startswith("  1")


def test_every_candidate_says_what_it_takes_of_each_device() -> None:
    order = (3, 0, 2, 1, 4)
    uneven = found([stage(f"cpu:{device}", n, n + 1) for n, device in enumerate(order)])
    uneven["memory"] = [memory(f"cpu:{device}", (60, 40, 40, 50, 40)[device] * MIB) for device in order]
    lines = plan_lines(answer(ONE, TWO | {"found": uneven}), explain=True)
    assert "        memory cpu:0: 40 of 512 MiB" in lines
    at = lines.index("        memory cpu:0: 60 of 512 MiB; cpu:1-2, cpu:4: 40 of 512 MiB;")
    assert lines[at + 1] == "               cpu:3: 50 of 512 MiB"
    assert max(map(len, lines)) <= 80


def test_a_group_of_gpus_fits_beside_all_that_a_stage_takes_and_no_uuid_is_broken() -> None:
    ids = [UUID.replace("96a", f"{n}6a") for n in range(8)]
    stages = [
        {"device_ids": [each] * 8, "first_decoder": 100 + n, "end_decoder": 120 + n} for n, each in enumerate(ids)
    ]
    large = found(stages)
    large["memory"] = [
        memory(each, 0)
        | {
            "needed_bytes": 131 << 30,
            "usable_bytes": 140 << 30,
            "weight_bytes": 126 << 30,
            "workspace_bytes": 464 * MIB,
        }
        for each in ids
    ]
    lines = plan_lines(answer(ONE, TWO | {"found": large, "degree": 8}), explain=True)
    assert max(map(len, lines)) <= 80
    assert not any(line.endswith("GPU-") for line in lines)


def test_nothing_that_fits_is_an_answer_with_its_reason() -> None:
    lines = plan_lines(answer(EIGHT, state="infeasible", reason=EIGHT["reason"]), explain=False)  # type: ignore[arg-type]
    assert lines[0].startswith("infeasible: needs 141 MiB with KV cache")
    assert max(map(len, lines)) <= 80


def test_what_is_not_proven_says_how_far_it_may_be_off() -> None:
    open_ended = TWO | {"found": found([stage("cpu:0", 0, 8)], optimal=False, gap=0.021)}
    assert "slowest stage within 2.1 % of the best" in " ".join(plan_lines(answer(open_ended), explain=False))


def test_devices_are_drawn_together_and_gpus_shortened() -> None:
    assert device_names([stage(f"cpu:{n}", n, n + 1) for n in (0, 1, 2, 5)]) == ["cpu:0-2", "cpu:5"]
    assert device_names([stage("node7/cpu:0", 0, 1), stage("node8/cpu:1", 1, 2)]) == ["node7/cpu:0", "node8/cpu:1"]
    assert group_name([UUID]) == "GPU-96a87751"
    assert group_name([UUID, UUID, UUID, UUID]) == "GPU-96a87751 +3"
