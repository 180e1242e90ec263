"""What an SGLang that nobody has tried may lack: it is said in the log, and the rest goes on."""

from collections.abc import Callable

from flexpiped_served.first_layers import say

_ODD = (ImportError, AttributeError, TypeError, LookupError)


def has(change: Callable[[], object], *, without: str) -> bool:
    """Change something of SGLang, and return whether this one is as the change expects it.

    Args:
        without: What is so where it is not.
    """
    try:
        change()
    except _ODD as error:
        say(f"this SGLang is not as expected ({type(error).__name__}: {error}): {without}")
        return False
    return True


def expect(are_so: bool, words: str) -> None:
    """Raise AttributeError, as for something that is not there, unless something is as expected."""
    if not are_so:
        raise AttributeError(words)
