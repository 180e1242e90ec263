"""Has the stages loaded again when a worker that carried one was lost."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

from engines.native import messages as m
from engines.native.stage_loading import StageLoading, StageNotLoaded

_ATTEMPTS: Final = 3


class Recovery:
    """That of one engine core, begun anew with each loss.

    Args:
        specs: Returns the roles of the layout in force, by worker.
        on_loaded: Called when every stage has its layers.
        fail: Ends the engine, with the reason.
    """

    def __init__(
        self,
        loading: StageLoading,
        *,
        specs: Callable[[], Mapping[int, m.StageSpec]],
        on_loaded: Callable[[], None],
        fail: Callable[[str], None],
    ) -> None:
        self._loading = loading
        self._specs = specs
        self._on_loaded = on_loaded
        self._fail = fail
        self._task: asyncio.Task[None] | None = None

    @property
    def is_under_way(self) -> bool:
        return self._task is not None

    def begin(self) -> None:
        """Load what is missing; one that is under way is given up."""
        if self._task is not None:
            self._task.cancel()
        self._task = asyncio.get_running_loop().create_task(self._load())

    async def _load(self) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                await self._loading.load(self._specs())  # workers that have their layers have nothing to do
                break
            except StageNotLoaded as error:
                if attempt == _ATTEMPTS:
                    self._fail(f"a stage cannot be loaded again: {error}")
                    return
        self._task = None
        self._on_loaded()
