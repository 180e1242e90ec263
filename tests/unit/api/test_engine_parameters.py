"""Sampling parameters that only some engines have: passed on where they are taken, refused by name elsewhere."""

from typing import Any

import pytest

from flexpiped.api.engine_parameters import ENGINE_PARAMETERS, read_engine_params
from flexpiped.api.errors import ApiError
from flexpiped.api.parameters import parse_chat, parse_completion
from flexpiped.api.unsupported import CHAT_NEUTRAL, COMPLETION_NEUTRAL

GIVEN: dict[str, Any] = {
    "allowed_token_ids": [5, 6],
    "bad_words": ["no"],
    "frequency_penalty": -0.5,
    "logit_bias": {"7": 1, "8": -2.5},
    "min_p": 0.1,
    "min_tokens": 3,
    "presence_penalty": 2,
    "repetition_penalty": 1.2,
}


def test_all_are_passed_on_by_their_names() -> None:
    assert GIVEN.keys() == ENGINE_PARAMETERS.keys()
    asked = parse_completion({"prompt": "x", **GIVEN}, taken=GIVEN.keys())
    assert asked.parameters.engine_params == GIVEN
    chat = parse_chat({"messages": [{"role": "user", "content": "x"}], **GIVEN}, taken=GIVEN.keys())
    assert chat.parameters.engine_params == GIVEN


def test_what_has_no_effect_is_left_out() -> None:
    neutral = {name: COMPLETION_NEUTRAL[name][0] for name in GIVEN if COMPLETION_NEUTRAL[name]}
    assert read_engine_params(neutral | {"allowed_token_ids": None}, taken=GIVEN.keys()) == {}
    assert {name: CHAT_NEUTRAL[name] for name in GIVEN} == {name: COMPLETION_NEUTRAL[name] for name in GIVEN}


def test_biases_are_drawn_in_as_vllm_does() -> None:
    biases = {"logit_bias": {"1": 1000, "2": -1000}}
    assert read_engine_params(biases, taken={"logit_bias"}) == {"logit_bias": {"1": 100.0, "2": -100.0}}


@pytest.mark.parametrize("name", sorted(GIVEN))
def test_other_engines_refuse_them(name: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_completion({"prompt": "x", name: GIVEN[name]})
    assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("allowed_token_ids", "5"),
        ("allowed_token_ids", [5, "a"]),
        ("allowed_token_ids", [True]),
        ("bad_words", "no"),
        ("bad_words", [5]),
        ("bad_words", ["no", ""]),
        ("bad_words", ["no", " "]),
        ("bad_words", ["no"] * 129),
        ("frequency_penalty", 2.1),
        ("frequency_penalty", "high"),
        ("logit_bias", [5]),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"\u0665": 1}),
        ("logit_bias", {"9" * 5000: 1}),
        ("min_p", -0.1),
        ("min_p", True),
        ("min_tokens", -1),
        ("min_tokens", 1.5),
        ("presence_penalty", -3),
        ("repetition_penalty", 0),
    ],
)
def test_wrong_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ApiError) as caught:
        read_engine_params({name: value}, taken={name})
    assert (caught.value.status, caught.value.param) == (400, name)


@pytest.mark.parametrize("bias", ["1", None, True])
def test_the_bias_at_fault_is_named(bias: Any) -> None:
    with pytest.raises(ApiError) as caught:
        read_engine_params({"logit_bias": {"7": 1, "8": bias}}, taken={"logit_bias"})
    assert caught.value.param == "logit_bias[8]"
