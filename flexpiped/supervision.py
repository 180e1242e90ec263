"""In which state the supervised engine is, and what to do next. Pure: no clock, no engine."""

from dataclasses import dataclass, replace
from enum import Enum
from typing import assert_never

from engines.protocol import EngineCapabilities, FinishReason, GenerationRequest, SamplingParams
from engines.restarts import GiveUp, Restart, RestartPolicy, after_death

FRUITLESS_DEATHS = 3  # a request that was in flight at so many deaths in a row without a token between is not run again


class SupervisorState(Enum):
    STARTING = "starting"
    READY = "ready"
    RECOVERING = "recovering"
    FAILED = "failed"
    CLOSING = "closing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervision:
    """The state with the sentence that explains it."""

    state: SupervisorState
    reason: str
    deaths_s: tuple[float, ...] = ()
    deaths_total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The engine serves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Died:
    """The engine ended unasked, or one that was to replace it did not start."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseAsked:
    """The owner wants it to end."""


Event = Started | Died | CloseAsked
INITIAL = Supervision(state=SupervisorState.STARTING, reason="the engine is starting")


def step(
    old: Supervision, event: Event, *, now_s: float, policy: RestartPolicy
) -> tuple[Supervision, Restart | GiveUp | None]:
    """Return the next state, and after a death what to do about it.

    STARTING ---started---> READY ---died---> RECOVERING ---started---> READY
                                                |      ^
                                 too many deaths|      | died again, later
                                                v      +---
                                              FAILED
    any state ---close asked---> CLOSING
    """
    match event:
        case Started():
            return replace(old, state=SupervisorState.READY, reason="the engine serves"), None
        case Died(reason=reason):
            deaths_s = (*old.deaths_s[-policy.max_deaths :], now_s)
            counted = replace(old, deaths_s=deaths_s, deaths_total=old.deaths_total + 1)
            decision = after_death(deaths_s, policy=policy)
            if isinstance(decision, GiveUp):
                reason = f"the engine {decision.reason}, at last: {reason}"
                return replace(counted, state=SupervisorState.FAILED, reason=reason), decision
            reason = f"the engine died ({reason}) and is started again in {decision.after_s:g} s; requests wait"
            return replace(counted, state=SupervisorState.RECOVERING, reason=reason), decision
        case CloseAsked():
            return replace(old, state=SupervisorState.CLOSING, reason="the daemon is shutting down"), None
        case _:
            assert_never(event)


def ending_tokens(sampling: SamplingParams, capabilities: EngineCapabilities) -> frozenset[int]:
    """Return the token ids that end a request."""
    return frozenset(sampling.stop_token_ids) | frozenset(() if sampling.ignore_eos else capabilities.eos_token_ids)


def finish_of(
    request: GenerationRequest, generated: list[int], capabilities: EngineCapabilities
) -> FinishReason | None:
    """Say how a request ended whose engine died after its last token but before saying so; None when it goes on."""
    sampling = request.sampling
    if not generated:
        return None
    ends_at = (
        sampling.stop_token_ids if sampling.ignore_eos else (*sampling.stop_token_ids, *capabilities.eos_token_ids)
    )
    if generated[-1] in ends_at:
        return FinishReason.STOP
    num_tokens = len(request.prompt_token_ids) + len(generated)
    if len(generated) >= request.sampling.max_tokens or num_tokens >= capabilities.max_model_len:
        return FinishReason.LENGTH
    return None
