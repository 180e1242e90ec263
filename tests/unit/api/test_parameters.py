"""Every parameter is honoured, refused by name, or accepted where it changes nothing."""

from collections.abc import Set
from dataclasses import replace
from typing import Any

import pytest

from engines.fake import FAKE_CAPABILITIES
from engines.protocol import SamplingParams
from flexpiped.api.errors import ApiError
from flexpiped.api.fields import parse_object
from flexpiped.api.parameters import ensure_model, parse_chat, parse_completion, sampling_of
from flexpiped.api.unsupported import CHAT_NEUTRAL, COMPLETION_NEUTRAL

MESSAGES = [{"role": "user", "content": "hello"}]


def completion(**extra: Any) -> dict[str, Any]:
    return {"prompt": "Once", **extra}


def chat(**extra: Any) -> dict[str, Any]:
    return {"messages": MESSAGES, **extra}


def refusal_of(body: dict[str, Any], *, of_chat: bool = False, taken: Set[str] = frozenset()) -> ApiError:
    with pytest.raises(ApiError) as caught:
        (parse_chat if of_chat else parse_completion)(body, taken=taken)
    assert caught.value.status == 400
    return caught.value


def sampling(body: dict[str, Any], *, prompt: tuple[int, ...] = (5, 6), of_chat: bool = False) -> SamplingParams:
    asked = parse_chat(body) if of_chat else parse_completion(body)
    return sampling_of(
        asked.parameters,
        prompt=prompt,
        prompt_name="messages" if of_chat else "prompt",
        default_tokens=None if of_chat else 16,
        capabilities=FAKE_CAPABILITIES,
        new_seed=99,
    )


def test_defaults_are_openais() -> None:
    assert sampling(completion()) == SamplingParams(max_tokens=16, temperature=1.0, seed=99)
    assert sampling(chat(), of_chat=True).max_tokens == FAKE_CAPABILITIES.max_model_len - 2
    parameters = parse_completion(completion()).parameters
    assert (parameters.model, parameters.stream, parameters.include_usage, parameters.stop) == (None, False, False, ())


def test_everything_given_is_passed_on() -> None:
    body = completion(
        max_tokens=9, temperature=0, top_p=0.5, top_k=3, seed=4, stop_token_ids=[8], ignore_eos=True, user="me"
    )
    assert sampling(body) == SamplingParams(
        max_tokens=9, temperature=0.0, top_p=0.5, top_k=3, seed=4, stop_token_ids=(8,), ignore_eos=True
    )
    more = completion(stream=True, stream_options={"include_usage": True}, stop="x", include_stop_str_in_output=True)
    parameters = parse_completion(more).parameters
    assert (parameters.stream, parameters.include_usage, parameters.stop, parameters.include_stop) == (
        True,
        True,
        ("x",),
        True,
    )


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_chat_knows_both_names_of_max_tokens(name: str) -> None:
    assert sampling(chat(**{name: 5}), of_chat=True).max_tokens == 5
    assert refusal_of(chat(**{name: 0}), of_chat=True).param == name


def test_max_tokens_that_contradict_each_other_are_refused() -> None:
    assert refusal_of(chat(max_tokens=5, max_completion_tokens=6), of_chat=True).param == "max_tokens"
    assert sampling(chat(max_tokens=5, max_completion_tokens=5), of_chat=True).max_tokens == 5


def test_null_is_absent() -> None:
    names = ["model", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stop_token_ids", "stream"]
    assert sampling(completion(**dict.fromkeys(names))) == sampling(completion())


def test_seeds_may_be_negative() -> None:
    assert 0 <= sampling(completion(seed=-3)).seed < 2**63
    assert sampling(completion(seed=-3)).seed != sampling(completion(seed=-2)).seed


def test_minus_one_is_no_seed_as_in_vllm() -> None:
    assert sampling(completion(seed=-1)) == sampling(completion())


@pytest.mark.parametrize("name", sorted(COMPLETION_NEUTRAL))
def test_what_completions_do_not_honour_is_refused_by_name(name: str) -> None:
    for value in (None, *COMPLETION_NEUTRAL[name]):
        parse_completion(completion(**{name: value}))
    error = refusal_of(completion(**{name: "something else"}))
    assert (error.param, error.code) == (name, "unsupported_parameter")


@pytest.mark.parametrize("name", sorted(CHAT_NEUTRAL))
def test_what_chat_does_not_honour_is_refused_by_name(name: str) -> None:
    for value in (None, *CHAT_NEUTRAL[name]):
        parse_chat(chat(**{name: value}))
    error = refusal_of(chat(**{name: "something else"}), of_chat=True)
    assert (error.param, error.code) == (name, "unsupported_parameter")


def test_true_is_not_one() -> None:
    assert refusal_of(completion(n=True)).message == "n is not supported; leave it out or give 1"
    assert refusal_of(completion(echo=0)).message == "echo is not supported; leave it out or give false"
    parse_completion(completion(frequency_penalty=0.0))


@pytest.mark.parametrize("name", ["mox_tokens", "max_completion_tokens", "messages"])
def test_unknown_names_are_refused(name: str) -> None:
    error = refusal_of(completion(**{name: 1}))
    assert (error.param, error.code) == (name, "unknown_parameter")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", 3),
        ("max_tokens", 0),
        ("max_tokens", "5"),
        ("max_tokens", 5.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("seed", 2**63),
        ("seed", "7"),
        ("stop", 5),
        ("stop", ""),
        ("stop", ["a", 5]),
        ("stop", ["x"] * 17),
        ("stop_token_ids", 5),
        ("stop_token_ids", ["a"]),
        ("ignore_eos", 1),
        ("stream", "yes"),
        ("stream_options", []),
        ("stream_options", {"include_usage": True}),
        ("user", 5),
        ("prompt", None),
        ("prompt", 5),
        ("prompt", {}),
        ("prompt", ["a", [1]]),
        ("prompt", [[1], "a"]),
        ("prompt", [[1], []] * 513),
        ("prompt", [1, "a"]),
        ("prompt", [1, True]),
    ],
)
def test_wrong_values_are_refused_by_name(name: str, value: Any) -> None:
    error = refusal_of(completion(**{name: value}))
    assert error.param == name
    assert name in error.message


def test_options_of_streams_are_refused_by_name() -> None:
    def options(**given: Any) -> dict[str, Any]:
        return completion(stream=True, stream_options=given)

    assert refusal_of(options(include_usage=1)).param == "stream_options.include_usage"
    assert refusal_of(options(other=1)).param == "stream_options.other"
    assert refusal_of(options(include_obfuscation=True)).param == "stream_options.include_obfuscation"
    assert not parse_completion(options(include_obfuscation=False)).parameters.include_usage


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("Once", ("Once",)),
        (["Once"], ("Once",)),
        (["Once", "Twice"], ("Once", "Twice")),
        ([5, 6], ((5, 6),)),
        ([[5, 6]], ((5, 6),)),
        ([[5], [6, 7]], ((5,), (6, 7))),
        ([], ((),)),
        ("", ("",)),
    ],
)
def test_prompts(given: Any, read: Any) -> None:
    assert parse_completion({"prompt": given}).prompts == read


def test_prompts_times_choices_are_bounded() -> None:
    body = {"prompt": ["a"] * 100, "n": 11}
    assert refusal_of(body, taken={"n"}).param == "prompt"


@pytest.mark.parametrize("kind", ["json", "regex", "choice", "grammar"])
def test_names_that_vllm_has_no_more_are_refused_with_what_to_give(kind: str) -> None:
    refusal = refusal_of(completion(**{f"guided_{kind}": "x"}))
    assert (refusal.param, refusal.code) == (f"guided_{kind}", "unknown_parameter")
    assert f'structured_outputs: {{"{kind}"' in refusal.message


def test_an_assistant_may_have_said_nothing() -> None:
    given = [{"role": "assistant", "content": None}, {"role": "user", "content": "x"}]
    assert parse_chat({"messages": given}).messages[0] == {"role": "assistant", "content": ""}


def test_messages_are_roles_and_text() -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    given = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts, "name": None}]
    assert parse_chat({"messages": given}).messages == (
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hel\nlo"},
    )


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("hello", "messages"),
        (["hello"], "messages[0]"),
        ([*MESSAGES, {"role": "tool", "content": "x"}], "messages[1].role"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": "x", "tool_calls": [1]}], "messages[0].tool_calls"),
    ],
)
def test_bad_messages_are_refused_by_name(messages: Any, param: str) -> None:
    assert refusal_of({"messages": messages}, of_chat=True).param == param


def test_another_model_is_not_found() -> None:
    ensure_model(None, served="tiny")
    ensure_model("tiny", served="tiny")
    with pytest.raises(ApiError) as caught:
        ensure_model("huge", served="tiny")
    assert (caught.value.status, caught.value.param, caught.value.code) == (404, "model", "model_not_found")


@pytest.mark.parametrize(
    ("extra", "prompt", "param", "code"),
    [
        pytest.param({}, (), "prompt", "invalid_value", id="empty prompt"),
        pytest.param({}, (5, 512), "prompt", "invalid_value", id="outside the vocabulary"),
        pytest.param({}, (5, -1), "prompt", "invalid_value", id="negative"),
        pytest.param({}, (5,) * 512, "prompt", "context_length_exceeded", id="prompt too long"),
        pytest.param({"max_tokens": 511}, (5, 6), "max_tokens", "context_length_exceeded", id="both too long"),
        pytest.param({"stop_token_ids": [512]}, (5,), "stop_token_ids", "invalid_value", id="no such stop token"),
    ],
)
def test_what_the_model_cannot_do_is_refused(
    extra: dict[str, Any], prompt: tuple[int, ...], param: str, code: str
) -> None:
    with pytest.raises(ApiError) as caught:
        sampling(completion(**extra), prompt=prompt)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, code)


def test_a_context_that_is_too_short_is_said_in_numbers() -> None:
    with pytest.raises(ApiError, match="512 tokens, and 2 of the prompt with 511 of the output are 513"):
        sampling(completion(max_tokens=511), prompt=(5, 6))


def test_min_tokens_may_not_exceed_the_output() -> None:
    asked = parse_completion(completion(min_tokens=17), taken={"min_tokens"})
    with pytest.raises(ApiError, match="min_tokens 17 is more than the 16 tokens") as caught:
        sampling_of(
            asked.parameters,
            prompt=(5,),
            prompt_name="prompt",
            default_tokens=16,
            capabilities=FAKE_CAPABILITIES,
            new_seed=0,
        )
    assert caught.value.param == "min_tokens"


def test_the_default_never_exceeds_the_context() -> None:
    short = replace(FAKE_CAPABILITIES, max_model_len=10)
    parameters = parse_completion(completion()).parameters
    asked = sampling_of(
        parameters, prompt=(5,) * 8, prompt_name="prompt", default_tokens=16, capabilities=short, new_seed=0
    )
    assert asked.max_tokens == 2


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b'"x"', b"null", b"\xff", b'{"a": NaN}', b'{"prompt": "\\ud800"}', b"[" * 100_000]
)
def test_bad_json_is_refused(raw: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_object(raw)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


def test_what_is_wrong_with_an_array_is_its_item() -> None:
    assert refusal_of(completion(stop=["a", 5])).message == "stop must hold strings, not an integer"
    assert refusal_of(completion(stop=5)).message == "stop must be a string or an array of strings, not an integer"
