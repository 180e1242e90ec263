"""Matchers of large grammars are made beside the steps, and given to those who still want them."""

import threading
from typing import Any, cast

import pytest

from engines.errors import InvalidRequest
from engines.native import client_messages as c
from engines.native.deep_stack import on_deep_stack
from engines.native.grammar import Matcher
from engines.native.matchers import Matchers
from engines.protocol import Grammar, GrammarKind, SamplingParams
from tests.support.until import until

pytestmark = pytest.mark.real_loop
LARGE = "a" * 5000


def request(key: int, source: str | None) -> c.Submit:
    grammar = None if source is None else Grammar(kind=GrammarKind.REGEX, source=source, parameter="regex")
    return c.Submit(
        key=key, prompt=[5], generated=[], sampling=SamplingParams(max_tokens=3, grammar=grammar), shaping=None
    )


class Making:
    """Matchers that are their sources, and what became of requests."""

    def __init__(self) -> None:
        self.gone_on: list[tuple[c.Submit, Any]] = []
        self.refused: list[tuple[int, str]] = []
        self.failures: list[str] = []
        self.threads: list[str] = []
        self.may_end = threading.Event()
        self.may_end.set()
        self.error: Exception | None = None
        self.matchers = Matchers(
            go_on=lambda asked, matcher: self.gone_on.append((asked, matcher)),
            refuse=lambda asked, refusal: self.refused.append((asked.key, str(refusal))),
            fail=self.failures.append,
        )
        self.matchers.grammars = cast("Any", self)

    def matcher(self, grammar: Grammar, _generated: list[int]) -> Matcher:
        self.threads.append(threading.current_thread().name)
        self.may_end.wait(30.0)
        if self.error is not None:
            raise self.error
        return cast("Matcher", grammar.source)

    def keys(self) -> list[int]:
        return [asked.key for asked, _ in self.gone_on]


async def test_small_ones_are_made_at_once() -> None:
    made = Making()
    made.matchers.give(request(1, None))
    made.matchers.give(request(2, "ab"))
    assert [matcher for _, matcher in made.gone_on] == [None, "ab"]
    assert made.threads == ["MainThread"]


async def test_large_ones_hold_up_no_other_request() -> None:
    made = Making()
    made.may_end.clear()
    made.matchers.give(request(1, LARGE))
    made.matchers.give(request(2, LARGE + "b"))
    made.matchers.give(request(3, None))
    await until(lambda: len(made.threads) == 1)  # one after the other
    assert made.keys() == [3]
    made.may_end.set()
    await until(lambda: len(made.gone_on) == 3)
    assert [matcher for _, matcher in made.gone_on] == [None, LARGE, LARGE + "b"]
    assert "MainThread" not in made.threads


async def test_one_that_nobody_wants_any_more_is_dropped_also_if_its_key_is_used_again() -> None:
    made = Making()
    made.may_end.clear()
    for key in (1, 2):
        made.matchers.give(request(key, LARGE))
    await until(lambda: len(made.threads) == 1)
    made.matchers.forget(1)
    made.matchers.forget_all()
    again = request(1, LARGE + "b")
    made.matchers.give(again)
    made.may_end.set()
    await until(lambda: bool(made.gone_on))
    assert made.gone_on == [(again, LARGE + "b")]
    assert len(made.threads) == 2  # of the second that was forgotten none was made


@pytest.mark.parametrize("source", ["a", LARGE])
async def test_what_is_no_grammar_is_refused(source: str) -> None:
    made = Making()
    made.error = InvalidRequest("regex: no", parameter="regex")
    made.matchers.give(request(1, source))
    await until(lambda: bool(made.refused))
    assert (made.refused, made.gone_on) == ([(1, "regex: no")], [])


async def test_an_error_of_another_kind_ends_the_engine() -> None:
    made = Making()
    made.error = RuntimeError("broken")
    made.matchers.give(request(1, LARGE))
    await until(lambda: bool(made.failures))
    assert made.failures == ["RuntimeError: broken"]


async def test_other_threads_have_the_stack_that_they_had() -> None:
    assert await on_deep_stack(lambda: 5) == 5
    assert threading.stack_size() == 0
    with pytest.raises(ZeroDivisionError):
        await on_deep_stack(lambda: 1 // 0)
