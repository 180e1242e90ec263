"""Constrained output of the real engine: it keeps to its grammar, alone, crowded, moved and over a lost worker."""

import asyncio
import json
import os
import re
import signal
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio
from tokenizers import Tokenizer

from engines.errors import InvalidRequest
from engines.native.adapter import NativeEngine
from engines.protocol import FinishReason, GenerationRequest, Grammar, GrammarKind
from tests.native.test_exactness import CROWDED
from tests.support.native import even, llama, moved_under, request, running

pytestmark = [pytest.mark.engine, pytest.mark.real_loop, pytest.mark.asyncio(loop_scope="module")]

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "ages": {"type": "array", "items": {"type": "integer", "maximum": 99}, "minItems": 3, "maxItems": 3},
    },
    "required": ["name", "ages"],
    "additionalProperties": False,
}
PATTERN = r"[a-z]{5,9}-[0-9]{4} (yes|no)"
STREAMS = 8


def stream(index: int) -> GenerationRequest:
    prompt = tuple(5 + (index * 37 + i * 11) % 500 for i in range(12 + index))
    plain = request(prompt, max_tokens=150, temperature=1.2 * (index % 4 > 1), seed=index)
    kind, source = (GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA)) if index % 2 else (GrammarKind.REGEX, PATTERN)
    grammar = Grammar(kind=kind, source=source, parameter="response_format", any_whitespace=False)
    params = {"presence_penalty": 1.0} if index % 3 == 0 else {}
    return replace(plain, sampling=replace(plain.sampling, grammar=grammar, engine_params=params))


Result = list[tuple[list[int], FinishReason | None]]


async def collect(engine: NativeEngine, wanted: GenerationRequest) -> tuple[list[int], FinishReason | None]:
    tokens: list[int] = []
    finish = None
    async for chunk in engine.generate(wanted):
        tokens += chunk.token_ids
        finish = chunk.finish_reason
    return tokens, finish


async def run_all(engine: NativeEngine) -> Result:
    return list(await asyncio.gather(*(collect(engine, stream(i)) for i in range(STREAMS))))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[NativeEngine]:
    async with running(llama(), even(2), **CROWDED) as engine:
        yield engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def undisturbed(engine: NativeEngine) -> Result:
    return [await collect(engine, stream(i)) for i in range(STREAMS)]


async def test_the_output_keeps_to_the_grammar_and_ends_by_itself(engine: NativeEngine, undisturbed: Result) -> None:
    tokenizer = Tokenizer.from_file(str(llama() / "tokenizer.json"))
    assert engine.capabilities.grammars
    for index, (tokens, finish) in enumerate(undisturbed):
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        assert finish is FinishReason.STOP
        if index % 2:
            found = json.loads(text)
            assert (found.keys(), len(found["ages"])) == ({"name", "ages"}, 3)
        else:
            assert re.fullmatch(PATTERN, text), text


async def test_in_a_crowd_moved_and_over_a_lost_worker_it_is_the_same(
    engine: NativeEngine, undisturbed: Result
) -> None:
    assert await run_all(engine) == undisturbed
    for found in await moved_under(engine, [even(stages) for stages in (4, 1, 2)], lambda: run_all(engine)):
        assert found == undisturbed
    before = await engine.counters()
    streams = asyncio.create_task(run_all(engine))
    while (await engine.counters()).steps_total < before.steps_total + 20:
        pass
    os.kill((await engine.stages())[1].pids[0], signal.SIGKILL)
    assert await streams == undisturbed
    assert (await engine.counters()).worker_restarts_total == before.worker_restarts_total + 1


async def test_another_engine_goes_on_within_the_grammar(engine: NativeEngine, undisturbed: Result) -> None:
    for index, (tokens, finish) in enumerate(undisturbed):
        for already in (1, len(tokens) // 2):
            resumed = replace(stream(index), generated_token_ids=tuple(tokens[:already]))
            assert await collect(engine, resumed) == (tokens[already:], finish)


async def test_one_that_was_complete_ends_at_once(engine: NativeEngine, undisturbed: Result) -> None:
    """Its engine died after the last token, and before it said that this was the last."""
    tokens, finish = undisturbed[0]
    resumed = replace(stream(0), generated_token_ids=tuple(tokens))
    assert await collect(engine, resumed) == ([], finish)


@pytest.mark.parametrize(
    ("kind", "source"), [(GrammarKind.JSON_SCHEMA, '{"type": "nonsense"}'), (GrammarKind.REGEX, "(a")]
)
async def test_what_is_no_grammar_is_refused_by_name(engine: NativeEngine, kind: GrammarKind, source: str) -> None:
    plain = request((5, 6), max_tokens=5)
    grammar = Grammar(kind=kind, source=source, parameter="response_format")
    with pytest.raises(InvalidRequest) as caught:
        await collect(engine, replace(plain, sampling=replace(plain.sampling, grammar=grammar)))
    assert (caught.value.parameter, caught.value.code) == ("response_format", "invalid_grammar")
    counters = await engine.counters()
    assert (counters.running, counters.waiting, counters.kv_blocks_used) == (0, 0, 0)


async def test_a_chain_of_many_rules_ends_no_engine(engine: NativeEngine) -> None:
    """It is gone through by recursion, which on the stack of a process was the end of the engine and of its streams."""
    rules = "\n".join(f"r{i}: r{i + 1}" for i in range(20_000))
    plain = request((5, 6), max_tokens=5)
    grammar = Grammar(kind=GrammarKind.LARK, source=f'start: r0\n{rules}\nr20000: "a"', parameter="structured_outputs")
    wanted = replace(plain, sampling=replace(plain.sampling, grammar=grammar))
    assert await collect(engine, wanted) == ([token_of("a")], FinishReason.STOP)


async def test_allowed_tokens_that_leave_the_grammar_nothing_are_refused(engine: NativeEngine) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await collect(engine, limited("[a-c]{9}", only="x"))
    assert (caught.value.parameter, caught.value.code) == ("allowed_token_ids", "contradiction")


async def test_where_nothing_is_left_later_the_request_is_given_up(engine: NativeEngine) -> None:
    tokens, finish = await collect(engine, limited("bbx", only="b"))
    assert (tokens[:2], finish) == ([token_of("b")] * 2, FinishReason.ABORT)


def token_of(letter: str) -> int:
    (token,) = Tokenizer.from_file(str(llama() / "tokenizer.json")).encode(letter, add_special_tokens=False).ids
    return int(token)


def limited(pattern: str, *, only: str) -> GenerationRequest:
    grammar = Grammar(kind=GrammarKind.REGEX, source=pattern, parameter="structured_outputs")
    plain = request((5, 6), max_tokens=20)
    params = {"allowed_token_ids": [token_of(only)]}
    return replace(plain, sampling=replace(plain.sampling, grammar=grammar, engine_params=params))
