"""Answers of two servers to one request, compared member by member. What is new at each request is compared by type."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp

_NEW_EACH_TIME = frozenset({"id", "created"})
_NEAR = 2e-3  # of log-probabilities: two engines add in different orders
_MISSING = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request. ``raw`` is sent instead of ``body`` where it is given. ``drawn``: texts depend on chance."""

    path: str
    body: dict[str, Any] | None = None
    method: str = "POST"
    raw: bytes | None = None
    drawn: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """``value``: the JSON of a whole answer, or what ``joined`` makes of a stream's events."""

    status: int
    content_type: str
    value: Any


async def answer_of(session: aiohttp.ClientSession, asked: Asked) -> Answered:
    """Ask, with the session's base URL."""
    data = asked.raw if asked.raw is not None else None if asked.body is None else json.dumps(asked.body).encode()
    headers = {"Content-Type": "application/json"}
    async with session.request(asked.method, asked.path, data=data, headers=headers) as response:
        text = await response.text()
        streamed = response.content_type == "text/event-stream"
        return Answered(
            status=response.status,
            content_type=response.content_type,
            value=joined(text) if streamed else json.loads(text),
        )


def joined(text: str) -> dict[str, Any]:
    """Return a stream as one value: how it ends, the members that its chunks have, and each choice put together."""
    *events, rest = text.split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events if event != "data: [DONE]"]
    found: dict[str, Any] = {"ends": events[-1], "rest": rest, "choices": {}}
    for chunk in chunks:
        found |= {name: value for name, value in chunk.items() if name != "choices"}
        for choice in chunk.get("choices", ()):
            _join(found["choices"].setdefault(str(choice["index"]), {}), choice)
    found["chunks_without_choices"] = sum(not chunk.get("choices") for chunk in chunks)
    return found


def _join(whole: dict[str, Any], part: dict[str, Any]) -> None:
    """Add texts and lists, and let other values that are something take the place of what was before."""
    for name, value in part.items():
        before = whole.get(name)
        if name == "tool_calls" and isinstance(value, list):
            calls = whole[name] = before if isinstance(before, dict) else {}
            for call in value:
                _join(calls.setdefault(str(call["index"]), {}), call)
        elif isinstance(value, dict):
            whole[name] = before if isinstance(before, dict) else {}
            _join(whole[name], value)
        elif (isinstance(value, str) and isinstance(before, str) and name in ("text", "content", "arguments")) or (
            isinstance(value, list) and isinstance(before, list)
        ):
            whole[name] = before + value
        elif before is None:
            whole[name] = value


def differences(theirs: Answered, ours: Answered, *, drawn: bool) -> Iterator[str]:
    """Yield where ``ours`` differs: "PATH: THEIRS -> OURS". The words of errors may differ."""
    if theirs.status != ours.status:
        yield f"status: {theirs.status} -> {ours.status}"
        return
    if theirs.content_type != ours.content_type:
        yield f"content type: {theirs.content_type} -> {ours.content_type}"
        return
    yield from _between("", theirs.value, ours.value, drawn=drawn)


def _between(path: str, theirs: Any, ours: Any, *, drawn: bool) -> Iterator[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in sorted(theirs.keys() | ours.keys()):
            where = f"{path}.{name}" if path else name
            yield from _member(where, name, theirs.get(name, _MISSING), ours.get(name, _MISSING), drawn=drawn)
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        for one, other in zip(theirs, ours, strict=True):
            yield from _between(f"{path}.#", one, other, drawn=drawn)
    elif not _are_alike(theirs, ours, drawn=drawn):
        yield f"{path}: {_shown(theirs)} -> {_shown(ours)}"


def _member(path: str, name: str, theirs: Any, ours: Any, *, drawn: bool) -> Iterator[str]:
    if theirs is _MISSING or ours is _MISSING:
        yield f"{path}: {_shown(theirs)} -> {_shown(ours)}"
    elif name in _NEW_EACH_TIME or path == "error.message":
        if type(theirs) is not type(ours):
            yield f"{path}: {_shown(theirs)} -> {_shown(ours)}"
    else:
        yield from _between(path, theirs, ours, drawn=drawn)


def _are_alike(theirs: Any, ours: Any, *, drawn: bool) -> bool:
    if isinstance(theirs, float) and isinstance(ours, float | int):
        return drawn or abs(theirs - ours) <= _NEAR
    if drawn and type(theirs) is type(ours) and isinstance(theirs, str):
        return True
    return type(theirs) is type(ours) and bool(theirs == ours)


def _shown(value: Any) -> str:
    return "nothing" if value is _MISSING else json.dumps(value, ensure_ascii=False)[:300]
