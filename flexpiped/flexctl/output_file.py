"""Files that a command writes at its end: whether they can be written is found out before the work."""

from pathlib import Path

from flexpiped.flexctl.client import Failed


def ensure_writable(path: str) -> None:
    """Make the file where there is none; one that is there stays as it is.

    Raises:
        Failed: It cannot be written.
    """
    try:
        with Path(path).open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise _unwritable(path, error) from None


def write_text(path: str, text: str) -> None:
    """Write the file.

    Raises:
        Failed: It cannot be written.
    """
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: str, error: OSError) -> Failed:
    return Failed("unwritable", f"{path}: {error.strerror}")
