"""Builds the environment in which the tests run real SGLang on the CPU, once, and prints its interpreter.

    python -m tests.engines.install_sglang [DIRECTORY]     by default ~/.cache/flexpiped/sglang-0.5.23

Only the interpreter goes to standard output. Without DIRECTORY, what FLEXPIPED_SGLANG_PYTHON names is taken as it is.
SGLang's CPU kernels are not needed: its torch_native attention computes with torch, and a module in place of
``sgl_kernel`` has what is imported all the same.
"""

import shutil
import sys
from pathlib import Path

from tests.engines.environment import Recipe, main

VERSION = "0.5.23"
KERNELS = Path(__file__).with_name("sgl_kernel.py")
CHECK = """
import os
os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
import sglang
import sglang.srt.entrypoints.http_server
import sglang.srt.managers.scheduler
print(sglang.__version__)
"""


def replace_kernels(packages: Path) -> None:
    """Put torch in the place of kernels that are built for GPUs."""
    (packages / "sgl_kernel").mkdir(exist_ok=True)
    shutil.copyfile(KERNELS, packages / "sgl_kernel" / "__init__.py")
    # The wheel of torchvision is for CUDA: what it registers at import does not exist on the CPU, and nothing needs it.
    (packages / "torchvision" / "_meta_registrations.py").write_text("")


SGLANG = Recipe(
    name="SGLang",
    package="sglang",
    version=VERSION,
    requirements=Path(__file__).with_name("sglang-requirements.txt"),
    check=CHECK,
    size="about two minutes and 2.6 GB",
    needed_bytes=4_500_000_000,
    pythons=((3, 11), (3, 13)),
    machines=("x86_64", "aarch64"),
    finish=replace_kernels,
    parts=(KERNELS,),
)

if __name__ == "__main__":
    sys.exit(main(SGLANG, sys.argv[1:]))
