"""Which headers a proxy passes on: not those that are of one connection only (RFC 9110, section 7.6.1)."""

from collections.abc import Iterable, Mapping
from typing import Final

OF_ONE_HOP: Final = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding"}
    | {"upgrade", "content-length", "expect"}
)
NOT_ANSWERED: Final = OF_ONE_HOP | {"date", "server"}  # the proxy has its own


def without(names: Iterable[str], headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the headers but those of these names, which are in lower case."""
    return [(name, value) for name, value in headers.items() if name.lower() not in names]
