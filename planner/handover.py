"""The steps of a handover, as a pure state machine."""

from enum import Enum


class HandoverPhase(Enum):
    PREPARING = "prepare"
    SYNCING = "sync"
    COMMITTING = "commit"
    RETIRING = "retire"
    DONE = "done"
    ROLLING_BACK = "roll back"
    ABORTED = "aborted"
