"""A request in vLLM's words."""

from dataclasses import replace
from pathlib import Path

import pytest

from engines.errors import InvalidRequest
from engines.fake import FAKE_CAPABILITIES
from engines.offers import KvParcel
from engines.protocol import GenerationRequest, SamplingParams
from engines.served.sampling import tokens_left
from engines.vllm.sampling import to_vllm

PARAMS = SamplingParams(
    max_tokens=20, temperature=0.5, top_p=0.9, top_k=7, seed=3, stop_token_ids=(4, 5), logprobs=True
)


def request(sampling: SamplingParams = PARAMS, *, generated: tuple[int, ...] = ()) -> GenerationRequest:
    return GenerationRequest(
        request_id="x", prompt_token_ids=(1, 2, 3), sampling=sampling, generated_token_ids=generated
    )


def test_a_kv_cache_is_named_to_vllms_connector() -> None:
    parcel = KvParcel(directory=Path("/dev/shm/x/1"), num_tokens=4, num_bytes=64)
    wire = to_vllm(replace(request(), kv=parcel), max_tokens=20)
    assert wire["extra_args"] == {"kv_transfer_params": {"flexpiped": "/dev/shm/x/1"}}
    sampling = replace(PARAMS, engine_params={"extra_args": {"mine": 1}})
    wire = to_vllm(replace(request(sampling), kv=parcel), max_tokens=20)
    assert wire["extra_args"] == {"mine": 1, "kv_transfer_params": {"flexpiped": "/dev/shm/x/1"}}


def test_every_field_has_its_name() -> None:
    assert to_vllm(request(), max_tokens=20) == {
        "max_tokens": 20,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "seed": 3,
        "stop_token_ids": [4, 5],
        "ignore_eos": False,
        "logprobs": 0,
    }


def test_greedy_needs_no_generator_and_a_seed_is_never_minus_one() -> None:
    assert to_vllm(request(replace(PARAMS, temperature=0.0)), max_tokens=1)["seed"] is None
    assert to_vllm(request(replace(PARAMS, seed=-1)), max_tokens=1)["seed"] == (1 << 63) - 1
    assert to_vllm(request(replace(PARAMS, logprobs=False)), max_tokens=1)["logprobs"] is None


def test_what_was_generated_counts() -> None:
    assert tokens_left(request(generated=(8,) * 5), FAKE_CAPABILITIES) == 15
    assert tokens_left(request(generated=(8,) * 20), FAKE_CAPABILITIES) == 0
    short = replace(FAKE_CAPABILITIES, max_model_len=10)
    assert tokens_left(request(generated=(8,) * 5), short) == 2


def test_parameters_of_the_engine_pass_through() -> None:
    more = replace(PARAMS, engine_params={"min_p": 0.1, "min_tokens": 7, "bad_words": ["x"]})
    wire = to_vllm(request(more, generated=(8,) * 5), max_tokens=15)
    assert (wire["min_p"], wire["min_tokens"], wire["bad_words"]) == (0.1, 2, ["x"])


@pytest.mark.parametrize("name", ["max_tokens", "seed", "n", "detokenize", "output_kind"])
def test_what_the_daemon_sets_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        to_vllm(request(replace(PARAMS, engine_params={name: 1})), max_tokens=1)
    assert caught.value.parameter == name
