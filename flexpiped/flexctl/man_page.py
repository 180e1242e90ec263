"""Manual pages, made from the parsers that read the command lines: ``python -m flexpiped.flexctl.man_page flexctl``."""

import argparse
import sys
from collections.abc import Sequence

from flexpiped import __version__
from flexpiped.__main__ import daemon_parser
from flexpiped.flexctl.parser import flexctl_parser
from flexpiped.flexctl.parser_walk import options_of, subcommands_of

_FLEXCTL_FILES = (
    ("/run/flexpiped/admin.sock", "admin socket of the daemon that runs as a service; its group may use it"),
    ("$XDG_RUNTIME_DIR/flexpiped/admin.sock", "that of a daemon that a user runs"),
)
_DAEMON_FILES = (
    ("/etc/flexpiped/flexpiped.toml", "configuration of the service"),
    ("/var/lib/flexpiped", "its journal, profiles of layer times and measured links"),
    ("/var/cache/flexpiped", "models from the hub, compiled kernels"),
)


def flexctl_page() -> str:
    """Return flexctl(1)."""
    about = "ask a running flexpiped what it is doing, and have it change its layout while it serves"
    return _page(flexctl_parser(), section=1, about=about, files=_FLEXCTL_FILES, also="flexpiped(8)")


def flexpiped_page() -> str:
    """Return flexpiped(8)."""
    about = "serve a large language model as a pipeline whose layout changes while requests are running"
    return _page(daemon_parser(), section=8, about=about, files=_DAEMON_FILES, also="flexctl(1), systemctl(1)")


def _page(
    parser: argparse.ArgumentParser, *, section: int, about: str, files: Sequence[tuple[str, str]], also: str
) -> str:
    lines = [
        f'.TH {parser.prog.upper()} {section} "" "flexpiped {__version__}"',
        ".SH NAME",
        f"{parser.prog} \\- {_roff(about)}",
        ".SH SYNOPSIS",
        *_synopsis(parser),
        ".SH DESCRIPTION",
        _roff(parser.description or ""),
        ".SH OPTIONS",
        *_options(parser),
    ]
    commands = list(subcommands_of(parser))
    if commands:
        lines += [".SH COMMANDS"]
    for name, _, sub in commands:
        lines += _command(name, sub)
    lines += [".SH FILES", *(line for file, meaning in files for line in _entry(f"\\fI{_roff(file)}\\fR", meaning))]
    if parser.epilog:
        lines += [".SH NOTES", _roff(parser.epilog)]
    return "\n".join([*lines, ".SH SEE ALSO", _roff(also), ""])


def _command(name: str, parser: argparse.ArgumentParser) -> list[str]:
    """Return a command, or each part of it, with its options."""
    parts = list(subcommands_of(parser))
    if parts:
        return [line for part, _, sub in parts for line in _command(f"{name} {part}", sub)]
    shown = [action for action in options_of(parser) if action.dest not in ("help", "socket", "json")]
    lines = [f".SS {_roff(name)}", *_synopsis(parser), ".PP", _roff(parser.description or "")]
    return lines + [line for action in shown for line in _entry(_call(action), action.help or "")]


def _synopsis(parser: argparse.ArgumentParser) -> list[str]:
    formatter = argparse.HelpFormatter(prog=parser.prog, width=10_000)
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups, prefix="")
    prog, _, rest = formatter.format_help().strip().partition(parser.prog)
    return [f"{_roff(prog)}\\fB{_roff(parser.prog)}\\fR{_roff(rest)}"]


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return [line for action in options_of(parser) for line in _entry(_call(action), action.help or "")]


def _call(action: argparse.Action) -> str:
    """Return how an option is given."""
    value = action.metavar or (f"{{{','.join(map(str, action.choices))}}}" if action.choices else "")
    if not action.option_strings:
        return f"\\fI{_roff(str(value))}\\fR"
    names = ", ".join(f"\\fB{_roff(name)}\\fR" for name in action.option_strings)
    return f"{names} \\fI{_roff(str(value))}\\fR" if value and action.nargs != 0 else names


def _entry(term: str, meaning: str) -> list[str]:
    return [".TP", term, _roff(meaning)]


def _roff(text: str) -> str:
    """Return text that groff takes as it is: a hyphen of an option can be copied, no line is a request."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text


_PAGES = {"flexctl": flexctl_page, "flexpiped": flexpiped_page}


def main(arguments: Sequence[str]) -> None:
    """Write one page."""
    parser = argparse.ArgumentParser(prog="man_page")
    parser.add_argument("page", choices=tuple(_PAGES))
    sys.stdout.write(_PAGES[parser.parse_args(arguments).page]())


if __name__ == "__main__":
    main(sys.argv[1:])
