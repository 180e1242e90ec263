"""Whether one engine is left to the next daemon, and what that one is told of it."""

import asyncio

from engines.outliving import Outliving
from engines.served.adopting import AdoptedServer
from engines.served.keeper_messages import Memo
from engines.served.server import EngineServer


class Leaving:
    """Of one engine.

    Args:
        outliving: How it may outlive this process, or the one that has; None: it ends with this process.
    """

    def __init__(self, outliving: Outliving | AdoptedServer | None) -> None:
        self.adopted = outliving if isinstance(outliving, AdoptedServer) else None
        self.outliving = outliving.outliving if isinstance(outliving, AdoptedServer) else outliving
        self._is_noted = False

    @property
    def is_due(self) -> bool:
        """Whether an engine that is closed now stays."""
        return self._is_noted and self.outliving is not None and self.outliving.is_leaving

    async def note(self, server: EngineServer, memo: Memo) -> None:
        """Note an engine that serves for the next daemon; only now may it outlive this one. Raises: OSError."""
        if self.outliving is None:
            return
        await asyncio.to_thread(self.outliving.note, server.keeper_pid)
        server.outlive(adopt_within_s=self.outliving.adopt_within_s, memo=memo)
        self._is_noted = True

    def forget(self) -> None:
        """It has ended."""
        if self.outliving is not None:
            self.outliving.forget()
