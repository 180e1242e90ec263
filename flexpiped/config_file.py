"""Reading a configuration file. Every problem is reported at once, each with file, line, key and what is allowed.

ConfigError   the file cannot be used; ``problems`` has every reason
"""

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from flexpiped.config_values import Reader, WrongValue, shown
from flexpiped.model_settings import PER_MODEL, contradiction, dotted
from flexpiped.settings import Settings
from flexpiped.settings_keys import KEYS, Key, with_value

_KEYS_BY_NAME: Final[Mapping[str, Key]] = {key.name: key for key in KEYS}
_TABLES: Final = frozenset(name.rpartition(".")[0] for name in _KEYS_BY_NAME) - {""} | {"engines"}
_TABLE_LINE: Final = re.compile(r"\s*\[{1,2}\s*([^\[\]]+?)\s*\]")
_KEY_LINE: Final = re.compile(r"\s*([A-Za-z0-9_\-.\"' ]+?)\s*=")
_TOML_PLACE: Final = re.compile(r"^(.*) \(at (?:line (\d+), column \d+|end of document)\)$", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One reason why a configuration file cannot be used."""

    file: str
    line: int | None
    text: str

    def __str__(self) -> str:
        return f"{self.file}: {self.text}" if self.line is None else f"{self.file}:{self.line}: {self.text}"


class ConfigError(Exception):
    """The configuration cannot be used."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


def load_config(path: Path) -> Settings:
    """Read the settings from a file. A model that is a path is taken relative to the file.

    Raises:
        ConfigError: The file is not readable, not TOML, or has unknown or wrong keys.
    """
    try:
        document = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError((Problem(file=str(path), line=None, text=f"cannot be read: {reason}"),)) from None
    settings = parse_config(document, file=str(path))
    return replace(
        settings,
        model=_from_folder(settings.model, path.parent),
        tokenizer=None if settings.tokenizer is None else _from_folder(settings.tokenizer, path.parent),
        models={name: _with_places(table, path.parent) for name, table in settings.models.items()},
    )


def _with_places(table: Mapping[str, object], folder: Path) -> dict[str, object]:
    """Return a model's table with its paths taken relative to the file."""
    return {
        key: _from_folder(value, folder) if key in ("model", "tokenizer") and isinstance(value, str) else value
        for key, value in table.items()
    }


def parse_config(document: str, *, file: str) -> Settings:
    """Return the settings that a TOML document describes; ``file`` is named in errors.

    Raises:
        ConfigError: See ``load_config``.
    """
    try:
        tree = tomllib.loads(document)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError((_syntax_problem(error, document=document, file=file),)) from None
    lines = _lines_of(document)
    settings = Settings()
    problems: list[Problem] = []
    models = tree.pop("models", {})
    for name, value in _leaves(tree):
        try:
            settings = _with_key(settings, name, value)
        except WrongValue as wrong:
            problems.append(Problem(file=file, line=_line(lines, name), text=str(wrong)))
    tables, wrongs = _models(models)
    settings = replace(settings, models=tables)
    wrongs += _contradictions(settings)
    problems += [Problem(file=file, line=_line(lines, _plain(name)), text=text) for name, text in wrongs]
    if problems:
        raise ConfigError(tuple(sorted(problems, key=lambda problem: problem.line or 0)))
    return settings


def _models(tables: object) -> tuple[dict[str, dict[str, object]], list[tuple[str, str]]]:
    """Return the keys of each model's table, and what is wrong with which of them."""
    found: dict[str, dict[str, object]] = {}
    wrongs: list[tuple[str, str]] = []
    if not isinstance(tables, dict):
        return found, [("models", f"models must be tables, one for each: [models.NAME], not {shown(tables)}")]
    for name, table in tables.items():
        if not isinstance(table, dict):
            wrongs.append((dotted("models", name), f"{dotted('models', name)} must be a table: [models.{name}]"))
            continue
        found[name] = {}
        for key, value in _leaves(table):
            full = f"{dotted('models', name)}.{key}"
            try:
                found[name][key] = _model_key(key)(value)
            except WrongValue as wrong:
                wrongs.append((full, f"{full} {wrong}"))
    return found, wrongs


def _model_key(name: str) -> Reader[object]:
    """Return what reads a key of a model's table."""
    if name in PER_MODEL:
        return PER_MODEL[name].read
    if name in _KEYS_BY_NAME:
        raise WrongValue("is of the whole daemon, not of one model: it stands at the top of the file")
    near = difflib.get_close_matches(name, PER_MODEL, n=1, cutoff=0.75)
    raise WrongValue("is unknown; " + (f'did you mean "{near[0]}"?' if near else "etc/flexpiped.toml lists every key"))


def _contradictions(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield keys whose values cannot be together, with what is wrong."""
    http = settings.http
    if http.tls_key is not None and http.tls_certificate is None:
        yield "http.tls_key", "http.tls_key needs http.tls_certificate"
    if http.ingress_processes > 1 and settings.tracing.otlp_endpoint is not None:
        because = "requests leave traces in the daemon only"
        yield "http.ingress_processes", f"http.ingress_processes must be 1 with tracing.otlp_endpoint: {because}"
    auto = settings.auto
    if auto.target_load > auto.load_limit:
        yield (
            "auto.target_load",
            f"auto.target_load must be at most auto.load_limit ({auto.load_limit:g}), not {auto.target_load:g}",
        )
    yield from contradiction(settings)


def _with_key(settings: Settings, name: str, value: object) -> Settings:
    """Return ``settings`` with one key of the file applied. ``WrongValue`` has a whole sentence."""
    if name in _TABLES:
        raise WrongValue(f'"{name}" is a table: write [{name}] and its keys below')
    key = _KEYS_BY_NAME.get(name)
    if key is None:
        raise WrongValue(_unknown_table(name) if isinstance(value, dict) else _unknown_key(name))
    try:
        return with_value(settings, key.path, key.read(value))
    except WrongValue as wrong:
        raise WrongValue(f"{name} {wrong}") from None


def _unknown_table(name: str) -> str:
    near = difflib.get_close_matches(name, _TABLES, n=1, cutoff=0.6)
    return f'unknown table "{name}"; ' + (f'did you mean "{near[0]}"?' if near else "etc/flexpiped.toml lists all")


def _unknown_key(name: str) -> str:
    """Name the nearest valid key: the same table first, then any key by its last word."""
    near = difflib.get_close_matches(name, _KEYS_BY_NAME, n=1, cutoff=0.75)
    if not near:
        last = name.rpartition(".")[2]
        words = {key.rpartition(".")[2]: key for key in reversed(list(_KEYS_BY_NAME))}
        near = [words[word] for word in difflib.get_close_matches(last, words, n=1, cutoff=0.75)]
    hint = f'did you mean "{near[0]}"?' if near else "etc/flexpiped.toml lists every key"
    return f'unknown key "{name}"; {hint}'


def _leaves(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield every dotted name with its value. A table that is not known is a value, unless it holds only tables."""
    for name, value in tree.items():
        full = prefix + name
        if isinstance(value, dict) and (full in _TABLES or _holds_only_tables(value)):
            yield from _leaves(value, f"{full}.")
        else:
            yield full, value


def _holds_only_tables(table: Mapping[str, object]) -> bool:
    return bool(table) and all(isinstance(value, dict) for value in table.values())


def _lines_of(document: str) -> Mapping[str, int]:
    """Return the line of every key and table header. A line scan is enough: no text in an array is a key's name."""
    lines: dict[str, int] = {}
    table = ""
    for number, line in enumerate(document.splitlines(), start=1):
        if header := _TABLE_LINE.match(line):
            table = _plain(header[1])
            lines.setdefault(table, number)
        elif key := _KEY_LINE.match(line):
            lines.setdefault(f"{table}.{_plain(key[1])}" if table else _plain(key[1]), number)
    return lines


def _plain(name: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in name.split("."))


def _line(lines: Mapping[str, int], name: str) -> int | None:
    """Return the line of ``name``, or of the table that holds it inline."""
    while name and name not in lines:
        name = name.rpartition(".")[0]
    return lines.get(name)


def _syntax_problem(error: tomllib.TOMLDecodeError, *, document: str, file: str) -> Problem:
    found = _TOML_PLACE.match(str(error))
    if found is None:
        return Problem(file=file, line=None, text=f"not TOML: {error}")
    line = int(found[2]) if found[2] else max(1, len(document.splitlines()))
    return Problem(file=file, line=line, text=f"not TOML: {found[1][0].lower()}{found[1][1:]}")


def _from_folder(model: str, folder: Path) -> str:
    """Return ``model`` as an absolute path if there is such a folder beside the configuration file, else as it is."""
    beside = folder / Path(model).expanduser()
    return str(beside.resolve()) if beside.is_dir() else model
