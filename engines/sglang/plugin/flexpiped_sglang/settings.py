"""What the daemon tells the plugin, through the environment."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    directory: Path  # private to this instance: sockets lie there
    nice: int  # of schedulers
    slice_bytes: int  # of KV copied in one piece between two steps

    @staticmethod
    def of_environment() -> "Settings":
        return Settings(
            directory=Path(os.environ["FLEXPIPED_SGLANG_DIR"]),
            nice=int(os.environ.get("FLEXPIPED_SGLANG_NICE", "10")),
            slice_bytes=int(os.environ.get("FLEXPIPED_SGLANG_SLICE_BYTES", str(512 << 10))),
        )

    @staticmethod
    def present() -> bool:
        """Return whether a daemon started this process; else SGLang was started by hand, and nothing is changed."""
        return "FLEXPIPED_SGLANG_DIR" in os.environ
