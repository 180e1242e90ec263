"""How fast the rounds of a handover copy KV cache, so that steps keep their pace. Plain and synchronous: no clock."""

from typing import Final

# Of the time of the stages together, while requests run. A copy holds up the step behind it for as long as it takes,
# and the steps of all stages follow each other: so much slower they become, at most.
COPY_SHARE: Final = 0.045
_FIRST_GUESS_S_PER_BYTE: Final = 1e-9  # taking out and putting in, until the first piece has said how long it took
_NEWEST: Final = 0.2  # the weight of the last piece in what a byte takes
_OF_DEADLINE: Final = 0.5  # a round may take so much of the time that all rounds have


class CopyPace:
    """When each piece of a handover may be sent, over all of its sources.

    Args:
        cap_bytes_per_s: At most so many, whatever else; None: as fast as ``COPY_SHARE`` allows.
        deadline_s: Of all rounds. What would take too long at that share is sent as fast as it has to be.
    """

    def __init__(self, *, cap_bytes_per_s: int | None, deadline_s: float) -> None:
        self._cap_bytes_per_s = cap_bytes_per_s
        self._deadline_s = deadline_s
        self._s_per_byte = _FIRST_GUESS_S_PER_BYTE
        self._least_bytes_per_s = 0.0
        self._next_s = 0.0

    def begin(self, round_bytes: int) -> None:
        """So much is to be sent in the round that begins."""
        self._least_bytes_per_s = round_bytes / (_OF_DEADLINE * self._deadline_s)

    def send_s(self, num_bytes: int, *, now_s: float, requests_run: bool) -> float:
        """Return when a piece of so many bytes may be sent, which is then taken for sent."""
        at_s = max(now_s, self._next_s)
        self._next_s = at_s + num_bytes / self._bytes_per_s(requests_run=requests_run)
        return at_s

    def took(self, num_bytes: int, busy_s: float) -> None:
        """A piece kept its source and its destination busy for so long together."""
        self._s_per_byte += _NEWEST * (busy_s / num_bytes - self._s_per_byte)

    def _bytes_per_s(self, *, requests_run: bool) -> float:
        if self._cap_bytes_per_s is not None:
            return float(self._cap_bytes_per_s)
        if not requests_run:
            return float("inf")
        return max(COPY_SHARE / self._s_per_byte, self._least_bytes_per_s)
