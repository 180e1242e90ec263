"""What the daemon tells a plugin, through the environment."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginSettings:
    """Of one engine; a subclass names its variables."""

    directory: Path  # private to this instance: sockets lie there
    nice: int  # of the processes that run steps
    slice_bytes: int  # of KV copied in one piece between two steps
    parameters: str = ""  # address of the keeper of parameters; empty: there is none
    parameters_of: str = ""  # by which it knows the engine and model

    @classmethod
    def prefix(cls) -> str:
        """Return what the names of the variables begin with."""
        raise NotImplementedError

    @classmethod
    def of_environment(cls) -> Self:
        prefix = cls.prefix()
        return cls(
            directory=Path(os.environ[f"{prefix}_DIR"]),
            nice=int(os.environ.get(f"{prefix}_NICE", "10")),
            slice_bytes=int(os.environ.get(f"{prefix}_SLICE_BYTES", str(512 << 10))),
            parameters=os.environ.get(f"{prefix}_PARAMETERS", ""),
            parameters_of=os.environ.get(f"{prefix}_PARAMETERS_OF", ""),
        )

    @classmethod
    def present(cls) -> bool:
        """Return whether a daemon started this process; else the engine was started by hand, and nothing is changed."""
        return f"{cls.prefix()}_DIR" in os.environ
