"""What a configuration file says now against what is in force: which keys differ, and what a reload does about each.

A live key is applied, another one waits for a restart, and a file with a mistake changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexpiped.config_file import ConfigError, load_config
from flexpiped.config_text import toml_value
from flexpiped.keys import KeyFileError, KeyRing, load_keys
from flexpiped.settings import KEYS, Key, Settings, value_of, with_value


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One key whose value differs; values are as a file would have them."""

    key: Key
    before: str
    after: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReloadReport:
    """``settings`` are those in force after a reload: the live keys are new, all others as they were.

    ``keys`` are the API keys, None where none is asked for.
    """

    file: str
    settings: Settings
    keys: KeyRing | None = None
    changes: tuple[Change, ...] = ()
    problems: tuple[str, ...] = ()

    def names(self, *, live: bool) -> tuple[str, ...]:
        """Return the keys that differ and are live, or those that wait for a restart."""
        return tuple(change.key.name for change in self.changes if change.key.is_live is live)

    @property
    def message(self) -> str:
        """Return the report in one sentence."""
        if self.problems:
            return f"configuration rejected, the old one stays in force: {self.problems[0]}"
        if not self.file:
            return "there is no configuration file to read again"
        if not self.changes:
            return "configuration unchanged"
        applied, waiting = self.names(live=True), self.names(live=False)
        parts = [f"applied: {', '.join(applied)}"] * bool(applied)
        parts += [f"restart to apply: {', '.join(waiting)}"] * bool(waiting)
        return f"configuration changed, {'; '.join(parts)}"

    def to_wire(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "file": self.file or None,
            "message": self.message,
            "problems": list(self.problems),
            "changes": [
                {"key": change.key.name, "before": change.before, "after": change.after, "live": change.key.is_live}
                for change in self.changes
            ],
        }


def compare(in_force: Settings, file: Path | None) -> ReloadReport:
    """Read ``file`` and say what a reload would do. A file that cannot be used is a report with problems."""
    if file is None:
        return ReloadReport(file="", settings=in_force)
    try:
        new = load_config(file)
    except ConfigError as error:
        return ReloadReport(file=str(file), settings=in_force, problems=tuple(map(str, error.problems)))
    try:
        keys = None if new.http.api_keys is None else load_keys(new.http.api_keys)
    except KeyFileError as error:
        return ReloadReport(file=str(file), settings=in_force, problems=(f"http.api_keys: {error}",))
    changes = changes_between(in_force, new)
    settings = in_force
    for change in changes:
        if change.key.is_live:
            settings = with_value(settings, change.key.path, value_of(new, change.key))
    return ReloadReport(file=str(file), settings=settings, keys=keys, changes=changes)


def changes_between(old: Settings, new: Settings, *, keys: Sequence[Key] = KEYS) -> tuple[Change, ...]:
    """Return the keys whose values differ, in the order of the file."""
    return tuple(
        Change(key=key, before=toml_value(before), after=toml_value(after))
        for key in keys
        if (before := value_of(old, key)) != (after := value_of(new, key))
    )
