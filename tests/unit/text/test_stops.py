"""Stop strings: cut where they begin, never shown in part, found wherever they are split."""

import itertools

import pytest

from engines.text.stops import StopMatcher, longest_beginning


def shown(matcher: StopMatcher, parts: list[str]) -> tuple[list[str], bool]:
    """Return what is shown for each part (and at the end), and whether a stop string was met."""
    texts = []
    for part in parts:
        text, hit = matcher.feed(part)
        texts.append(text)
        if hit:
            return texts, True
    return [*texts, matcher.finish()], False


@pytest.mark.parametrize(
    ("stop", "parts", "expected"),
    [
        pytest.param(("END",), ["one ", "END", " two"], (["one ", ""], True), id="whole"),
        pytest.param(("END",), ["one E", "N", "D two"], (["one ", "", ""], True), id="split in three"),
        pytest.param(("END",), ["one E", "NT", "END"], (["one ", "ENT", ""], True), id="false start"),
        pytest.param(("END",), ["one EN"], (["one ", "EN"], False), id="the end comes first"),
        pytest.param(("aab",), ["a", "a", "a", "b"], (["", "", "a", ""], True), id="overlapping start"),
        pytest.param(("\n\n",), ["x\n", "y\n", "\n"], (["x", "\ny", ""], True), id="newlines"),
        pytest.param(("abcd", "bc"), ["xabcd"], (["xa"], True), id="the one that ends first counts"),
        pytest.param(("b", "ab"), ["xab"], (["xa"], True), id="of those that end together the one listed first"),
        pytest.param(("ab", "b"), ["xab"], (["x"], True), id="of those that end together the one listed first, here"),
        pytest.param((), ["x"], (["x", ""], False), id="none"),
    ],
)
def test_what_is_shown(stop: tuple[str, ...], parts: list[str], expected: tuple[list[str], bool]) -> None:
    assert shown(StopMatcher(stop), parts) == expected


def test_include_stop_shows_it() -> None:
    assert shown(StopMatcher(("END",), include_stop=True), ["one E", "ND two"]) == (["one ", "END"], True)


@pytest.mark.parametrize(
    ("stop", "before"),
    [(("STOP", "STXX"), "ab aab ba "), ((" STOP", "TO", "OP"), "ab aab ba S"), (("a STOP", "OP"), "ab aab b")],
)
def test_every_split_of_a_text_shows_the_same(stop: tuple[str, ...], before: str) -> None:
    text = "ab aab ba STOP rest"
    for cuts in itertools.combinations(range(1, len(text)), 3):
        bounds = [0, *cuts, len(text)]
        texts, hit = shown(StopMatcher(stop), [text[a:b] for a, b in itertools.pairwise(bounds)])
        assert ("".join(texts), hit) == (before, True)


def test_what_ends_before_stop_strings_count_is_none_and_what_begins_there_is_one() -> None:
    matcher = StopMatcher(("b", "abc"))
    assert matcher.feed("xab", counts=False) == ("x", False)
    assert matcher.feed("c.") == ("", True)
    assert matcher.met == "abc"


def test_longest_beginning_leaves_out_the_whole() -> None:
    assert longest_beginning("xSTO", "STOP") == 3
    assert longest_beginning("xSTOP", "STOP") == 0
    assert longest_beginning("aa", "aaa") == 2
