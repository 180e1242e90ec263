"""What a configuration file says now against what is in force: which keys differ, and what a reload does about each.

A live key is applied, another one waits for a restart, and a file with a mistake changes nothing.
"""

import ssl
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from flexpiped.config_file import ConfigError, load_config
from flexpiped.config_text import toml_value
from flexpiped.keys import KeyFileError, KeyRing, load_keys
from flexpiped.model_settings import PER_MODEL, entries
from flexpiped.settings import Settings
from flexpiped.settings_keys import KEYS, Key, value_of, with_value
from flexpiped.tls import TlsError, load_tls

_TLS: Final = frozenset({"http.tls_certificate", "http.tls_key"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One key whose value differs; values are as a file would have them. ``is_live``: a reload applies this change."""

    key: Key
    before: str
    after: str
    is_live: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ReloadReport:
    """``settings`` are those in force after a reload: the live keys are new, all others as they were.

    ``keys`` are the API keys, None where none is asked for; ``tls`` is the certificate, None where the file has none.
    """

    file: str
    settings: Settings
    keys: KeyRing | None = None
    tls: ssl.SSLContext | None = None
    changes: tuple[Change, ...] = ()
    problems: tuple[str, ...] = ()

    def names(self, *, live: bool) -> tuple[str, ...]:
        """Return the keys that differ and are live, or those that wait for a restart."""
        return tuple(change.key.name for change in self.changes if change.is_live is live)

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
                {"key": change.key.name, "before": change.before, "after": change.after, "live": change.is_live}
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
        keys, tls = load_files(new)
    except (KeyFileError, TlsError) as error:
        return ReloadReport(file=str(file), settings=in_force, problems=(str(error),))
    changes = changes_between(in_force, new)
    settings = in_force
    for change in changes:
        if change.is_live and change.key.path:
            settings = with_value(settings, change.key.path, value_of(new, change.key))
    settings = replace(settings, models=new.models)
    changes = (*changes, *changes_of_models(in_force, new))
    return ReloadReport(file=str(file), settings=settings, keys=keys, tls=tls, changes=changes)


def changes_of_models(old: Settings, new: Settings) -> tuple[Change, ...]:
    """Return the keys of models' tables that differ; a table that comes or goes differs in all of its keys."""
    before, after = entries(old), entries(new)
    return tuple(
        Change(
            key=Key(name=name, path=(), read=PER_MODEL[_key_in_table(name)].read, is_live=True),
            before=toml_value(before.get(name)),
            after=toml_value(after.get(name)),
            is_live=True,
        )
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    )


def _key_in_table(name: str) -> str:
    return next(key for key in sorted(PER_MODEL, key=len, reverse=True) if name.endswith(f".{key}"))


def load_files(settings: Settings) -> tuple[KeyRing | None, ssl.SSLContext | None]:
    """Read the files that the settings name: API keys and certificate, None where there is none.

    Raises:
        KeyFileError, TlsError: With the name of the setting.
    """
    http = settings.http
    try:
        keys = None if http.api_keys is None else load_keys(http.api_keys)
    except KeyFileError as error:
        raise KeyFileError(f"http.api_keys: {error}") from None
    try:
        return keys, load_tls(http.tls_certificate, http.tls_key)
    except TlsError as error:
        raise TlsError(f"http.tls_certificate: {error}") from None


def changes_between(old: Settings, new: Settings, *, keys: Sequence[Key] = KEYS) -> tuple[Change, ...]:
    """Return the keys whose values differ, in the order of the file."""
    begins_or_ends_tls = (old.http.tls_certificate is None) != (new.http.tls_certificate is None)
    return tuple(
        Change(
            key=key,
            before=toml_value(before),
            after=toml_value(after),
            is_live=key.is_live and not (begins_or_ends_tls and key.name in _TLS),
        )
        for key in keys
        if (before := value_of(old, key)) != (after := value_of(new, key))
    )
