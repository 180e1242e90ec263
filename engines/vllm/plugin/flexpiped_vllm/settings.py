"""What the daemon tells the plugin, through the environment."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    directory: Path  # private to this instance: sockets lie there
    nice: int  # of workers
    slice_bytes: int  # of KV copied in one piece between two steps

    @staticmethod
    def of_environment() -> "Settings":
        return Settings(
            directory=Path(os.environ["FLEXPIPED_VLLM_DIR"]),
            nice=int(os.environ.get("FLEXPIPED_VLLM_NICE", "10")),
            slice_bytes=int(os.environ.get("FLEXPIPED_VLLM_SLICE_BYTES", str(512 << 10))),
        )

    @staticmethod
    def present() -> bool:
        """Return whether a daemon started this process; else vLLM was started by hand, and nothing is changed."""
        return "FLEXPIPED_VLLM_DIR" in os.environ
