"""How quantities are written for people, in one place: bytes in KiB, MiB and GiB, and how many there are."""

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_DIGITS = (1, 2, 3, 6)  # decimals below ten, tried in this order


def format_bytes(count: int) -> str:
    """Return ``count`` bytes with a unit, one decimal below ten: ``4.3 MiB``, ``812 KiB``, ``96 MiB``, ``0 B``."""
    return _format(count, _exponent(count), digits=1)


def format_bytes_apart(first: int, second: int) -> tuple[str, str]:
    """Return two amounts each with its unit, with as many digits as show that they differ where they do.

    So a refusal never reads "needs 8 MiB, offered 8 MiB".
    """
    for digits in _DIGITS:
        texts = _format(first, _exponent(first), digits=digits), _format(second, _exponent(second), digits=digits)
        if texts[0] != texts[1] or first == second:
            return texts
    return f"{first} B", f"{second} B"


def format_bytes_of(part: int, whole: int) -> str:
    """Return ``part`` of ``whole`` bytes in the unit of the larger, as different as they are: ``9 of 96 MiB``."""
    exponent = _exponent(max(abs(part), abs(whole)))
    for digits in _DIGITS:
        texts = _number(part, exponent, digits=digits), _number(whole, exponent, digits=digits)
        if texts[0] != texts[1] or part == whole:
            return f"{texts[0]} of {texts[1]} {_UNITS[exponent]}"
    return f"{part} of {whole} B"


def plural(count: int, noun: str) -> str:
    """Return ``1 stage`` or ``2 stages``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _exponent(count: int) -> int:
    """Return the power of 1024 whose unit suits ``count``: the largest that leaves a number of at least one."""
    exponent = 0
    while exponent + 1 < len(_UNITS) and round(abs(count) / 1024**exponent) >= 1024:
        exponent += 1
    return exponent


def _format(count: int, exponent: int, *, digits: int) -> str:
    return f"{_number(count, exponent, digits=digits)} {_UNITS[exponent]}"


def _number(count: int, exponent: int, *, digits: int) -> str:
    """Return ``count`` in units of 1024 ** ``exponent``: ``digits`` decimals below ten, one less from there on."""
    value = count / 1024**exponent
    decimals = digits if abs(value) < 10 else digits - 1
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
