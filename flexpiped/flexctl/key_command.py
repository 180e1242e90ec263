"""``flexctl key NAME``: a new API key, and what to add to the file of keys. Asks no daemon; nothing is kept of it."""

import hashlib
import json
import re
import secrets
from argparse import Namespace

from flexpiped.flexctl.client import AdminClient, BadUsage
from flexpiped.flexctl.commands import Exit
from flexpiped.flexctl.terminal import Screen
from flexpiped.keys import NAME_PATTERN

_KEY_PREFIX = "fp-"
_KEY_BYTES = 32


def key(_client: AdminClient, screen: Screen, options: Namespace) -> Exit:
    """Make a key with 256 random bits.

    Raises:
        BadUsage: The file of keys would be refused for such a name.
    """
    if re.search(NAME_PATTERN, options.name) is None:
        raise BadUsage("bad_name", f"a name of 1 to 64 letters, digits and _ . @ -, not {options.name!r}")
    made = _KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    entry = {
        "name": options.name,
        "sha256": hashlib.sha256(made.encode()).hexdigest(),
        "scopes": options.scope or ["infer"],
    }
    if options.json:
        screen.write([json.dumps({"key": made, "entry": entry})])
        return Exit.DONE
    screen.write(
        [
            f"# the key, shown only now: {made}",
            "# to be added to the file that http.api_keys names; then: flexctl reload",
            "[[keys]]",
            *(f"{name} = {json.dumps(value)}" for name, value in entry.items()),
        ]
    )
    return Exit.DONE
