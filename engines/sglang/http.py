"""SGLang's HTTP server on its private socket: requests in, tokens out."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
from aiohttp.http_exceptions import LineTooLong

_LINE_LIMIT: Final = 16 << 20
_POLL_S: Final = 0.1
_decode: Final = msgspec.json.Decoder().decode
_BASE: Final = "http://sglang"
_BAD_REQUEST: Final = 400
_SERVER_ERROR: Final = 500
_NOT_THE_REQUEST: Final = (401, 403, 429)


class HttpFailed(Exception):
    """SGLang's server did not answer as it should."""


class Refused(Exception):
    """SGLang does not run this request; the message is its own."""


class RequestFailed(Exception):
    """SGLang runs on, but this request of it failed, or its answer is not understood."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One piece of an answer. ``finish`` is SGLang's word; ``status`` and ``reason`` say why it aborted."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str
    status: int
    reason: str


class SglangHttp:
    """One client of one server. ``key`` is for requests, ``admin_key`` for what only the daemon may do."""

    def __init__(self, socket: Path, *, key: str, admin_key: str) -> None:
        self._key = key
        self._admin_key = admin_key
        self._session = aiohttp.ClientSession(
            # A connection for each request: SGLang closes idle ones, at worst when one is used again, which would look
            # like its death.
            connector=aiohttp.UnixConnector(path=str(socket), limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None),
            read_bufsize=_LINE_LIMIT,
        )

    async def until_ready(self) -> None:
        """Return when the server answers. Never ``/health``: that fails while the engine holds still for a move."""
        while True:
            with suppress(aiohttp.ClientError, OSError):
                async with self._session.get(f"{_BASE}/model_info", headers=_bearer(self._key)) as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(_POLL_S)

    async def generate(self, body: dict[str, Any]) -> AsyncIterator[Event]:
        """Run a request. Closing the iterator aborts it.

        Raises:
            Refused, RequestFailed, HttpFailed
        """
        try:
            async with self._session.post(f"{_BASE}/generate", json=body, headers=_bearer(self._key)) as answer:
                if answer.status != 200:
                    raise _failure(answer.status, _error_of(await answer.read()))
                async for line in answer.content:
                    if line.startswith(b"data: {"):
                        yield _understood(line[6:])
        except (aiohttp.ClientError, OSError) as error:
            raise HttpFailed(str(error) or type(error).__name__) from error
        except LineTooLong as error:  # a parser's error, no ClientError
            raise RequestFailed(f"SGLang's answer has a line of more than {2 * _LINE_LIMIT} bytes") from error

    async def abort(self, rid: str) -> None:
        """End a request, wherever it is. An unknown one is fine; a dead server has none."""
        await self._post("abort_request", self._admin_key, {"rid": rid})

    async def abort_all(self) -> None:
        """End all requests."""
        await self._post("abort_request", self._admin_key, {"rid": "", "abort_all": True})

    async def freeze_garbage(self) -> None:
        """Have the garbage collectors leave alone what stays: collecting it would hold steps up."""
        await self._post("freeze_gc", self._admin_key, None)

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def _post(self, route: str, key: str, body: dict[str, Any] | None) -> None:
        with suppress(aiohttp.ClientError, OSError):
            async with self._session.post(f"{_BASE}/{route}", json=body, headers=_bearer(key)):
                pass


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def _failure(status: int, reason: str) -> Refused | RequestFailed:
    """Return whose fault it is, by the status: the request's, or SGLang's (the key is the daemon's, too)."""
    if _BAD_REQUEST <= status < _SERVER_ERROR and status not in _NOT_THE_REQUEST:
        return Refused(reason)
    return RequestFailed(f"SGLang answered with status {status}: {reason}")


def _understood(data: bytes) -> Event:
    try:
        return _event_of(_decode(data))
    except (msgspec.DecodeError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise RequestFailed(f"SGLang's answer is not understood: {type(error).__name__}: {error}") from error


def _event_of(message: dict[str, Any]) -> Event:
    if error := message.get("error"):
        code = error.get("code") if isinstance(error, dict) else None
        raise _failure(code if isinstance(code, int) else _BAD_REQUEST, _text_of(error))
    meta = message["meta_info"]
    finish = meta.get("finish_reason") or {}
    return Event(
        token_ids=tuple(message.get("output_ids") or ()),
        logprobs=tuple(entry[0] for entry in meta.get("output_token_logprobs") or ()),
        finish=finish.get("type", "unknown") if finish else "",
        status=int(finish.get("status_code") or 0),
        reason=finish.get("message") or "",
    )


def _error_of(content: bytes) -> str:
    try:
        return _text_of(_decode(content)["error"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return content.decode(errors="replace")[:500]


def _text_of(error: Any) -> str:
    return str(error["message"]) if isinstance(error, dict) and "message" in error else str(error)
