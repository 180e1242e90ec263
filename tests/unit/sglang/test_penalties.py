"""What penalties count of a request that goes on, by our part inside SGLang. See ``tests/sglang/test_resuming.py``."""

import sys
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engines.protocol import GenerationRequest, SamplingParams
from engines.sglang.command import PLUGIN
from engines.sglang.sampling import to_sglang

sys.path += [str(PLUGIN)]  # as SGLang's interpreter has it

from flexpiped_sglang.penalties import REPLAYED, count, output_of

VOCABULARY = 10


def going_on(prompt: list[int], *, output: tuple[int, ...] = (), custom: Any = None) -> SimpleNamespace:
    """Return a request as a scheduler has it."""
    params = SimpleNamespace(custom_params=custom)
    return SimpleNamespace(origin_input_ids=array("q", prompt), output_ids=array("q", output), sampling_params=params)


REQUESTS = [
    going_on([1, 2, 3]),
    going_on([1, 2, 3, 3], custom={REPLAYED: 3}),
    going_on([4, 5], output=(6, 6, 7), custom={REPLAYED: 1}),
]


@pytest.mark.parametrize(
    ("custom", "output"),
    [
        (None, [9]),
        ({}, [9]),
        ({REPLAYED: 2}, [6, 7, 9]),
        ({REPLAYED: 10**12}, [5, 6, 7, 9]),
        ({REPLAYED: -1}, [9]),
        ({REPLAYED: "2"}, [9]),
        ([REPLAYED], [9]),
    ],
)
def test_output_is_what_was_replayed_and_what_came_since(custom: Any, output: list[int]) -> None:
    assert output_of(going_on([5, 6, 7], output=(9,), custom=custom)) == output


def test_a_frequency_counts_each_time() -> None:
    penalizer = SimpleNamespace(
        cumulated_frequency_penalties=torch.zeros(3, VOCABULARY),
        frequency_penalties=torch.tensor([[0.5], [0.5], [2.0]]),
    )
    count(penalizer, REQUESTS)
    assert counted(penalizer.cumulated_frequency_penalties) == [{}, {2: 0.5, 3: 1.0}, {5: 2.0, 6: 4.0, 7: 2.0}]


@pytest.mark.parametrize(("name", "neutral"), [("presence", 0.0), ("repetition", 1.0)])
def test_a_presence_counts_once(name: str, neutral: float) -> None:
    counts = torch.full((3, VOCABULARY), neutral)
    each = torch.tensor([[0.5], [0.5], [2.0]])
    penalizer = SimpleNamespace(**{f"cumulated_{name}_penalties": counts, f"{name}_penalties": each})
    count(penalizer, REQUESTS)
    assert counted(counts - neutral) == [
        {},
        {2: 0.5 - neutral, 3: 0.5 - neutral},
        dict.fromkeys((5, 6, 7), 2.0 - neutral),
    ]


def test_a_length_counts_what_came_since_as_what_was_replayed_is_not_asked_for() -> None:
    penalizer = SimpleNamespace(len_output_tokens=torch.zeros(3, 1, dtype=torch.int32))
    count(penalizer, REQUESTS)
    assert penalizer.len_output_tokens.flatten().tolist() == [0, 0, 3]


def counted(table: torch.Tensor) -> list[dict[int, float]]:
    return [{index: value for index, value in enumerate(row) if value} for row in table.tolist()]


@pytest.mark.parametrize(
    ("params", "generated", "told"),
    [
        ({"frequency_penalty": 1.0}, (7, 8), {REPLAYED: 2}),
        ({"presence_penalty": 1.0}, (7,), {REPLAYED: 1}),
        ({"repetition_penalty": 1.5}, (7,), {REPLAYED: 1}),
        ({"repetition_penalty": 1.5}, (), None),
        ({"min_tokens": 4}, (7,), None),
    ],
)
def test_sglang_is_told_how_much_was_replayed_where_a_penalty_counts_it(
    params: dict[str, float], generated: tuple[int, ...], told: dict[str, int] | None
) -> None:
    sampling = SamplingParams(max_tokens=9, engine_params=params)
    request = GenerationRequest(request_id="r", prompt_token_ids=(5,), sampling=sampling, generated_token_ids=generated)
    assert to_sglang(request, max_tokens=8).get("custom_params") == told
