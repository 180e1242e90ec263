"""schemathesis from its command line, with every check, against a server."""

import asyncio
import os
import sys
from pathlib import Path

from tests.support.daemon import ROOT


async def run_schemathesis(url: str, *arguments: str, folder: Path) -> tuple[int, str]:
    """Run it in ``folder``; return its exit code and output."""
    process = await asyncio.create_subprocess_exec(
        *(Path(sys.executable).with_name("schemathesis"), "run", f"{url}/openapi.json"),
        *("--checks", "all", "--exclude-checks", "not_a_server_error,positive_data_acceptance"),
        *("--seed", "1", "--continue-on-failure", "--no-color", "--suppress-health-check", "all", *arguments),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SCHEMATHESIS_HOOKS": "tests.support.schemathesis_hooks"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode()


def cases_in(output: str) -> int:
    """Return how many it generated."""
    (line,) = (line for line in output.splitlines() if line.strip().endswith("generated") or " generated," in line)
    return int(line.split()[0].replace(",", ""))
