"""Flags and variables of an engine that the daemon sets itself: refused by name among what users pass through. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engines.errors import UnsupportedByEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class Owned:
    """What is the daemon's of one engine: each flag and variable with what says it instead."""

    package: str  # whose settings are engines.PACKAGE
    flags: Mapping[str, str]
    short: Mapping[str, str]  # other spellings of these flags
    variables: Mapping[str, str]

    def flag_of(self, argument: str) -> str | None:
        """Return the flag of the daemon's that ``argument`` is, however it is written: ``-tp=2``, ``--block_s 32``."""
        name = argument.partition("=")[0].partition(".")[0].replace("_", "-")
        if name in self.short:
            return self.short[name]
        if not name.startswith("--"):
            return None
        name = "--" + name[2:].removeprefix("no-")
        if name in self.flags:
            return name
        # argparse takes any beginning of a flag that is unique: more than one letter is enough to be sure of the intent
        return next((flag for flag in self.flags if len(name) > 5 and flag.startswith(name)), None)

    def refuse(self, *, args: Sequence[str], env: Mapping[str, str]) -> None:
        """Raises: UnsupportedByEngine: One that the daemon owns is among those passed through."""
        for argument in args:
            if (flag := self.flag_of(argument)) is not None:
                reason = self.flags[flag]
                raise UnsupportedByEngine(f"engines.{self.package}.args: {argument} is not yours to set: {reason}")
        for name in env:
            if name.startswith("FLEXPIPED_") or name in self.variables:
                reason = self.variables.get(name, "it is between the daemon and its plugin")
                raise UnsupportedByEngine(f"engines.{self.package}.env: {name} is not yours to set: {reason}")
