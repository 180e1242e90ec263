"""An interpreter that has a fake vLLM: a script that stands where ``engines.vllm.python`` would be."""

import sys
from pathlib import Path

from engines.outliving import Outliving
from engines.served.adopting import AdoptedServer
from engines.vllm.adapter import VllmEngine
from engines.vllm.options import VllmOptions
from planner.layout import Pipeline, Stage

ONE = Pipeline(stages=(Stage(device_ids=("cpu:0",), first_decoder=0, end_decoder=8),))
_SERVER = Path(__file__).with_name("fake_vllm_server.py")
_SCRIPT = f"""#!/bin/sh
case "$1 $2" in
"-I -c") echo vllm {{version}} ;;
"-I -S") exec {sys.executable} "$@" ;;
*) exec {sys.executable} -S {_SERVER} "$@" ;;
esac
"""


def fake_interpreter(directory: Path, *, version: str = "0.32.0") -> str:
    """Write the script and return its path."""
    script = directory / "python"
    script.write_text(_SCRIPT.format(version=version))
    script.chmod(0o755)
    return str(script)


def fake_engine(
    directory: Path, *, behaviour: str = "", outliving: Outliving | AdoptedServer | None = None, **options: object
) -> VllmEngine:
    """Return an engine whose vLLM is the fake one; ``behaviour`` is what is wrong with it."""
    values: dict[str, object] = {
        "python": fake_interpreter(directory),
        "model_directory": str(directory),
        "device_ids": ("cpu:0",),
        "num_decoders": 8,
        "kv_bytes_per_token": 512,
        "env": {"FAKE_VLLM": behaviour},
    }
    return VllmEngine(VllmOptions(**(values | options)), ONE, outliving=outliving)  # type: ignore[arg-type]
