"""Where the plugins of ours are that run inside an engine. Pure."""

import os
from pathlib import Path
from typing import Final

SHARED: Final = Path(__file__).with_name("plugin")


def plugin_path(own: Path) -> str:
    """Return the PYTHONPATH of an engine: the folder of its plugin, and what the plugins share."""
    return os.pathsep.join([str(own), str(SHARED)])
