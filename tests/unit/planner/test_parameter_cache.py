"""Which layers stay in host memory."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.parameter_cache import KeptLayer, KeptLayers, added, given_up, left, taken


def layer(name: str, num_bytes: int = 10) -> KeptLayer:
    return KeptLayer(key=name, name=name, num_bytes=num_bytes, users=1)


def kept_of(*names: str, idle: str = "") -> KeptLayers:
    """Return layers of 10 bytes that came in this order; those named in ``idle`` were left, in that order."""
    kept = KeptLayers()
    for name in names:
        found = added(kept, layer(name), budget_bytes=1000)
        assert found is not None
        kept, _ = found
    for name in idle:
        kept = left(kept, name)
    return kept


def test_what_was_of_no_use_for_longest_goes_first() -> None:
    kept = kept_of("a", "b", "c", idle="bac")
    assert given_up(kept, num_bytes=1)[1] == ("b",)
    assert given_up(kept, num_bytes=11)[1] == ("b", "a")
    assert given_up(left(taken(kept, "b"), "b"), num_bytes=11)[1] == ("a", "c")


def test_a_new_layer_gets_the_room_of_idle_ones_only() -> None:
    kept = kept_of("a", "b", idle="b")
    assert added(kept, layer("c"), budget_bytes=30) == (KeptLayers(layers=(*kept.layers, layer("c"))), ())
    found = added(kept, layer("c"), budget_bytes=20)
    assert found is not None
    assert ([each.name for each in found[0].layers], found[1]) == (["a", "c"], ("b",))
    assert added(kept, layer("c", 11), budget_bytes=20) is None  # "a" is in use
    assert added(KeptLayers(), layer("c"), budget_bytes=0) is None


def test_what_is_in_use_is_never_given_up() -> None:
    kept = taken(kept_of("a", "b", idle="ab"), "a")
    rest, gone = given_up(kept, num_bytes=1000)
    assert ([each.name for each in rest.layers], gone) == (["a"], ("b",))
    assert (kept.held_bytes, kept.idle_bytes) == (20, 10)


def test_two_stages_may_have_a_layer_and_the_last_one_leaves_it_idle() -> None:
    kept = left(taken(kept_of("a"), "a"), "a")
    assert kept.idle_bytes == 0
    assert left(kept, "a").idle_bytes == 10
    assert left(left(kept, "a"), "a").find("a") == KeptLayer(key="a", name="a", num_bytes=10)
    assert left(kept, "gone") == kept


def test_a_layer_is_added_once() -> None:
    with pytest.raises(ValueError, match="kept already"):
        added(kept_of("a"), layer("a"), budget_bytes=1000)


@given(
    st.lists(st.tuples(st.sampled_from(["add", "take", "leave", "give up"]), st.integers(0, 5), st.integers(1, 40))),
    st.integers(0, 100),
)
def test_there_is_never_more_than_the_budget(steps: list[tuple[str, int, int]], budget_bytes: int) -> None:
    kept = KeptLayers()
    for verb, number, num_bytes in steps:
        key, in_use = str(number), {each.key for each in kept.layers if each.users}
        match verb:
            case "add" if kept.find(key) is None:
                found = added(kept, layer(key, num_bytes), budget_bytes=budget_bytes)
                kept = kept if found is None else found[0]
            case "take":
                kept = taken(kept, key)
            case "leave":
                kept = left(kept, key)
                in_use.discard(key)
            case "give up":
                kept, _ = given_up(kept, num_bytes=num_bytes)
        assert kept.held_bytes <= budget_bytes
        assert in_use <= {each.key for each in kept.layers}
