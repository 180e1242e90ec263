"""In which state the supervised engine is, and what to do next. Pure: no clock, no engine."""

from dataclasses import dataclass, replace
from enum import Enum
from typing import assert_never

from engines.protocol import EngineCapabilities, FinishReason, GenerationRequest, SamplingParams
from engines.restarts import GiveUp, Restart, RestartPolicy, after_death

SHUTTING_DOWN = "the daemon is shutting down"
FRUITLESS_DEATHS = 3  # a request that was in flight at so many deaths in a row without a token between is not run again


class SupervisorState(Enum):
    STARTING = "starting"
    READY = "ready"
    RECOVERING = "recovering"
    ASLEEP = "asleep"  # there is no engine until somebody asks for one
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
class Succeeded:
    """A second instance has taken the place of the engine, which may have died meanwhile."""

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Died:
    """The engine ended unasked, or one that was to replace it did not start.

    ``has_successor``: a second instance is starting already, and replaces it when that is ready.
    """

    reason: str
    has_successor: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SuccessorLost:
    """The engine has died, and the second instance that was to replace it will not."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SleepAsked:
    """Nobody uses the engine: it ends until somebody does."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WakeAsked:
    """Somebody asks for the engine that sleeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseAsked:
    """The owner wants it to end, for this reason."""

    reason: str


Event = Started | Succeeded | Died | SuccessorLost | SleepAsked | WakeAsked | CloseAsked
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

    READY or RECOVERING ---a second instance succeeded---> READY
    READY ---sleep asked---> ASLEEP ---wake asked---> STARTING
    """
    match event:
        case Started():
            return replace(old, state=SupervisorState.READY, reason="the engine serves"), None
        case Succeeded(epoch=epoch):
            return replace(old, state=SupervisorState.READY, reason=f"the second instance serves, epoch {epoch}"), None
        case SuccessorLost(reason=lost):
            reason = f"the second instance does not take over ({lost}); the engine is started again; requests wait"
            return replace(old, reason=reason), None
        case Died(reason=reason, has_successor=has_successor):
            deaths_s = (*old.deaths_s[-policy.max_deaths :], now_s)
            counted = replace(old, deaths_s=deaths_s, deaths_total=old.deaths_total + 1)
            decision = after_death(deaths_s, policy=policy)
            if isinstance(decision, GiveUp):
                reason = f"the engine {decision.reason}, at last: {reason}"
                return replace(counted, state=SupervisorState.FAILED, reason=reason), decision
            next_step = f"and is started again in {decision.after_s:g} s"
            if has_successor:
                next_step = "while a second instance is starting, which takes over"
            reason = f"the engine died ({reason}) {next_step}; requests wait"
            return replace(counted, state=SupervisorState.RECOVERING, reason=reason), decision
        case SleepAsked(reason=why):
            return replace(old, state=SupervisorState.ASLEEP, reason=f"asleep, until a request comes: {why}"), None
        case WakeAsked():
            return replace(old, state=SupervisorState.STARTING, reason="the engine is waking up; requests wait"), None
        case CloseAsked(reason=why):
            return replace(old, state=SupervisorState.CLOSING, reason=why), None
        case _:
            assert_never(event)


def model_ends(sampling: SamplingParams, capabilities: EngineCapabilities) -> frozenset[int]:
    """Return the token ids with which the model ends a request by itself."""
    return frozenset(() if sampling.ignore_eos else capabilities.eos_token_ids)


def finish_of(
    request: GenerationRequest, generated: list[int], capabilities: EngineCapabilities
) -> FinishReason | None:
    """Say how a request ended whose engine died after its last token but before saying so; None when it goes on."""
    sampling = request.sampling
    if not generated:
        return None
    if generated[-1] in model_ends(sampling, capabilities).union(sampling.stop_token_ids):
        return FinishReason.STOP
    num_tokens = len(request.prompt_token_ids) + len(generated)
    if len(generated) >= request.sampling.max_tokens or num_tokens >= capabilities.max_model_len:
        return FinishReason.LENGTH
    return None


def loss_of(first: EngineCapabilities, second: EngineCapabilities) -> str | None:
    """Say why a second instance could not go on with the requests of the first; None when it could."""
    if second.generates != first.generates:
        does, did = ("generates" if each.generates else "only embeds, classifies or scores" for each in (second, first))
        return f"the second instance {does}, the first {did}"
    if second.max_model_len < first.max_model_len:
        lengths = f"{second.max_model_len} tokens, the first {first.max_model_len}"
        return f"the second instance has a context of {lengths}: longer requests could not go on"
    if (second.vocab_size, set(second.eos_token_ids)) != (first.vocab_size, set(first.eos_token_ids)):
        return "the second instance has another vocabulary than the first"
    return None
