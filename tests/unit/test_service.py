"""Everything that serves one model, with the fake engine: what is reloaded while it starts."""

from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from flexpiped.admin_config import Configuration
from flexpiped.reload import ReloadReport
from flexpiped.service import Service
from flexpiped.settings import EngineKind, HttpSettings, JournalSettings, Settings, WorkloadSettings

pytestmark = pytest.mark.real_loop


async def test_what_is_reloaded_before_there_is_an_engine_is_not_lost(tmp_path: Path) -> None:
    """The reload comes when the layout is about to be planned."""
    settings = Settings(
        engine=EngineKind.FAKE, http=HttpSettings(port=0), journal=JournalSettings(file=tmp_path / "journal.db")
    )
    reloaded = replace(settings, workload=WorkloadSettings(rate_per_s=7.0))

    def reload_early(message: str) -> None:
        if message == "planning the layout":
            service.apply(reloaded, keys=None, tls=None)

    report = ReloadReport(file="", settings=settings)
    service = Service(
        settings,
        admin_socket=tmp_path / "admin.sock",
        on_progress=reload_early,
        configuration=Configuration(settings=lambda: settings, compare=lambda: report, reload=lambda: report),
    )
    async with AsyncExitStack() as stack:
        await service.start(stack)
        assert (await service.plan(2))["workload"]["rate_per_s"] == 7.0
