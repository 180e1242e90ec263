"""What an engine is told of handovers, whichever it is."""

import msgspec

from planner.handover import HandoverLimits


class HandoverOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Part of the options of each engine that changes its layout in place."""

    prepare_deadline_s: float = 120.0
    sync_deadline_s: float = 120.0
    commit_deadline_s: float = 5.0
    max_rounds: int = 8
    remainder_slots: int = 256
    slice_bytes: int = 512 << 10  # of KV copied in one piece between two steps
    verify_checksums: bool = False  # compare the live KV blocks of source and destination at commit (tests)

    @property
    def handover_limits(self) -> HandoverLimits:
        """What the steps of a handover are held to."""
        return HandoverLimits(
            prepare_deadline_s=self.prepare_deadline_s,
            sync_deadline_s=self.sync_deadline_s,
            commit_deadline_s=self.commit_deadline_s,
            max_rounds=self.max_rounds,
            remainder_slots=self.remainder_slots,
        )
