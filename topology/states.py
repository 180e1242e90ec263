"""States that discovery reports instead of failing: of the driver, and of one GPU."""

from dataclasses import dataclass
from enum import Enum


class DriverState(Enum):
    """What NVML says of this host as a whole."""

    NOT_ASKED = "not-asked"
    OK = "ok"
    NO_GPUS = "no-gpus"
    NO_LIBRARY = "no-library"
    NO_DRIVER = "no-driver"
    VERSION_MISMATCH = "version-mismatch"
    NO_PERMISSION = "no-permission"
    OLD_DRIVER = "old-driver"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverStatus:
    """Whether GPUs can be seen, why not, and what an old driver could not answer.

    Args:
        sentence: For people; empty if there is nothing to say.
        missing: NVML functions that this driver lacks; what they would have told is left out.
        unreadable: One sentence for each GPU whose identity could not be read.
        notes: What is odd about the environment in which CUDA would look for GPUs.
    """

    state: DriverState = DriverState.NOT_ASKED
    sentence: str = ""
    driver_version: str = ""
    cuda_version: str = ""
    missing: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class HealthState(Enum):
    """Whether a GPU should be given work, the worst that is known of it."""

    OK = "ok"
    UNKNOWN = "unknown"  # the driver does not say
    DEGRADED = "degraded"  # works; the sentence says what is wrong
    NEEDS_RESET = "needs-reset"
    NO_PERMISSION = "no-permission"
    LOST = "lost"  # fell off the bus


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """The state of one GPU, with one sentence of reason. Counts are None where the driver does not say."""

    state: HealthState = HealthState.UNKNOWN
    sentence: str = ""
    ecc_uncorrected: int | None = None  # since the driver was loaded
    ecc_corrected: int | None = None
    retired_pages: int | None = None  # or remapped rows, on GPUs that remap
    is_retirement_pending: bool | None = None

    @property
    def is_usable(self) -> bool:
        """Whether stages may be placed on it."""
        return self.state in (HealthState.OK, HealthState.UNKNOWN, HealthState.DEGRADED)
