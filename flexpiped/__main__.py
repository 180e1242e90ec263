"""``flexpiped``: the daemon. ``flexpiped --check-config`` only reads the configuration."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from flexpiped import __version__
from flexpiped.config_file import ConfigError, load_config
from flexpiped.keys import KeyFileError
from flexpiped.reload import load_files
from flexpiped.settings import Settings
from flexpiped.tls import TlsError

_WRONG_CONFIG = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 1 failed, 2 wrong configuration or usage."""
    options = daemon_parser().parse_args(arguments)
    try:
        return _run(options)
    except KeyboardInterrupt:  # it has hardly begun: later the daemon takes the signal itself
        return 0


def _run(options: argparse.Namespace) -> int:
    try:
        settings = Settings() if options.config is None else load_config(options.config)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return _WRONG_CONFIG
    try:
        load_files(settings)
    except (KeyFileError, TlsError) as error:
        print(error, file=sys.stderr)
        return _WRONG_CONFIG
    if options.check_config:
        print(f"{options.config or 'built-in defaults'}: ok")
        return 0
    from flexpiped.daemon import run  # loads the whole daemon

    return run(settings, config_file=options.config, environment=os.environ)


def daemon_parser() -> argparse.ArgumentParser:
    """Return the parser of ``flexpiped``; its manual page is made from it, too."""
    parser = argparse.ArgumentParser(
        prog="flexpiped",
        description="Serve a large language model as a pipeline whose layout changes while requests are running.",
        epilog="Without --config the demo model is served on CPU devices. etc/flexpiped.toml explains every key.",
    )
    parser.add_argument("--config", metavar="FILE", type=Path, help="configuration file (TOML)")
    parser.add_argument("--check-config", action="store_true", help="say whether the configuration is right, and exit")
    parser.add_argument("--version", action="version", version=f"flexpiped {__version__}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
