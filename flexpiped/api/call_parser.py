"""Calls of tools in the text of an output, read as it comes: what is content, and what is new of which call.

Whatever way the text is cut, the content and the calls are the same. Arguments go on as the model writes them; what
looks like a call and turns out to be none is content.
"""

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Final, assert_never

from engines.text.stops import longest_beginning
from flexpiped.api.call_object import ObjectOfCall
from flexpiped.api.tagged_call import FUNCTION, FUNCTION_BEGUN, TaggedCall
from flexpiped.api.tool_syntax import ToolSyntax

_NAME: Final = re.compile(r"[a-zA-Z0-9_.:/-]{0,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CallDelta:
    """What is new of one call. ``call_id`` and ``name`` come with the first of each call, and with that only."""

    index: int
    arguments: str
    call_id: str = ""
    name: str = ""


def joined(deltas: Iterable[CallDelta]) -> list[CallDelta]:
    """Return one for each call."""
    calls: dict[int, CallDelta] = {}
    for each in deltas:
        known = calls.get(each.index)
        calls[each.index] = each if known is None else replace(known, arguments=known.arguments + each.arguments)
    return list(calls.values())


def new_call_id(syntax: ToolSyntax) -> str:
    """Return an id of a kind that the model's chat template takes."""
    return secrets.token_hex(8)[: syntax.call_id_length] if syntax.call_id_length else f"call_{secrets.token_hex(12)}"


class _State(Enum):
    TEXT = "text"  # until calls open
    BETWEEN = "between"  # calls are open, and none has begun
    CALL = "call"
    AFTER = "after"  # a call that has a closing to come
    PLAIN = "plain"  # nothing but text


class CallParser:
    """Reads one output.

    Args:
        schemas: Of the arguments of each tool, for a syntax that does not say what is a string.

    TEXT --opening--> BETWEEN --{--> CALL --}--> AFTER --closing--> TEXT    (where calls have no closing: TEXT, or
      |                  |                                                   BETWEEN where one opening is of all)
      |                  +--anything else--> TEXT
      +--text where a bare call could have been--> PLAIN
    """

    def __init__(
        self,
        syntax: ToolSyntax,
        *,
        schemas: Mapping[str, Mapping[str, Any]] | None = None,
        new_id: Callable[[ToolSyntax], str] = new_call_id,
    ) -> None:
        self._syntax = syntax
        self._schemas = schemas or {}
        self._new_id = new_id
        self._state = _State.TEXT
        self._rest = ""  # not read yet
        self._spaces = ""  # after content; they are none of it when a call follows
        self._owed = ""  # the opening, content again if no call comes of it
        self._call: ObjectOfCall | TaggedCall | None = None
        self._has_said = False
        self._said: list[str] = []
        self._deltas: list[CallDelta] = []
        self.count = 0  # of calls that have begun

    def feed(self, text: str, *, final: bool) -> tuple[str, tuple[CallDelta, ...]]:
        """Take text in order, with ``final`` the last; return what of it is content, and what is new of calls."""
        self._rest += text
        while self._step(final=final):
            pass
        if final:
            self._finish()
        said, deltas = "".join(self._said), tuple(joined(self._deltas))
        self._said, self._deltas = [], []
        return said, deltas

    def _step(self, *, final: bool) -> bool:
        """Go on by one state; False: more text is needed."""
        match self._state:
            case _State.TEXT:
                is_first = self._syntax.is_bare and not self._has_said and not self.count
                return self._begin(final=final) if is_first else self._read_text(final=final)
            case _State.BETWEEN:
                return self._read_between()
            case _State.CALL:
                return self._read_call()
            case _State.AFTER:
                return self._read_after(final=final)
            case _State.PLAIN:
                self._say(self._rest)
                self._rest = ""
                return False
            case _:
                assert_never(self._state)

    def _begin(self, *, final: bool) -> bool:
        """Tell whether the whole output is calls or text."""
        begun, opening = self._rest.lstrip(), self._syntax.opening
        if begun.startswith(opening):
            self._open(begun, behind=len(opening))
        elif begun.startswith("{"):
            self._owed, self._rest = self._rest[: -len(begun)], begun
            self._state = _State.BETWEEN
        elif not final and opening.startswith(begun):
            return False
        else:
            self._state = _State.PLAIN
        return True

    def _read_text(self, *, final: bool) -> bool:
        opening = self._syntax.opening
        at = self._rest.find(opening)
        if at >= 0:
            self._say(self._rest[:at])
            self._open(self._rest, behind=at + len(opening))
            return True
        end = len(self._rest) - (0 if final else longest_beginning(self._rest, opening))
        self._say(self._rest[:end])
        self._rest = self._rest[end:]
        return False

    def _open(self, text: str, *, behind: int) -> None:
        self._owed, self._rest = self._syntax.opening, text[behind:]
        self._state = _State.BETWEEN

    def _read_between(self) -> bool:
        if self._syntax.separator:
            return self._read_name()
        if self._syntax.is_tagged:
            return self._read_tag()
        begun = self._rest.lstrip(" \t\r\n" + self._syntax.between)
        skipped = self._rest[: len(self._rest) - len(begun)]
        self._owed += skipped if self._owed else ""
        self._rest = begun
        if not begun:
            return False
        if begun[0] == "{":
            self._call, self._state = ObjectOfCall(), _State.CALL
        elif self._syntax.end and begun[0] == self._syntax.end and not self._owed:
            self._rest, self._state = begun[1:], _State.TEXT
        else:
            self._no_call()
        return True

    def _read_name(self) -> bool:
        """Read a name, what separates it from the arguments, and to where they begin."""
        begun, separator = self._rest.lstrip(), self._syntax.separator
        found = _NAME.match(begun)
        name = "" if found is None else found.group()
        behind = begun[len(name) :]
        arguments = behind.removeprefix(separator).lstrip() if behind.startswith(separator) else None
        if not arguments and (arguments is not None or separator.startswith(behind)):
            return False
        if not name or not arguments or arguments[0] != "{":
            self._no_call()
            return True
        self._call, self._rest, self._state = ObjectOfCall(name=name), arguments, _State.CALL
        return True

    def _read_tag(self) -> bool:
        """Read the tag of a function."""
        begun = self._rest.lstrip()
        if (tag := FUNCTION.match(begun)) is not None:
            self._rest, self._state = begun[tag.end() :], _State.CALL
            self._call = TaggedCall(name=tag[1], schema=self._schemas.get(tag[1], {}))
            return True
        if FUNCTION_BEGUN.fullmatch(begun) or "<function=".startswith(begun):
            return False
        self._no_call()
        return True

    def _read_call(self) -> bool:
        call = self._call
        assert call is not None
        taken = call.take(self._rest)
        self._rest = self._rest[taken:]
        if call.name is not None:
            self._tell(call)
        if self._syntax.is_bare and call.is_of_others:
            self._no_call()
            return True
        if not call.is_whole:
            return False
        if isinstance(call, ObjectOfCall) and call.name is None and not self._tell_whole(call):
            self._no_call()
            return True
        self._call = None
        if self._syntax.closing:
            self._state = _State.AFTER
        else:
            self._state = _State.TEXT if self._syntax.is_repeated else _State.BETWEEN
        return True

    def _read_after(self, *, final: bool) -> bool:
        begun, closing = self._rest.lstrip(), self._syntax.closing
        if begun.startswith(closing):
            self._rest = begun[len(closing) :]
        elif closing.startswith(begun):
            if not final:
                return False
            self._rest = ""  # it was cut off
        self._state = _State.TEXT
        return True

    def _tell(self, call: ObjectOfCall | TaggedCall) -> None:
        if call.index is None:
            self._begin_call(call, name=call.name or "", arguments=call.new_arguments())
        elif arguments := call.new_arguments():
            self._deltas.append(CallDelta(index=call.index, arguments=arguments))

    def _tell_whole(self, call: ObjectOfCall) -> bool:
        """Tell of a call whose members come in another order; False: it is none."""
        try:
            found = json.loads(call.text)
        except ValueError:
            return False
        key = next((each for each in ("arguments", "parameters") if each in found), None)
        if not isinstance(found.get("name"), str) or (key is None and self._syntax.is_bare):
            return False
        self._begin_call(call, name=found["name"], arguments=_as_text(found[key] if key else {}))
        return True

    def _begin_call(self, call: ObjectOfCall | TaggedCall, *, name: str, arguments: str) -> None:
        call.index = self.count
        self.count += 1
        self._owed = self._spaces = ""
        call_id = self._new_id(self._syntax)
        self._deltas.append(CallDelta(index=call.index, arguments=arguments, call_id=call_id, name=name))

    def _no_call(self) -> None:
        """What came since the opening is content after all."""
        self._say(self._owed + ("" if self._call is None else self._call.text))
        self._owed, self._call = "", None
        self._state = _State.PLAIN if self._syntax.is_bare else _State.TEXT

    def _finish(self) -> None:
        if self._state in (_State.BETWEEN, _State.CALL) and (self._call is None or self._call.index is None):
            self._no_call()
            self._say(self._rest)
            self._rest = ""
        if not self.count and self._spaces:
            self._said.append(self._spaces)
        self._spaces = ""

    def _say(self, text: str) -> None:
        text = self._spaces + text
        content = text.rstrip()
        self._spaces = text[len(content) :]
        self._has_said = self._has_said or bool(content)
        if content:
            self._said.append(content)


def _as_text(arguments: Any) -> str:
    """Return arguments as JSON; a model may have written them as a string that holds it."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
