"""Which interpreter runs the native engine and the text process."""

import importlib.util
import sys

from engines.errors import EngineStartFailed
from flexpiped.settings import Settings


def engine_python(settings: Settings, *, own_has_transformers: bool | None = None) -> str:
    """Return the interpreter that has what the native engine and the text process need.

    1. The one that the configuration names for the native engine. 2. The daemon's own, if it has transformers: as a
    package it has not. 3. That of vLLM or SGLang, which have them, too.

    Args:
        own_has_transformers: Whether the daemon's own has them; None looks.

    Raises:
        EngineStartFailed: None is known.
    """
    if settings.engines.native.python is not None:  # 1
        return str(settings.engines.native.python)
    if own_has_transformers is None:
        own_has_transformers = importlib.util.find_spec("transformers") is not None  # not imported
    if own_has_transformers:  # 2
        return sys.executable
    for other in (settings.engines.vllm.python, settings.engines.sglang.python):  # 3
        if other is not None:
            return str(other)
    raise EngineStartFailed(
        f"torch and transformers are not installed for {sys.executable}: set python under [engines.native] to an "
        "interpreter that has them (pip install torch transformers tokenizers msgspec numpy)"
    )
