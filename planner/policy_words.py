"""Words of the policy's reasons."""

from typing import assert_never

from planner.policy_state import Action, Verb
from topology.units import plural


def stages(count: int) -> str:
    """Return a number of stages in words."""
    return plural(count, "stage")


def replicas(count: int) -> str:
    """Return a number of replicas in words."""
    return plural(count, "replica")


def action_in_words(action: Action) -> str:
    """Return what an action does."""
    match action.verb:
        case Verb.CHANGE:
            return f"{action.from_stages} -> {stages(action.num_stages)}"
        case Verb.UNDO:
            return f"back from {action.from_stages} to {stages(action.num_stages)}"
        case Verb.ADD:
            return f"add {replicas(action.count)} of {stages(action.num_stages)}"
        case Verb.REMOVE:
            return f"remove {replicas(action.count)} of {stages(action.num_stages)}"
        case Verb.KEEP:
            return "keep"
        case _:
            assert_never(action.verb)


def milliseconds(seconds: float) -> str:
    """Return a duration of requests."""
    return f"{seconds * 1000:.3g} ms"
