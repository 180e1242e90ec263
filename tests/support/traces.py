"""Where the Azure LLM inference traces of 2023 are, which the repository does not ship.

``FLEXPIPED_TRACE_DATA`` names the folder with ``azure_llm_2023_conv.csv`` and ``azure_llm_2023_code.csv``. Source:
AzurePublicDataset; Patel et al., Splitwise, ISCA 2024.
"""

import os
from pathlib import Path

TRACE_SKIPPED = "FLEXPIPED_TRACE_DATA names no folder with the Azure traces of 2023"
CONV, CODE = "azure_llm_2023_conv.csv", "azure_llm_2023_code.csv"


def trace_folder() -> Path | None:
    """Return the folder with the traces, None where there is none."""
    named = os.environ.get("FLEXPIPED_TRACE_DATA", "")
    folder = Path(named) if named else None
    return folder if folder is not None and (folder / CONV).exists() and (folder / CODE).exists() else None
