"""Calls of tools that an output must keep to, as one grammar in llguidance's Lark. Pure.

Where calls are asked for, the output is calls; where they are left to the model and something is to be kept to (a
strict tool, one call at most, a schema of the content), it is text, or content that keeps to its schema, and calls that
keep to theirs. JSON is spaced as chat templates show it: with one space behind each comma and colon.
"""

import json
from collections.abc import Sequence
from typing import Any, Final

from engines.protocol import Grammar, GrammarKind
from flexpiped.api.tagged_grammar import SHARED, rules_of_call
from flexpiped.api.tool_syntax import ToolCalls
from flexpiped.api.tools import Tool, ToolChoice, Tools

_NEWLINE: Final = r'"\n"'
_SPACING: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def grammar_with_calls(tools: Tools, calls: ToolCalls, *, content: Grammar | None) -> Grammar | None:
    """Return what the output must keep to, None where that is nothing.

    Args:
        content: What the content must keep to by itself; a JSON schema.
    """
    if tools.choice is ToolChoice.NONE:
        return content
    is_left = tools.choice is ToolChoice.AUTO
    is_free = tools.are_parallel and content is None and not any(each.is_strict for each in tools.functions)
    if is_left and is_free:
        return None
    functions = [each for each in tools.functions if tools.only in ("", each.name)]
    several = tools.are_parallel and not tools.only and not calls.syntax.is_bare
    rules = _Rules(calls, several=several)
    if not is_left:
        lines = rules.only_calls()
    elif content is None:
        lines = rules.text_and_calls()
    else:
        lines = rules.content_or_calls(content)
    functions_of = _tagged_functions if calls.syntax.is_tagged else _functions
    lines += functions_of(functions, calls, leaves_free=is_left)
    return Grammar(kind=GrammarKind.LARK, source="\n".join(lines) + "\n", parameter="tools")


class _Rules:
    """How calls follow each other. ``body`` is what comes behind an opening.

    An opening that is a token of its own is never part of TEXT, but the model may spell it out, too.
    """

    def __init__(self, calls: ToolCalls, *, several: bool) -> None:
        self._syntax = calls.syntax
        self._opening = _token(calls.opening_id) or _text(calls.syntax.opening)
        self._closing = _token(calls.closing_id) or _text(calls.syntax.closing)
        self._is_token = calls.opening_id is not None
        self._several = several

    def only_calls(self) -> list[str]:
        if self._syntax.is_bare:
            return ["start: call"]
        apart = f"{_NEWLINE} " if self._syntax.closing else ""
        more = f" ({apart}{self._opening} body)*" if self._several and self._syntax.is_repeated else ""
        return [f"start: {self._opening} body{more}", *self._body()]

    def content_or_calls(self, content: Grammar) -> list[str]:
        flexible = {} if content.any_whitespace else {"whitespace_flexible": False}
        schema = json.dumps(_with_options(json.loads(content.source), flexible))
        start, *others = self.only_calls()
        calls = f"calls: {start.removeprefix('start: ')}"
        return ["start: content | calls", calls, f"content: %json {schema}", *others]

    def text_and_calls(self) -> list[str]:
        if self._syntax.is_bare:
            before = f"{self._opening}? " if self._is_token else ""
            return ["start: TEXT? | " + before + "call", r"TEXT: /[^{](.|\n)*/"]
        often = self._several and self._syntax.is_repeated
        start = "start: (lead body)* rest" if often else "start: rest | lead body"
        lead = ["lead: spelt", f"spelt[lazy]: TEXT {_text(self._syntax.opening)}"]
        if self._is_token:
            lead[0] = f"lead: spelt | TEXT {self._opening}"
        return [start, *lead, "rest: TEXT", r"TEXT: /(.|\n)*/", *self._body()]

    def _body(self) -> list[str]:
        """Return the rule of what follows the opening."""
        if self._syntax.closing:
            return [f"body: {_NEWLINE} call {_NEWLINE} {self._closing}"]
        if self._syntax.separator:
            return ["body: call"]
        more = ' (", " call)*' if self._several else ""
        return [f'body: " "? "[" call{more} "]"']


def _functions(functions: Sequence[Tool], calls: ToolCalls, *, leaves_free: bool) -> list[str]:
    """Return the rules of one call of any of ``functions``.

    Args:
        leaves_free: Arguments of tools that are not strict may be any object.
    """
    lines = ["call: " + " | ".join(f"call_{index}" for index in range(len(functions)))]
    for index, tool in enumerate(functions):
        before, behind = _around_arguments(tool.name, calls)
        lines.append(f"call_{index}: {before} arguments_{index} {behind}".rstrip())
        schema = {"type": "object"} if leaves_free and not tool.is_strict else json.loads(tool.schema)
        options = _SPACING if tool.is_strict else {**_SPACING, "lenient": True}
        lines.append(f"arguments_{index}: %json {json.dumps(_with_options(schema, options))}")
    return lines


def _tagged_functions(functions: Sequence[Tool], _calls: ToolCalls, *, leaves_free: bool) -> list[str]:
    lines = ["call: " + " | ".join(f"call_{index}" for index in range(len(functions))), *SHARED]
    for index, tool in enumerate(functions):
        is_open = leaves_free and not tool.is_strict
        lines += rules_of_call(f"call_{index}", tool.name, json.loads(tool.schema), is_open=is_open)
    return lines


def _around_arguments(name: str, calls: ToolCalls) -> tuple[str, str]:
    syntax = calls.syntax
    if syntax.separator:
        return f"{_text(name)} {_token(calls.separator_id) or _text(syntax.separator)}", ""
    return _text(f'{{"name": {json.dumps(name)}, "{syntax.arguments}": '), _text("}")


def _with_options(schema: Any, options: dict[str, Any]) -> Any:
    return {**schema, "x-guidance": options} if options and isinstance(schema, dict) else schema


def _token(token_id: int | None) -> str:
    return "" if token_id is None else f"<[{token_id}]>"


def _text(text: str) -> str:
    return json.dumps(text)
