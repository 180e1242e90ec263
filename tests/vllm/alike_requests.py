"""The requests, valid and invalid, whose answers ``test_alike`` compares."""

from collections.abc import Mapping
from typing import Any, Final

from tests.support.alike import Asked
from tests.support.vllm import llama

_MODEL: Final = llama().name
_USER: Final = {"role": "user", "content": "Hi"}
# One string is all that its arguments can be, so that random weights finish a call.
_PAINT: Final = {
    "type": "function",
    "function": {
        "name": "paint",
        "description": "Paints.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"colour": {"enum": ["red"]}},
            "required": ["colour"],
            "additionalProperties": False,
        },
    },
}
_LOOSE: Final = {"type": "function", "function": {"name": "look"}}
_CALL: Final = {"id": "call_1", "type": "function", "function": {"name": "paint", "arguments": '{"colour": "red"}'}}
_CALLED: Final = {"role": "assistant", "content": None, "tool_calls": [_CALL]}
_PAINTED: Final = {"role": "tool", "tool_call_id": "call_1", "content": "It is painted."}
_NUMBER: Final = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


def _completion(**changes: Any) -> Asked:
    drawn = changes.get("temperature", 0) != 0
    body = {"model": _MODEL, "prompt": [5], "max_tokens": 4, "temperature": 0, **changes}
    return Asked(path="/v1/completions", body=body, drawn=drawn)


def _chat(**changes: Any) -> Asked:
    drawn = changes.get("temperature", 0) != 0
    body = {"model": _MODEL, "messages": [_USER], "max_tokens": 3, "temperature": 0, **changes}
    return Asked(path="/v1/chat/completions", body=body, drawn=drawn)


def _named(name: Any = "paint") -> Any:
    return {"type": "function", "function": {"name": name}}


def _tools(**changes: Any) -> Asked:
    """A chat with tools. Each engine has calls written in a form of its own, so what is drawn in them differs."""
    body = {"model": _MODEL, "messages": [_USER], "tools": [_PAINT], "max_tokens": 300, "temperature": 0, **changes}
    return Asked(path="/v1/chat/completions", body=body, drawn=True)


def _without(tool: dict[str, Any], *path: str) -> dict[str, Any]:
    """Return a tool without the member at the end of ``path``."""
    name, *rest = path
    return {key: _without(tool[key], *rest) if key == name else tool[key] for key in tool if rest or key != name}


def _function(**changes: Any) -> dict[str, Any]:
    return {**_PAINT, "function": {**_PAINT["function"], **changes}}


def _get(path: str) -> Asked:
    return Asked(path=path, method="GET")


def _raw(data: bytes) -> Asked:
    return Asked(path="/v1/completions", raw=data)


def _text(path: str, **body: Any) -> Asked:
    return Asked(path=path, body=body)


_COMPLETIONS: Final = {
    "completion": _completion(),
    "completion, text": _completion(prompt="Once"),
    "completion, default length": _completion(max_tokens=None),
    "completion, stop string": _completion(stop=["str"]),
    "completion, stop string included": _completion(stop="str", include_stop_str_in_output=True),
    "completion, stop token": _completion(stop_token_ids=[300], logit_bias={"300": 100}),
    "completion, end": _completion(logit_bias={"1": 100}),
    "completion, stop strings in one token": _completion(stop=["string", "tri"]),
    "completion, stop token included": _completion(
        stop_token_ids=[300], logit_bias={"300": 100}, include_stop_str_in_output=True
    ),
    "completion, end named as a stop token": _completion(stop_token_ids=[1], logit_bias={"1": 100}),
    "completion, end ignored": _completion(logit_bias={"1": 100}, ignore_eos=True, min_tokens=2),
    "completion, penalties": _completion(
        max_tokens=24, presence_penalty=1, frequency_penalty=0.5, repetition_penalty=1.3, prompt="Once"
    ),
    "completion, bad words": _completion(bad_words=["string", " get", "return None"], max_tokens=16),
    "completion, drawn": _completion(temperature=1, seed=1),
    "completion, two choices": _completion(n=2, temperature=1, seed=1),
    "completion, two greedy choices": _completion(n=2),
    "completion, logprobs": _completion(logprobs=2),
    "completion, no further logprobs": _completion(logprobs=0),
    "completion, echo": _completion(echo=True, prompt="Once"),
    "completion, echo with logprobs": _completion(echo=True, logprobs=1, prompt=[51, 82]),
    "completion, echo with both logprobs": _completion(echo=True, logprobs=2, prompt_logprobs=0, prompt=[51, 82]),
    "completion, prompt alone": _completion(echo=True, logprobs=1, max_tokens=0, prompt=[51, 82]),
    "completion, prompt logprobs": _completion(prompt_logprobs=1, prompt=[51, 82]),
    "completion, two prompts": _completion(prompt=["a", "b"]),
    "completion, two prompts of tokens": _completion(prompt=[[5], [6, 7]]),
    "completion, two prompts, two choices each": _completion(prompt=[[5], [6, 7]], n=2, temperature=1, seed=1),
    "completion, two prompts with echo": _completion(prompt=["a", "b"], echo=True, max_tokens=1),
    "completion, one prompt in a list": _completion(prompt=[[5]]),
    "completion, choice": _completion(structured_outputs={"choice": ["yes", "no"]}, max_tokens=8),
    "completion, regex": _completion(structured_outputs={"regex": "[a-c]{2}"}, max_tokens=8),
    "completion, stream": _completion(stream=True),
    "completion, stream with usage": _completion(stream=True, stream_options={"include_usage": True}),
    "completion, stream with echo": _completion(stream=True, echo=True, prompt="Once"),
    "completion, stream with logprobs": _completion(stream=True, logprobs=1),
    "completion, stream of two prompts": _completion(stream=True, prompt=[[5], [6, 7]]),
    "completion, stream that stops": _completion(stream=True, stop=["str"]),
    "no prompt": _completion(prompt=None),
    "empty prompt": _completion(prompt=[]),
    "empty text": _completion(prompt=""),
    "prompt is a number": _completion(prompt=5),
    "prompt of other things": _completion(prompt=["a", [5]]),
    "prompt outside the vocabulary": _completion(prompt=[10**6]),
    "prompt below the vocabulary": _completion(prompt=[-1]),
    "prompt too long": _completion(prompt=[5] * 609),
    "other model": _completion(model="x"),
    "unknown parameter": _completion(foo=1),
    "guided_json, of old": _completion(guided_json={}),
    "max_tokens negative": _completion(max_tokens=-1),
    "max_tokens 0": _completion(max_tokens=0),
    "max_tokens too many": _completion(max_tokens=10**6),
    "max_tokens is text": _completion(max_tokens="a"),
    "temperature negative": _completion(temperature=-1),
    "temperature high": _completion(temperature=3, seed=1),
    "top_p 0": _completion(top_p=0),
    "top_p 2": _completion(top_p=2),
    "top_k -2": _completion(top_k=-2),
    "n 0": _completion(n=0),
    "n is text": _completion(n="a"),
    "best_of": _completion(best_of=2),
    "logprobs negative": _completion(logprobs=-2),
    "logprobs 21": _completion(logprobs=21),
    "prompt_logprobs streamed": _completion(prompt_logprobs=1, stream=True),
    "stop is a number": _completion(stop=5),
    "stop is empty": _completion(stop=[""]),
    "stop_token_ids outside": _completion(stop_token_ids=[10**6]),
    "stream_options without stream": _completion(stream_options={"include_usage": True}),
    "seed is text": _completion(seed="a"),
    "logit_bias outside": _completion(logit_bias={"1000000": 1}),
    "logit_bias of no token": _completion(logit_bias={"a": 1}),
    "frequency_penalty 3": _completion(frequency_penalty=3),
    "repetition_penalty 0": _completion(repetition_penalty=0),
    "min_p 2": _completion(min_p=2),
    "min_tokens too many": _completion(min_tokens=9),
    "allowed_token_ids empty": _completion(allowed_token_ids=[]),
    "bad_words empty": _completion(bad_words=[""]),
    "suffix": _completion(suffix="x"),
    "user is a number": _completion(user=5),
    "regex that is none": _completion(structured_outputs={"regex": "("}),
    "two constraints": _completion(structured_outputs={"choice": ["a"], "regex": "a"}),
    "nothing allowed": _completion(structured_outputs={"choice": ["yes"]}, allowed_token_ids=[5]),
    "broken JSON": _raw(b"{"),
    "JSON of another kind": _raw(b"[]"),
    "no body": _raw(b""),
}
_CHATS: Final = {
    "chat": _chat(),
    "chat, max_completion_tokens": _chat(max_tokens=None, max_completion_tokens=2),
    "chat, parts of text": _chat(
        messages=[{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    ),
    "chat, developer": _chat(messages=[{"role": "developer", "content": "a"}, {"role": "user", "content": "b"}]),
    "chat, last is an assistant": _chat(messages=[_USER, {"role": "assistant", "content": "a"}]),
    "chat, message without content": _chat(messages=[{"role": "user"}]),
    "chat, assistant without content": _chat(messages=[_USER, {"role": "assistant", "content": None}, _USER]),
    "chat, two choices": _chat(n=2, temperature=1, seed=1),
    "chat, logprobs": _chat(logprobs=True),
    "chat, top logprobs": _chat(logprobs=True, top_logprobs=1),
    "chat, top logprobs, unlikely token": _chat(logprobs=True, top_logprobs=2, logit_bias={"300": 100}),
    "chat, prompt logprobs": _chat(prompt_logprobs=0),
    "chat, stop string": _chat(stop="ou"),
    "chat, schema": _chat(
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": _NUMBER}}, max_tokens=3
    ),
    "chat, stream": _chat(stream=True),
    "chat, stream with usage": _chat(stream=True, stream_options={"include_usage": True}),
    "chat, stream with logprobs": _chat(stream=True, logprobs=True, top_logprobs=1),
    "chat, stream of two choices": _chat(stream=True, n=2, temperature=1, seed=1),
    "chat, stream that stops": _chat(stream=True, stop="ou"),
    "no messages": _chat(messages=[]),
    "messages null": _chat(messages=None),
    "messages are text": _chat(messages="x"),
    "message without role": _chat(messages=[{"content": "a"}]),
    "unknown role": _chat(messages=[{"role": "x", "content": "a"}]),
    "content is a number": _chat(messages=[{"role": "user", "content": 5}]),
    "content is null": _chat(messages=[{"role": "user", "content": None}]),
    "image": _chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x"}}]}]),
    "chat, other model": _chat(model="x"),
    "chat, max_tokens 0": _chat(max_tokens=0),
    "chat, max_tokens too many": _chat(max_tokens=10**6),
    "chat, logprobs is a number": _chat(logprobs=5),
    "top_logprobs alone": _chat(top_logprobs=2),
    "top_logprobs 30": _chat(logprobs=True, top_logprobs=30),
    "response_format unknown": _chat(response_format={"type": "x"}),
    "stream is text": _chat(stream="x"),
    "tools empty": _chat(tools=[]),
    "tool_choice without tools": _chat(tool_choice="auto"),
}
_WITH_TOOLS: Final = {
    "tools, named": _tools(tool_choice=_named()),
    "tools, named of two": _tools(tools=[_LOOSE, _PAINT], tool_choice=_named()),
    "tools, named, two choices": _tools(tool_choice=_named(), n=2, temperature=1, seed=1),
    "tools, named, cut off": _tools(tool_choice=_named(), max_tokens=3),
    "tools, named, stream": _tools(tool_choice=_named(), stream=True),
    "tools, named, stream with usage": _tools(
        tool_choice=_named(), stream=True, stream_options={"include_usage": True}
    ),
    "tools, required": _tools(tool_choice="required", parallel_tool_calls=False),
    "tools, required, stream": _tools(tool_choice="required", parallel_tool_calls=False, stream=True),
    "tools, none": _tools(tool_choice="none", max_tokens=3),
    "tools, auto": _tools(tools=[_LOOSE], tool_choice="auto", max_tokens=3),
    "tools, left open": _tools(tools=[_LOOSE], max_tokens=3),
    "tools, auto, stream": _tools(tools=[_LOOSE], max_tokens=3, stream=True),
    "tools, choice null": _tools(tools=[_LOOSE], tool_choice=None, max_tokens=3),
    "tools, no parameters": _tools(tools=[_without(_PAINT, "function", "parameters")], max_tokens=3),
    "tools, conversation": _tools(messages=[_USER, _CALLED, _PAINTED], tool_choice="none", max_tokens=3),
    "tools, conversation without tools": _chat(messages=[_USER, _CALLED, _PAINTED]),
    "tools null": _chat(tools=None),
    "tools are text": _tools(tools="paint"),
    "tool is text": _tools(tools=["paint"]),
    "tool without function": _tools(tools=[{"type": "function"}]),
    "tool without name": _tools(tools=[_without(_PAINT, "function", "name")]),
    "tool without type": _tools(tools=[_without(_PAINT, "type")], max_tokens=3),
    "tool of another kind": _tools(tools=[{"type": "custom", "custom": {"name": "x"}}]),
    "tool's name is a number": _tools(tools=[_function(name=5)]),
    "tool's parameters are text": _tools(tools=[_function(parameters="x")]),
    "tool's strict is text": _tools(tools=[_function(strict="x")]),
    "tool_choice unknown": _tools(tool_choice="any"),
    "tool_choice is a number": _tools(tool_choice=5),
    "tool_choice names no tool": _tools(tool_choice=_named("sing")),
    "tool_choice without function": _tools(tool_choice={"type": "function"}),
    "tool_choice without name": _tools(tool_choice={"type": "function", "function": {}}),
    "tool_choice names a number": _tools(tool_choice=_named(5)),
    "tool_choice of allowed tools": _tools(
        tool_choice={"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [_named()]}}
    ),
    "tool_choice of a custom tool": _tools(tool_choice={"type": "custom", "custom": {"name": "x"}}),
    "tool_choice named without tools": _chat(tool_choice=_named()),
    "tool_choice required without tools": _chat(tool_choice="required"),
    "parallel_tool_calls is text": _tools(parallel_tool_calls="x"),
    "call without id": _tools(messages=[_USER, {**_CALLED, "tool_calls": [_without(_CALL, "id")]}, _PAINTED]),
    "call's arguments are no JSON": _tools(
        messages=[_USER, {**_CALLED, "tool_calls": [{**_CALL, "function": {"name": "paint", "arguments": "{"}}]}]
    ),
    "result without id": _tools(messages=[_USER, _CALLED, {"role": "tool", "content": "x"}]),
}
_FURTHER: Final = {
    "models": _get("/v1/models"),
    "model": _get(f"/v1/models/{_MODEL}"),
    "version": _get("/version"),
    "no such path": _get("/v1/nothing"),
    "wrong method": _get("/v1/completions"),
    "tokenize": _text("/tokenize", prompt="Once"),
    "tokenize messages": _text("/tokenize", messages=[_USER]),
    "tokenize without special tokens": _text("/tokenize", prompt="Once", add_special_tokens=False),
    "tokenize, texts of tokens": _text("/tokenize", prompt="Once", return_token_strs=True),
    "tokenize, no generation prompt": _text("/tokenize", messages=[_USER], add_generation_prompt=False),
    "tokenize nothing": _text("/tokenize"),
    "tokenize a number": _text("/tokenize", prompt=5),
    "tokenize, other model": _text("/tokenize", prompt="a", model="x"),
    "detokenize": _text("/detokenize", tokens=[5, 300]),
    "detokenize no tokens": _text("/detokenize", tokens=[]),
    "detokenize outside the vocabulary": _text("/detokenize", tokens=[10**6]),
    "detokenize below the vocabulary": _text("/detokenize", tokens=[-1]),
    "detokenize text": _text("/detokenize", tokens="a"),
    "detokenize nothing": _text("/detokenize"),
    "detokenize, other model": _text("/detokenize", tokens=[5], model="x"),
}
REQUESTS: Final[Mapping[str, Asked]] = {**_COMPLETIONS, **_CHATS, **_WITH_TOOLS, **_FURTHER}

# Of each kind one.
IN_THE_GATE: Final = (
    *("completion", "completion, stop string", "completion, two prompts of tokens", "completion, stream with usage"),
    *("chat, parts of text", "chat, stream that stops", "models", "tokenize messages", "detokenize"),
    *("tools, named", "tools, named, stream", "tool_choice of allowed tools"),
    *("no prompt", "other model", "max_tokens 0", "stop is a number", "broken JSON"),
)
