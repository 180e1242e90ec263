"""The matchers of requests whose output keeps to a grammar: one that may take long is made beside the steps.

llguidance goes through a grammar by recursion: one with some thousands of rules that name each other in a chain takes
more stack than a process has by default, which would end the core. A small one can have no such chain.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from engines.errors import InvalidRequest
from engines.native import client_messages as c
from engines.native.deep_stack import on_deep_stack
from engines.protocol import Grammar

if TYPE_CHECKING:
    from engines.native.grammar import Grammars, Matcher

_SMALL: Final = 4096  # characters


class Matchers:
    """Of one engine core.

    Args:
        go_on: Given a request and the matcher of its grammar, where it has one.
        refuse: Given a request whose grammar is none, and why.
        fail: Ends the engine, with the reason.
    """

    def __init__(
        self,
        *,
        go_on: Callable[[c.Submit, "Matcher | None"], None],
        refuse: Callable[[c.Submit, InvalidRequest], None],
        fail: Callable[[str], None],
    ) -> None:
        self.grammars: Grammars | None = None  # set before the first request; None: output cannot be kept to any
        self._go_on = go_on
        self._refuse = refuse
        self._fail = fail
        self._wanted: dict[int, c.Submit] = {}  # requests whose matchers are made beside the steps
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()

    def give(self, request: c.Submit) -> None:
        """Have the request go on with its matcher, or be refused: at once, or where its grammar is large, later."""
        grammar = request.sampling.grammar
        if grammar is None or is_small(grammar):
            self._give_now(request)
            return
        self._wanted[request.key] = request
        task = asyncio.get_running_loop().create_task(self._give_later(request))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def forget(self, key: int) -> None:
        """Nobody wants this request any more, if it is one of these. What is being made cannot be stopped."""
        self._wanted.pop(key, None)

    def forget_all(self) -> None:
        """Nobody wants any of them."""
        self._wanted.clear()

    def _give_now(self, request: c.Submit) -> None:
        try:
            matcher = matcher_of(request, self.grammars)
        except InvalidRequest as refusal:
            self._refuse(request, refusal)
        else:
            self._go_on(request, matcher)

    async def _give_later(self, request: c.Submit) -> None:
        """Make matchers one after the other, so that there is one thread at most and one such stack."""
        matcher, refusal = None, None
        async with self._turn:
            if not self._is_wanted(request):
                return
            try:
                matcher = await on_deep_stack(partial(matcher_of, request, self.grammars))
            except InvalidRequest as error:
                refusal = error
        if not self._is_wanted(request):
            return
        del self._wanted[request.key]
        if refusal is not None:
            self._refuse(request, refusal)
        else:
            self._go_on(request, matcher)

    def _is_wanted(self, request: c.Submit) -> bool:
        return self._wanted.get(request.key) is request  # the next daemon may use a key again

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(f"{type(error).__name__}: {error}")


def is_small(grammar: Grammar) -> bool:
    """Return whether making a matcher takes some milliseconds at most, so that it is made between two steps."""
    return len(grammar.source) <= _SMALL


def matcher_of(request: c.Submit, grammars: "Grammars | None") -> "Matcher | None":
    """Return the matcher of the request's grammar, None where it has none.

    Raises:
        InvalidRequest: The grammar is none, or it cannot be kept to.
    """
    grammar = request.sampling.grammar
    if grammar is None:
        return None
    if grammars is None:
        raise InvalidRequest("this model's output cannot be kept to a grammar", parameter=grammar.parameter)
    return grammars.matcher(grammar, request.generated)
