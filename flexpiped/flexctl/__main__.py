"""``flexctl``: ask a running daemon what it is doing, and have it change its layout.

Exit codes: 0 done, 1 failed, 2 usage, 3 daemon not reachable, 4 refused or infeasible.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from flexpiped.admin_socket import candidate_sockets
from flexpiped.flexctl import commands
from flexpiped.flexctl.client import AdminClient, CtlError, Refused
from flexpiped.flexctl.commands import Exit
from flexpiped.flexctl.parser import flexctl_parser
from flexpiped.flexctl.terminal import OutputLost, Screen, silence_closed_pipe, standard_output

_INTERRUPTED = 130  # as shells report a command ended by Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = flexctl_parser().parse_args(arguments, argparse.Namespace(socket=None, json=False))
    out = standard_output()
    screen = Screen(out, environment=os.environ)
    try:
        return int(options.run(AdminClient(_sockets(options.socket)), screen, options))
    except CtlError as error:
        _report(error, screen, as_json=options.json)
        return int(commands.exit_code_of(error))
    except BrokenPipeError:
        silence_closed_pipe(out)
        return int(Exit.DONE)
    except OutputLost as error:
        silence_closed_pipe(out)
        print(f"flexctl: {error}", file=sys.stderr)
        return int(Exit.FAILED)
    except KeyboardInterrupt:
        screen.write([])
        if options.run in (commands.rebalance, commands.scale):
            print("flexctl: the refactoring goes on; flexctl rebalance --cancel rolls it back", file=sys.stderr)
        return _INTERRUPTED


def _report(error: CtlError, screen: Screen, *, as_json: bool) -> None:
    if as_json:
        screen.write([json.dumps({"error": {"code": error.code, "message": str(error)}})])
        return
    screen.write([])
    prefix = "refused" if isinstance(error, Refused) else "flexctl"
    print(f"{prefix}: {error}", file=sys.stderr)


def _sockets(chosen: str | None) -> tuple[Path, ...]:
    return candidate_sockets(os.environ, uid=os.getuid()) if chosen is None else (Path(chosen),)


if __name__ == "__main__":
    sys.exit(main())
