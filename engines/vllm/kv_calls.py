"""Asking a vLLM for a KV cache, with every way in which it does not get there as one error."""

import asyncio
from collections.abc import Awaitable
from typing import Any

from engines.errors import KvTransferFailed
from engines.served.channel import CallFailed, ChannelClosed


async def transferred(answer: Awaitable[Any], *, deadline_s: float, late: str) -> Any:
    """Return an answer of vLLM's.

    Args:
        late: What happened where there is none in time, in words.

    Raises:
        KvTransferFailed: It did not answer, refused, or has died.
    """
    try:
        async with asyncio.timeout(deadline_s):
            return await answer
    except TimeoutError:
        raise KvTransferFailed(f"{late} within {deadline_s:g} s") from None
    except (CallFailed, ChannelClosed) as error:
        raise KvTransferFailed(str(error)) from error
