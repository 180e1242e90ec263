"""A vLLM that has NIXL: an environment of its own that borrows the packages of the tests' vLLM and adds one."""

import subprocess
from pathlib import Path

from tests.engines.install_vllm import VERSION as VLLM_VERSION
from tests.support.vllm import interpreter

VERSION = "1.5.1"
_PACKAGES = (f"nixl=={VERSION}", f"nixl-cu12=={VERSION}")  # runs without CUDA, too: UCX through host memory
_CHECK = "import vllm.version; from nixl._api import nixl_agent"
_PURELIB = "import sysconfig; print(sysconfig.get_path('purelib'))"
# Two vLLMs on one host, by what every Linux has.
TRANSPORTS = {"UCX_TLS": "self,tcp,posix,sysv,cma", "UCX_NET_DEVICES": "lo"}
ARGS = ("--kv-transfer-config", '{"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}')


def nixl_interpreter() -> str:
    """Return an interpreter that has vLLM and NIXL. The first call installs 70 MB."""
    vllm = interpreter()
    home = Path(vllm).parents[2] / f"nixl-{VERSION}-vllm-{VLLM_VERSION}"
    python = str(home / "bin" / "python")
    if not home.exists():
        _run(vllm, "-m", "venv", "--clear", str(home))
        Path(_run(python, "-c", _PURELIB), "vllm.pth").write_text(_run(vllm, "-c", _PURELIB))
        _run(python, "-m", "pip", "install", "--quiet", "--no-deps", *_PACKAGES)
    _run(python, "-c", _CHECK)  # what an interrupted call has left is found here
    return python


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
