"""Why no placement can exist, in a sentence with numbers."""

from planner.placement_problem import PlacementProblem
from planner.segments import cheapest_hops
from topology.units import format_bytes, format_bytes_apart, plural


def why_impossible(problem: PlacementProblem) -> str | None:
    """Return why there is no placement, as far as that is plain without a search. None is no promise."""
    devices = {device for place in problem.places for device in place.device_ids}
    limit = min(len(problem.pieces), len(devices))
    if problem.num_stages > limit:
        stages, pieces = plural(problem.num_stages, "stage"), plural(len(problem.pieces), "piece")
        have = f"{plural(len(devices), 'device')} {'is' if len(devices) == 1 else 'are'}"
        return f"{stages} were asked for; the model has {pieces} and {have} free, so at most {limit}"
    rooms = sorted((max(0, place.room_bytes + sum(place.held.values())) for place in problem.places), reverse=True)
    needed, offered = _needed(problem), sum(rooms[: problem.num_stages])
    if needed > offered:
        need, have = format_bytes_apart(needed, offered)
        return f"needs {need}{_with_kv(problem)}, the largest set of {_devices(problem.num_stages)} offers {have}"
    largest = max(problem.least_bytes(piece) for piece in problem.pieces)
    if largest > rooms[0] and problem.num_stages > 1:
        need, have = format_bytes_apart(largest, rooms[0])
        return f"the largest piece needs {need}{_with_kv(problem)}, the roomiest device offers {have}"
    return _why_beyond_budget(problem) or _why_too_slow(problem)


def _why_too_slow(problem: PlacementProblem) -> str | None:
    """Return why no step keeps the limit on its time, were all layers on the fastest devices with the shortest hops."""
    if problem.latency_limit_ns is None:
        return None
    classes = {place.speed_class for place in problem.places}
    fastest = sum(min(problem.class_ns[row][piece] for row in classes) for piece in range(len(problem.pieces)))
    least = fastest + sum(sorted(cheapest_hops(problem))[: problem.num_stages - 1])
    if least <= problem.latency_limit_ns:
        return None
    return f"a step takes {least / 1e6:.3g} ms at least, {problem.latency_limit_ns / 1e6:.3g} ms are allowed"


def why_no_way(problem: PlacementProblem) -> str:
    """Return the numbers behind a proof that no choice of cuts and places fits."""
    rooms = [max(0, place.room_bytes) for place in problem.places]
    stages = plural(problem.num_stages, "stage")
    limit = problem.latency_limit_ns
    slow = "" if limit is None else f" within {limit / 1e6:.6g} ms a step"
    return (
        f"no way to place {stages} of {format_bytes(_needed(problem))} together{_with_kv(problem)} fits{slow}: "
        f"{len(rooms)} places offer {format_bytes(sum(rooms))}, the largest {format_bytes(max(rooms))}"
    )


def _needed(problem: PlacementProblem) -> int:
    tied = problem.tied_bytes if problem.num_stages == 1 else 0
    return sum(problem.least_bytes(piece) for piece in problem.pieces) - tied


def _with_kv(problem: PlacementProblem) -> str:
    tokens = problem.tokens_in_room(problem.min_kv_tokens)
    return f" with KV cache for {tokens} tokens" if tokens else ""


def _why_beyond_budget(problem: PlacementProblem) -> str | None:
    """Return why no cuts give each stage a KV cache within its budget: there would be more stages than there are."""
    if problem.kv_budget_bytes is None:
        return None
    tokens, rates = problem.min_kv_tokens, [piece.kv_bytes_per_token for piece in problem.pieces]
    needed = max(max(rates), -(-sum(rates) // problem.num_stages)) * tokens
    if needed <= problem.kv_budget_bytes:
        return None
    need, have = format_bytes_apart(needed, problem.kv_budget_bytes)
    return f"KV cache for {tokens} tokens takes {need} of some stage, its budget is {have}"


def _devices(count: int) -> str:
    return "free devices (1)" if count == 1 else f"{count} free devices"
