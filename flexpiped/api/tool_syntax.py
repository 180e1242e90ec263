"""How models write calls of tools, and which of these ways is a model's: told by its chat template. Pure.

hermes        <tool_call>{"name": ..., "arguments": {...}}</tool_call>, as often as there are calls (Hermes, Qwen)
llama3_json   {"name": ..., "parameters": {...}} as the whole output, perhaps behind <|python_tag|> (Llama 3.1 to 3.3)
mistral       [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...] (Mistral, up to version 7 of its tokenizer)
qwen3_coder   <tool_call><function=name><parameter=key>value</parameter>...</function></tool_call>, on lines each
mistral_args  [TOOL_CALLS]name[ARGS]{...}, as often as there are calls (Mistral, from version 13 of its tokenizer)

The names are those that vLLM has for its parsers, but for the last, which it tells from the tokenizer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSyntax:
    """One way to write calls.

    ``opening`` comes before them and ``closing`` behind each; ``between`` are characters that may stand around calls,
    ``end`` is the one after the last. ``separator``: each call has an opening, then its name, this, and the arguments
    alone. ``is_tagged``: arguments stand in tags and not as JSON. ``is_bare``: the opening may be missing, and the
    output is either calls or text. ``call_id_length``: of ids that the chat template takes, 0: any.
    """

    name: str
    opening: str
    closing: str = ""
    between: str = ""
    end: str = ""
    separator: str = ""
    arguments: str = "arguments"
    is_tagged: bool = False
    is_bare: bool = False
    call_id_length: int = 0

    @property
    def is_repeated(self) -> bool:
        """Whether each call has an opening of its own."""
        return bool(self.closing or self.separator)


HERMES: Final = ToolSyntax(name="hermes", opening="<tool_call>", closing="</tool_call>")
LLAMA3_JSON: Final = ToolSyntax(
    name="llama3_json", opening="<|python_tag|>", between=";", arguments="parameters", is_bare=True
)
MISTRAL: Final = ToolSyntax(name="mistral", opening="[TOOL_CALLS]", between="[,", end="]", call_id_length=9)
MISTRAL_ARGS: Final = ToolSyntax(name="mistral_args", opening="[TOOL_CALLS]", separator="[ARGS]", call_id_length=9)
QWEN3_CODER: Final = ToolSyntax(name="qwen3_coder", opening="<tool_call>", closing="</tool_call>", is_tagged=True)
SYNTAXES: Final[Mapping[str, ToolSyntax]] = {
    each.name: each for each in (HERMES, LLAMA3_JSON, MISTRAL, MISTRAL_ARGS, QWEN3_CODER)
}
# Marks of templates that have one of our openings, too, and something else behind it.
_FOREIGN: Final = ("<arg_key>", "[CALL_ID]")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCalls:
    """How the served model writes calls. The ids: of the tokens that these are, None: mere text."""

    syntax: ToolSyntax
    opening_id: int | None = None
    closing_id: int | None = None
    separator_id: int | None = None

    @property
    def marks(self) -> tuple[str, ...]:
        """Tokens that must be seen in the output, also where they are special ones."""
        marks = (
            (self.syntax.opening, self.opening_id),
            (self.syntax.closing, self.closing_id),
            (self.syntax.separator, self.separator_id),
        )
        return tuple(text for text, token_id in marks if token_id is not None)


def tool_calls_of(configured: str, *, chat_template: str | None, added_tokens: Mapping[str, int]) -> ToolCalls | None:
    """Return how a model writes calls, None where that is not known.

    Args:
        configured: The name of a syntax, or "auto" or "off".
        chat_template: The one that is rendered where there are tools.
        added_tokens: Ids of the tokens that the tokenizer has as a whole, special or not, by their text.
    """
    if configured == "off" or chat_template is None:
        return None
    syntax = syntax_of(chat_template) if configured == "auto" else SYNTAXES[configured]
    if syntax is None:
        return None
    return ToolCalls(
        syntax=syntax,
        opening_id=added_tokens.get(syntax.opening),
        closing_id=added_tokens.get(syntax.closing),
        separator_id=added_tokens.get(syntax.separator),
    )


def syntax_of(chat_template: str) -> ToolSyntax | None:
    """Return the way to write calls that a chat template shows the model.

    1. It knows no tools, or writes calls otherwise: none. 2. It has tags, or separates names from arguments. 3. It has
    an opening of ours. 4. Llama 3's has none, and is told by its headers and the key of the arguments.
    """
    if "tools" not in chat_template or any(mark in chat_template for mark in _FOREIGN):  # 1
        return None
    if "<function=" in chat_template:  # 2
        return QWEN3_CODER if QWEN3_CODER.opening in chat_template and "<parameter=" in chat_template else None
    if MISTRAL_ARGS.separator in chat_template:
        return MISTRAL_ARGS if MISTRAL_ARGS.opening in chat_template else None
    for syntax in (MISTRAL, HERMES):  # 3
        if syntax.opening in chat_template and syntax.arguments in chat_template:
            return syntax
    is_llama3 = "<|start_header_id|>" in chat_template and "ipython" in chat_template  # 4
    return LLAMA3_JSON if is_llama3 and LLAMA3_JSON.arguments in chat_template else None
