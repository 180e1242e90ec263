"""Whatever a model draws from what the grammar of its tools allows, the calls are valid; for each syntax."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from engines.native.grammar import Grammars, Matcher
from engines.native.token_mask import is_set, words_for
from engines.protocol import Grammar, GrammarKind
from flexpiped.api.call_parser import CallDelta, CallParser, joined
from flexpiped.api.tool_grammar import grammar_with_calls
from flexpiped.api.tool_syntax import HERMES, SYNTAXES, ToolCalls, ToolSyntax
from flexpiped.api.tools import Tool, ToolChoice, Tools
from tests.support.tiny_tokenizer import byte_level_tokenizer

COLOURS = {
    "type": "object",
    "properties": {"colour": {"$ref": "#/$defs/colour"}, "layers": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["colour", "layers"],
    "additionalProperties": False,
    "$defs": {"colour": {"enum": ["red", 'a "b"', "grün"]}},
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS: dict[str, dict[str, Any]] = {"paint": COLOURS, "ns/now": NOTHING}
CONTENT = Grammar(kind=GrammarKind.JSON_SCHEMA, source='{"enum": ["yes", "no"]}', parameter="response_format")
EOS_ID = 1
SEEDS = range(6)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A tokenizer with one way to call, whose marks are tokens of their own or mere text."""

    tokenizer: Tokenizer
    calls: ToolCalls
    grammars: Grammars

    @property
    def vocab_size(self) -> int:
        return int(self.tokenizer.get_vocab_size())


def make_model(syntax: ToolSyntax, folder: Path, *, has_tokens: bool) -> Model:
    """As published models have them, Hermes' marks are text where they are tokens, and the others special."""
    tokenizer = Tokenizer.from_str(byte_level_tokenizer().to_str())
    marks = [each for each in (syntax.opening, syntax.closing, syntax.separator) if each]
    if has_tokens:
        tokenizer.add_tokens([AddedToken(each, special=syntax is not HERMES, normalized=False) for each in marks])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {each: tokenizer.token_to_id(each) for each in marks}
    return Model(
        tokenizer=tokenizer,
        calls=ToolCalls(
            syntax=syntax,
            opening_id=ids.get(syntax.opening),
            closing_id=ids.get(syntax.closing),
            separator_id=ids.get(syntax.separator),
        ),
        grammars=Grammars(folder / "tokenizer.json", vocab_size=tokenizer.get_vocab_size(), eos_token_ids=(EOS_ID,)),
    )


@pytest.fixture(scope="module", params=[True, False], ids=["tokens", "text"])
def has_tokens(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module", params=list(SYNTAXES.values()), ids=list(SYNTAXES))
def model(request: pytest.FixtureRequest, has_tokens: bool, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(request.param, tmp_path_factory.mktemp("tokenizer"), has_tokens=has_tokens)


def tools(*, strict: bool = True, **more: Any) -> Tools:
    functions = tuple(Tool(name=name, schema=json.dumps(schema), is_strict=strict) for name, schema in SCHEMAS.items())
    return Tools(given=(), functions=functions, **more)


def draw(model: Model, grammar: Grammar | None, seed: int, *, most: int = 400) -> tuple[str, list[CallDelta]]:
    """Draw tokens from what is allowed, to the end, which comes soon once it may; return content and calls."""
    assert grammar is not None
    matcher, rng, output = model.grammars.matcher(grammar, []), random.Random(seed), list[int]()
    while not matcher.is_done and len(output) < most:
        allowed = allowed_by(model, matcher)
        output.append(EOS_ID if EOS_ID in allowed and rng.random() < 0.5 else rng.choice(allowed))
        matcher.take(output[-1])
        assert not matcher.has_failed
    assert matcher.is_done
    text = model.tokenizer.decode([token for token in output if token != EOS_ID], skip_special_tokens=False)
    content, deltas = CallParser(model.calls.syntax, schemas=SCHEMAS).feed(text, final=True)
    return content, joined(deltas)


def allowed_by(model: Model, matcher: Matcher) -> list[int]:
    words = np.zeros(words_for(model.vocab_size), dtype=np.int32)
    matcher.fill(words)
    return np.flatnonzero(is_set(words, model.vocab_size)).tolist()


def written(model: Model, matcher: Matcher, text: str) -> Matcher:
    """Go on over a text that the model writes."""
    for token in model.tokenizer.encode(text, add_special_tokens=False).ids:
        assert token in allowed_by(model, matcher), model.tokenizer.decode([token], skip_special_tokens=False)
        matcher.take(token)
    return matcher


def check(found: list[CallDelta]) -> None:
    for call in found:
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])


@pytest.mark.parametrize("seed", SEEDS)
def test_required_calls_are_valid_ones(model: Model, seed: int) -> None:
    asked = tools(choice=ToolChoice.REQUIRED, strict=seed % 2 > 0)
    content, found = draw(model, grammar_with_calls(asked, model.calls, content=None), seed)
    assert content == ""
    assert len(found) >= 1
    check(found)


def test_there_may_be_several_but_one_where_that_is_asked_for(model: Model) -> None:
    several = grammar_with_calls(tools(choice=ToolChoice.REQUIRED), model.calls, content=None)
    one = grammar_with_calls(tools(choice=ToolChoice.REQUIRED, are_parallel=False), model.calls, content=None)
    assert {len(draw(model, one, seed)[1]) for seed in range(12)} == {1}
    counts = {len(draw(model, several, seed)[1]) for seed in range(12)}
    assert (max(counts) > 1) is (not model.calls.syntax.is_bare)  # Llama 3's templates take one only


@pytest.mark.parametrize("seed", SEEDS)
def test_a_tool_that_is_named_is_called_once(model: Model, seed: int) -> None:
    asked = tools(choice=ToolChoice.REQUIRED, only="ns/now")
    content, found = draw(model, grammar_with_calls(asked, model.calls, content=None), seed)
    assert (content, [(call.name, call.arguments) for call in found]) == ("", [("ns/now", "{}")])


def test_left_to_the_model_nothing_is_kept_to_but_what_is_strict() -> None:
    calls = ToolCalls(syntax=HERMES)
    assert grammar_with_calls(tools(strict=False), calls, content=None) is None
    assert grammar_with_calls(tools(strict=True), calls, content=None) is not None
    assert grammar_with_calls(tools(choice=ToolChoice.NONE), calls, content=None) is None
    assert grammar_with_calls(tools(choice=ToolChoice.NONE), calls, content=CONTENT) == CONTENT


BEGINNINGS = {
    "hermes": '<tool_call>\n{"name": "',
    "mistral": '[TOOL_CALLS][{"name": "',
    "mistral_args": "[TOOL_CALLS]",
    "llama3_json": '{"name": "',
    "qwen3_coder": "<tool_call>\n<function=",
}
BETWEEN = {
    "hermes": '", "arguments": ',
    "mistral": '", "arguments": ',
    "mistral_args": "[ARGS]",
    "llama3_json": '", "parameters": ',
}
COLOUR = {"qwen3_coder": ">\n<parameter=colour>\ngrün\n</parameter>\n<parameter=layers>\n"}
ENDS = {"hermes": "7}}\n</tool_call>", "mistral": "7}}]", "mistral_args": "7}", "llama3_json": "7}}"}
ENDS["qwen3_coder"] = "7\n</parameter>\n</function>\n</tool_call>"


def test_left_to_the_model_text_goes_on_as_it_likes_and_calls_are_valid(model: Model) -> None:
    grammar, syntax = grammar_with_calls(tools(), model.calls, content=None), model.calls.syntax
    assert grammar is not None
    assert EOS_ID in allowed_by(model, written(model, model.grammars.matcher(grammar, []), "Once {upon} a < time"))
    matcher = written(model, model.grammars.matcher(grammar, []), BEGINNINGS[syntax.name])
    for wrong in ("x", '"'):
        assert model.tokenizer.token_to_id(wrong) not in allowed_by(model, matcher)
    colour = COLOUR.get(syntax.name) or f'{BETWEEN[syntax.name]}{{"colour": "grün", "layers": '
    matcher = written(model, matcher, f"paint{colour}")
    assert model.tokenizer.token_to_id('"') not in allowed_by(model, matcher)
    matcher = written(model, matcher, ENDS[syntax.name])
    assert matcher.is_done or EOS_ID in allowed_by(model, matcher)


def test_an_opening_that_is_spelt_out_is_one_too(model: Model) -> None:
    grammar, syntax = grammar_with_calls(tools(), model.calls, content=None), model.calls.syntax
    assert grammar is not None
    matcher = model.grammars.matcher(grammar, [])
    for character in BEGINNINGS[syntax.name].replace("\n", "Ċ").replace(" ", "Ġ"):
        token = model.tokenizer.token_to_id(character)
        assert token is not None
        matcher.take(token)
        assert not matcher.has_failed
    assert model.tokenizer.token_to_id("x") not in allowed_by(model, matcher)


@pytest.mark.parametrize("seed", SEEDS)
def test_content_keeps_to_its_schema_where_it_is_no_call(model: Model, seed: int) -> None:
    content, found = draw(model, grammar_with_calls(tools(), model.calls, content=CONTENT), seed)
    check(found)
    assert bool(found) is not (content.strip() in ('"yes"', '"no"'))


def test_a_call_ends_what_may_have_one_only(tmp_path: Path) -> None:
    model = make_model(HERMES, tmp_path, has_tokens=True)
    grammar = grammar_with_calls(tools(strict=False, are_parallel=False), model.calls, content=None)
    assert grammar is not None
    text = 'Well.<tool_call>\n{"name": "paint", "arguments": {"any": [1, {}]}}\n</tool_call>'
    assert written(model, model.grammars.matcher(grammar, []), text).is_done
