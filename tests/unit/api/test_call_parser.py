"""Calls of tools are found in text however it is cut, and what is no call stays text."""

import random
from itertools import count

import pytest

from flexpiped.api.call_parser import CallDelta, CallParser, joined, new_call_id
from flexpiped.api.tool_syntax import HERMES, LLAMA3_JSON, MISTRAL, MISTRAL_ARGS, QWEN3_CODER, SYNTAXES, ToolSyntax

Call = tuple[str, str]
SCHEMAS = {"paint": {"properties": {"colour": {"type": "string"}, "layers": {"anyOf": [{"type": "integer"}]}}}}
A, B = '{"colour": "red"}', '{"deep": {"list": [1, "}]\\"", {}]}}'
CASES: list[tuple[ToolSyntax, str, str, list[Call]]] = [
    (HERMES, "Just text, with < and <tool and {braces}. \n", "Just text, with < and <tool and {braces}. \n", []),
    (HERMES, f'<tool_call>\n{{"name": "paint", "arguments": {A}}}\n</tool_call>', "", [("paint", A)]),
    (
        HERMES,
        f'Let me see.\n<tool_call>\n{{"name": "paint", "arguments": {A}}}\n</tool_call>\n'
        f'<tool_call>{{"name":"sing" , "arguments" : {B} }}</tool_call>\n',
        "Let me see.",
        [("paint", A), ("sing", B)],
    ),
    (HERMES, f'<tool_call>{{"arguments": {A}, "name": "paint"}}</tool_call> Done.', " Done.", [("paint", A)]),
    (HERMES, '<tool_call>{"name": "now"}</tool_call>', "", [("now", "{}")]),
    (HERMES, '<tool_call>{"name": "ein\\u00e9", "arguments": {}}</tool_call>', "", [("einé", "{}")]),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    (HERMES, "<tool_call>nothing of the kind</tool_call>", "<tool_call>nothing of the kind</tool_call>", []),
    (HERMES, '<tool_call>{"no": 1}</tool_call>x', '<tool_call>{"no": 1}</tool_call>x', []),
    (HERMES, '<tool_call>{"name": "pa', '<tool_call>{"name": "pa', []),
    (HERMES, '<tool_call>{"name": "paint", "arguments": {"colour": "r', "", [("paint", '{"colour": "r')]),
    (HERMES, f'<tool_call>{{"name": "paint", "arguments": {A}}} and more', " and more", [("paint", A)]),
    (MISTRAL, f'[TOOL_CALLS] [{{"name": "paint", "arguments": {A}}}]', "", [("paint", A)]),
    (
        MISTRAL,
        f'[TOOL_CALLS][{{"name": "paint", "arguments": {A}}}, {{"name": "sing", "arguments": {B}, "id": "abcdefghi"}}]',
        "",
        [("paint", A), ("sing", B)],
    ),
    (MISTRAL, "An [INST] and [TOOL", "An [INST] and [TOOL", []),
    (MISTRAL, "[TOOL_CALLS] none", "[TOOL_CALLS] none", []),
    (
        QWEN3_CODER,
        "I see.\n<tool_call>\n<function=paint>\n<parameter=colour>\nred\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=sing>\n</function>\n</tool_call>",
        "I see.",
        [("paint", A), ("sing", "{}")],
    ),
    (
        QWEN3_CODER,
        "<tool_call><function=paint><parameter=colour>5</parameter><parameter=layers> 7 </parameter>"
        '<parameter=wet>True</parameter><parameter=more>{"a": [1]}</parameter>'
        '<parameter=text>\n</function>\n\n"x"\n</parameter><parameter=layers>8</parameter></function></tool_call>.',
        ".",
        [
            (
                "paint",
                '{"colour": "5", "layers": 7, "wet": true, "more": {"a": [1]}, "text": "</function>\\n\\n\\"x\\""}',
            )
        ],
    ),
    (QWEN3_CODER, "<tool_call><function=f><parameter=a>NaN</parameter></tool_call>", "", [("f", '{"a": "NaN"}')]),
    (QWEN3_CODER, "<tool_call><function=f><parameter=a>1</parameter><parameter=b>", "", [("f", '{"a": 1')]),
    (QWEN3_CODER, "<tool_call><func", "<tool_call><func", []),
    (QWEN3_CODER, '<tool_call>{"name": "f"}', '<tool_call>{"name": "f"}', []),
    (MISTRAL_ARGS, f"[TOOL_CALLS]paint[ARGS]{A}", "", [("paint", A)]),
    (
        MISTRAL_ARGS,
        f"Let me see. [TOOL_CALLS]paint[ARGS]{A}[TOOL_CALLS] sing[ARGS] {B}",
        "Let me see.",
        [("paint", A), ("sing", B)],
    ),
    (MISTRAL_ARGS, f"[TOOL_CALLS]paint[ARGS]{A} Done.", " Done.", [("paint", A)]),
    (MISTRAL_ARGS, '[TOOL_CALLS]paint[ARGS]{"colour": "r', "", [("paint", '{"colour": "r')]),
    (MISTRAL_ARGS, "[TOOL_CALLS]paint[ARGS] red", "[TOOL_CALLS]paint[ARGS] red", []),
    (MISTRAL_ARGS, "[TOOL_CALLS]paint[AR", "[TOOL_CALLS]paint[AR", []),
    (MISTRAL_ARGS, f"[TOOL_CALLS]two words[ARGS]{A}", f"[TOOL_CALLS]two words[ARGS]{A}", []),
    (MISTRAL_ARGS, f"[TOOL_CALLS][ARGS]{A}", f"[TOOL_CALLS][ARGS]{A}", []),
    (LLAMA3_JSON, f'{{"name": "paint", "parameters": {A}}}', "", [("paint", A)]),
    (LLAMA3_JSON, f'\n<|python_tag|>{{"type": "function", "name": "paint", "parameters": {A}}}', "", [("paint", A)]),
    (
        LLAMA3_JSON,
        f'{{"name": "paint", "parameters": {A}}}; {{"name": "sing", "parameters": {B}}}',
        "",
        [("paint", A), ("sing", B)],
    ),
    (LLAMA3_JSON, ' {"answer": {"name": 5}} \n', ' {"answer": {"name": 5}} \n', []),
    (LLAMA3_JSON, '{"name": "Ann", "age": 5}', '{"name": "Ann", "age": 5}', []),
    (LLAMA3_JSON, 'It is {"name": "paint", "parameters": {}}', 'It is {"name": "paint", "parameters": {}}', []),
    (LLAMA3_JSON, "", "", []),
    (LLAMA3_JSON, " \n", " \n", []),
]


def read(syntax: ToolSyntax, pieces: list[str]) -> tuple[str, list[Call]]:
    """Return the content and the calls; what each delta says is checked on the way."""
    numbers = count()
    parser = CallParser(syntax, schemas=SCHEMAS, new_id=lambda _syntax: f"call-{next(numbers)}")
    said, deltas = "", list[CallDelta]()
    for index, piece in enumerate(pieces):
        content, new = parser.feed(piece, final=index == len(pieces) - 1)
        said += content
        deltas += new
    calls = joined(deltas)
    assert [(call.index, call.call_id) for call in calls] == [(i, f"call-{i}") for i in range(len(calls))]
    assert sum(bool(delta.name) for delta in deltas) == parser.count == len(calls)
    return said, [(call.name, call.arguments) for call in calls]


@pytest.mark.parametrize(("syntax", "text", "content", "calls"), CASES)
def test_content_and_calls(syntax: ToolSyntax, text: str, content: str, calls: list[Call]) -> None:
    assert read(syntax, [text]) == (content, calls)


@pytest.mark.parametrize(("syntax", "text", "content", "calls"), CASES)
def test_wherever_the_text_is_cut(syntax: ToolSyntax, text: str, content: str, calls: list[Call]) -> None:
    assert read(syntax, [*text, ""]) == (content, calls)
    draw = random.Random(len(text))
    for _ in range(20):
        cuts = sorted(draw.choices(range(len(text) + 1), k=5))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert read(syntax, pieces) == (content, calls), pieces


def test_arguments_come_as_they_are_written() -> None:
    parser = CallParser(HERMES, new_id=lambda _syntax: "id")
    found = [
        parser.feed(each, final=False) for each in ("A <tool", '_call>{"name": "f", "arg', 'uments": {"a"', ": 1", "}")
    ]
    assert [content for content, _ in found] == ["A", "", "", "", ""]
    deltas = [new for _, new in found]
    assert deltas[:2] == [(), ()]
    assert deltas[2] == (CallDelta(index=0, arguments='{"a"', call_id="id", name="f"),)
    assert deltas[3:] == [(CallDelta(index=0, arguments=": 1"),), (CallDelta(index=0, arguments="}"),)]


def test_json_that_is_no_call_does_not_wait_for_its_end() -> None:
    parser = CallParser(LLAMA3_JSON)
    assert parser.feed('{"answer', final=False) == ("", ())
    assert parser.feed('": [1', final=False) == ('{"answer": [1', ())


def test_ids_are_such_as_templates_take() -> None:
    assert len(new_call_id(MISTRAL)) == 9
    assert new_call_id(MISTRAL).isalnum()
    for syntax in SYNTAXES.values():
        assert new_call_id(syntax) != new_call_id(syntax)
