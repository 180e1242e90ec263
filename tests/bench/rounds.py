"""Rounds in which contestants take turns, so that a machine that is busy for a while is busy for all of them."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.bench.contestants import Contestant
from tests.bench.program import prompts
from tests.bench.stats import median
from tests.bench.tables import say

_WARM_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundsPlan:
    """How the rounds are held. A turn repeats its batch until ``turn_s`` have been measured."""

    rounds: int
    streams: tuple[int, ...]
    prompt_tokens: int
    max_tokens: int
    turn_s: float
    warm_streams: int = 0  # that precede each turn but the first; 0: as many as it has


def plan_of(options: argparse.Namespace) -> RoundsPlan:
    """Return the plan that a program's options ask for."""
    return RoundsPlan(
        rounds=options.rounds,
        streams=options.streams,
        prompt_tokens=options.prompt_tokens,
        max_tokens=options.tokens,
        turn_s=options.turn_s,
    )


@dataclass(slots=True)
class Rates:
    """Tokens per second and times to the first token of every turn, by contestant and number of streams."""

    _seen: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    _firsts_s: dict[tuple[str, int], list[float]] = field(default_factory=dict)

    def add(self, name: str, streams: int, rate: float, first_s: float = math.nan) -> None:
        self._seen.setdefault((name, streams), []).append(rate)
        self._firsts_s.setdefault((name, streams), []).append(first_s)

    def first_s(self, name: str, streams: int) -> float:
        """Return the median time to the first token over rounds, NaN where it was not seen."""
        return median(self._firsts_s.get((name, streams), ()))

    def median(self, name: str, streams: int) -> float:
        """Return the median over rounds, NaN where the contestant took no part."""
        return median(self._seen.get((name, streams), ()))

    def to_wire(self) -> dict[str, dict[str, list[float]]]:
        """Return all rates as JSON values."""
        wire: dict[str, dict[str, list[float]]] = {}
        for (name, streams), rates in self._seen.items():
            wire.setdefault(name, {})[str(streams)] = rates
        return wire


async def hold_rounds(contestants: Sequence[Contestant], plan: RoundsPlan) -> Rates:
    """Let all contestants take a turn at each number of streams in each round. Each round begins with another one.

    The first turn of each is preceded by one that is not counted.
    """
    rates = Rates()
    for number in range(plan.rounds):
        shift = number % len(contestants)
        for streams in plan.streams:
            for contestant in [*contestants[shift:], *contestants[:shift]]:
                rate, first_s = await _turn(
                    contestant, plan, streams=streams, seed=number * 1000 + streams, warm=number == 0
                )
                rates.add(contestant.name, streams, rate, first_s)
                say(f"round {number + 1} of {plan.rounds}, {streams} streams, {contestant.name}: {rate:.0f} tok/s")
    return rates


async def _turn(
    contestant: Contestant, plan: RoundsPlan, *, streams: int, seed: int, warm: bool
) -> tuple[float, float]:
    def given(repetition: int) -> list[list[int]]:
        return prompts(count=streams, length=plan.prompt_tokens, seed=seed * 100 + repetition)

    warming = given(99) if warm or not plan.warm_streams else given(99)[: plan.warm_streams]
    await contestant.turn(warming, max_tokens=plan.max_tokens if warm else _WARM_TOKENS)
    tokens, took_s, repetition = 0, 0.0, 0
    firsts_s = []
    while took_s < plan.turn_s or repetition == 0:
        turn = await contestant.turn(given(repetition), max_tokens=plan.max_tokens)
        if turn.tokens != streams * plan.max_tokens:
            raise RuntimeError(f"{contestant.name} gave {turn.tokens} tokens, not {streams * plan.max_tokens}")
        tokens, took_s, repetition = tokens + turn.tokens, took_s + turn.took_s, repetition + 1
        firsts_s.append(turn.first_s)
    return tokens / took_s, median(firsts_s)
