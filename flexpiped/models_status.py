"""The status of all models as one answer: that of the first, and beside it those of all where there are several."""

from collections.abc import Mapping
from typing import Any

import flexpiped
from flexpiped.model_entry import Entry
from flexpiped.model_set import ModelSet


class ModelsStatus:
    """A ``StatusSource``. Readers that know one model only see the first."""

    def __init__(self, models: ModelSet, *, api_url: str) -> None:
        self._models = models
        self._api_url = api_url

    async def status(self) -> dict[str, Any]:
        """Return it as JSON values; ``models`` only where they are told apart by names."""
        all_of_them = [await self._of(each) for each in self._models.entries.values()]
        first = all_of_them[0] if all_of_them else _absent(None, self._api_url)
        return first | {"models": all_of_them} if self._models.are_named else first

    async def _of(self, entry: Entry) -> dict[str, Any]:
        if entry.service is None:
            return _absent(entry, self._api_url)
        return await entry.service.status.status()


def _absent(entry: Entry | None, api_url: str) -> dict[str, Any]:
    """Return the status of a model that does not run."""
    model: Mapping[str, str] = {"name": "", "path": ""}
    state, reason, engine = "stopped", "there is no model", ""
    if entry is not None:
        model = {"name": entry.name, "path": entry.spec.settings.model}
        state, reason = entry.health.state.value, entry.health.reason
        engine = entry.spec.settings.engine.value
    return {
        "version": flexpiped.__version__,
        "model": model,
        "engine": engine,
        "api_url": api_url,
        "uptime_s": 0.0,
        "state": state,
        "reason": reason,
        "ttft": None,
        "tpot": None,
        "arrivals": [],
        "under_way": None,
        "auto": None,
        "last_handover": None,
        "epoch": None,
        "stages": [],
        "engine_counters": None,
        "tokens_per_s": None,
        "replicas": [],
    }
