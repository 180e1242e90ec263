"""Starting real SGLang for tests: where its interpreter is, and options for a checkpoint that vLLM takes, too."""

import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from engines.served.logs import LogLine
from engines.sglang.adapter import SglangEngine
from engines.sglang.options import SglangOptions
from planner.layout import Pipeline
from tests.engines.install_sglang import SGLANG
from tests.engines.interpreter import ensure_there
from tests.support.vllm import devices, graph_of


def interpreter() -> str:
    """Return the interpreter that has SGLang, or skip."""
    return ensure_there(SGLANG)


def posing_as(version: str, folder: Path) -> str:
    """Make an environment with the same SGLang that says it is another version; return its interpreter.

    All but the file with the version is links.
    """
    python = interpreter()
    subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True)
    [ours] = folder.glob("lib/python*/site-packages")
    [theirs] = Path(python).parents[1].glob("lib/python*/site-packages")
    (ours / "sglang").mkdir()
    for each in (theirs / "sglang").iterdir():
        if each.name not in ("_version.py", "__pycache__"):
            (ours / "sglang" / each.name).symlink_to(each)
    parts = tuple(int(part) for part in version.split("."))
    words = f"__version__ = version = '{version}'\n__version_tuple__ = version_tuple = {parts}\n"
    (ours / "sglang" / "_version.py").write_text(words)
    (ours / "theirs.pth").write_text(f"{theirs}\n")
    return str(folder / "bin" / "python")


def options_for(directory: Path, *, ranks: int, **overrides: object) -> SglangOptions:
    """Return options that suit a small checkpoint: fp32, so that output is exact, and KV blocks compared at commit."""
    graph = graph_of(directory)
    values: dict[str, object] = {
        "python": interpreter(),
        "model_directory": str(directory),
        "served_model_name": directory.name,
        "device_ids": devices(ranks),
        "device_memory_bytes": 1 << 30,
        "num_decoders": graph.num_decoders,
        "kv_bytes_per_token": graph.decoders[0].kv_bytes_per_token,
        "dtype": "float32",
        "kv_cache_bytes": 32 << 20,
        "verify_checksums": True,
        "max_positions": graph.max_context_tokens,
        "commit_deadline_s": 20.0,  # every slot that the radix cache holds is compared
    }
    return SglangOptions(**(values | overrides))  # type: ignore[arg-type]


def _ignore(_line: LogLine) -> None:
    pass


@asynccontextmanager
async def running(
    directory: Path,
    pipeline: Pipeline,
    *,
    ranks: int,
    on_log: Callable[[LogLine], None] = _ignore,
    **overrides: object,
) -> AsyncIterator[SglangEngine]:
    """Start an engine and close it on the way out."""
    options = options_for(directory, ranks=ranks, **overrides)
    engine = SglangEngine(options, pipeline, graph=graph_of(directory), on_log=on_log)
    await engine.start(on_progress=lambda _message: None)
    try:
        yield engine
    finally:
        await engine.close()
