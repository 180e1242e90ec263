"""Tools in published chat templates, and special tokens that are text where calls are looked for."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from engines.text.client import TextService
from engines.text.detokenize import Detokenizer, MarkingDetokenizer
from engines.text.local import PlainTokenizer
from engines.text.tokenizer import detokenizer_with
from flexpiped.api.inputs import read_messages
from tests.support.chat_templates import LLAMA3, MISTRAL_V3, QWEN
from tests.support.tiny_tokenizer import BOS, byte_fallback_tokenizer, byte_level_tokenizer, write_model_directory

TOOL: dict[str, Any] = {"type": "function", "function": {"name": "paint", "parameters": {"maximum": 10**30}}}
RENDER: Any = render_jinja_template
MESSAGES = read_messages(
    [
        {"role": "user", "content": "hello"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "abcdefghi", "type": "function", "function": {"name": "paint", "arguments": '{"a": "ö"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "done"},
        {"role": "user", "content": "more"},
    ],
    with_tools=True,
)


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        (QWEN, ['<tool_call>\n{"name": "paint", "arguments": {"a": "ö"}}\n</tool_call>', "\n<tool_response>\ndone\n"]),
        (LLAMA3, ['{"name": "paint", "parameters": {"a": "ö"}}<|eot_id|>', "ipython<|end_header_id|>\n\ndone"]),
        (
            MISTRAL_V3,
            [
                '[TOOL_CALLS] [{"name": "paint", "arguments": {"a": "ö"}, "id": "abcdefghi"}]',
                '[TOOL_RESULTS] {"content": done, "call_id": "abcdefghi"}',
            ],
        ),
    ],
    ids=["qwen", "llama3", "mistral"],
)
def test_templates_write_calls_and_results_as_their_models_know_them(template: str, parts: list[str]) -> None:
    """Which they do only if arguments are objects, and what is not there is left out."""
    conversations, _ = RENDER(
        conversations=[list(MESSAGES)],
        tools=[TOOL],
        chat_template=template,
        add_generation_prompt=True,
        eos_token="</s>",
    )
    for part in parts:
        assert part in conversations[0]


@pytest.mark.real_loop
async def test_the_process_tells_of_its_template_and_renders_tools(tmp_path: Path) -> None:
    service = TextService(model=write_model_directory(tmp_path, chat_template=QWEN))
    await service.start()
    try:
        assert service.about.chat_template == QWEN
        assert service.about.added_tokens[BOS] == 0
        text = await service.decode(await service.chat(MESSAGES, tools=[TOOL]))
        assert f"<tools>\n{json.dumps(TOOL)}\n</tools>" in text
        assert "<tools>" not in await service.decode(await service.chat(MESSAGES))
        output = (0, *byte_level_tokenizer().encode("[1]", add_special_tokens=False).ids)
        for marks, shown in (((), "[1]"), ((BOS,), f"{BOS}[1]")):
            with closing(service.open(prompt_token_ids=(5,), marks=marks)) as feed:
                deltas = [await feed.feed((token,)) for token in output] + [await feed.feed((), final=True)]
            assert "".join(delta.text for delta in deltas) == shown
    finally:
        await service.close()


def fed(detokenizer: Detokenizer, token_ids: list[int]) -> str:
    return "".join([*map(detokenizer.feed, token_ids), detokenizer.finish()])


def test_marks_are_text_between_what_is_detokenized_by_itself() -> None:
    tokenizer = PlainTokenizer(byte_fallback_tokenizer())
    once, half = 260, [3 + 0xE6, 3 + 0xBC]  # two bytes of three
    assert fed(detokenizer_with((BOS, "unknown"), tokenizer, prompt_tail=()), [once, 0, once]) == f"Once{BOS}Once"
    assert fed(detokenizer_with((BOS,), tokenizer, prompt_tail=()), [*half, 0]).endswith(BOS)
    assert not isinstance(detokenizer_with(("unknown",), tokenizer, prompt_tail=()), MarkingDetokenizer)
