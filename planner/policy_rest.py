"""How long the policy keeps to what there is while nobody comes: who simulates need not ask it before that. Pure."""

from planner.policy_state import PolicyConstants, PolicyState

_MINUTE_S = 60.0  # that ``changes_per_min`` looks back


def rests_until_s(state: PolicyState, *, now_s: float, next_s: float, constants: PolicyConstants) -> float:
    """Return until when ``decide`` would keep, if nothing happens before ``next_s`` and what it sees stays quiet.

    1. ``now_s`` where an action is under way, a change is to be judged, or something has begun to look right
    2. else the first moment at which a rule that only waits for time may say something else

    Where nobody comes no granularity pays for a change, so all that may follow is that replicas go, or come back up to
    ``min_replicas``.
    """
    if state.under_way is not None or state.watch is not None or state.wish is not None:
        return now_s
    moments = [
        state.since_s + constants.dwell_s,
        *(each.until_s for each in state.barred),
        *(at_s + _MINUTE_S for at_s in state.changes_s),
    ]
    if state.ended_s is not None:
        moments.append(state.ended_s + constants.cool_down_s)
    if state.fleet and constants.min_replicas == 0:
        moments.append(state.busy_s + constants.idle_s)
    return min(next_s, *(each for each in moments if each > now_s), next_s)
