"""Chat templates as published models bring them, by the text process, held against transformers."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from engines.text.client import TextService
from engines.text.errors import TextRefused, TextStartFailed
from engines.text.wire import ChatOptions
from tests.support.tiny_tokenizer import BOS, write_model_directory

pytestmark = pytest.mark.real_loop
CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>{% endif %}{% endif %}"
)
# What a template may do to those who render it, by what the last message asks for.
ODD = """{% set asked = messages[-1]['content'] %}
{%- if asked == 'half a character' %}{{ raise_exception('\\ud800 is none') }}
{%- elif asked == 'a long word' %}{{ raise_exception('x' * 2000000) }}
{%- elif asked == 'half in the text' %}{{ '\\ud800' }}
{%- elif asked == 'recursion' %}{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}
{%- elif asked == 'inside' %}{{ ''.__class__.__base__.__subclasses__() }}
{%- elif asked == 'break' %}{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}
{%- elif asked == 'mark' %}{% generation %}{{ messages | tojson(indent=1) }}{% endgeneration %}
{%- elif asked == 'now' %}{{ strftime_now('%d %b %Y') | length }}
{%- else %}{{ asked }}{% endif %}"""
TALK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Once upon"}]


@asynccontextmanager
async def serving(directory: Path, *, template: Any = None) -> AsyncIterator[TextService]:
    write_model_directory(directory)
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["chat_template"]
    file.write_text(json.dumps(config if template is None else {**config, "chat_template": template}))
    service = TextService(model=directory)
    await service.start()
    try:
        yield service
    finally:
        await service.close()


async def said(service: TextService, asked: str) -> str:
    return await service.decode(await service.chat([{"role": "user", "content": asked}]))


async def test_whatever_a_template_does_the_process_goes_on(tmp_path: Path) -> None:
    async with serving(tmp_path, template=ODD) as service:
        pid = service.pid
        for asked in ("half a character", "a long word", "half in the text", "recursion", "inside"):
            with pytest.raises(TextRefused) as refusal:
                await said(service, asked)
            assert len(str(refusal.value)) < 2000
        assert await said(service, "break") == "01"
        assert json.loads(await said(service, "mark"))[0]["role"] == "user"
        assert await said(service, "now") == "11"
        assert await said(service, "two") == "two"
        assert service.pid == pid


async def test_values_and_ends_that_a_request_gives(tmp_path: Path) -> None:
    async with serving(tmp_path, template=CHATML) as service:

        async def rendered(**options: Any) -> str:
            return await service.decode(await service.chat(TALK, options=ChatOptions(**options)))

        whole = f"{BOS}<user>hello\n<assistant>Once upon\n"
        assert await rendered() == whole + "<assistant>"  # with the beginning once
        assert await rendered(template_kwargs={"enable_thinking": False}) == whole + "<assistant><think>\n\n</think>"
        assert await rendered(template_kwargs={"nobody_knows": [1]}) == whole + "<assistant>"
        assert await rendered(add_generation_prompt=False) == whole
        assert await rendered(add_generation_prompt=False, continue_final_message=True) == whole.removesuffix("\n")
        for name in ("tokenize", "chat_template", "tools"):
            with pytest.raises(TextRefused, match=f"chat_template_kwargs must not have {name}"):
                await rendered(template_kwargs={name: None})


@pytest.mark.parametrize(
    ("files", "refused"),
    [
        ({"chat_template.jinja": "{{ bos_token }}jinja"}, ""),
        ({"chat_template.json": json.dumps({"chat_template": "{{ bos_token }}json"})}, ""),
        ({"chat_template.jinja": "{% for"}, "chat template refuses these messages: .*"),
        ({}, "no chat template; use /v1/completions"),
    ],
    ids=["jinja", "json", "broken", "none"],
)
async def test_where_a_template_may_lie(files: Mapping[str, str], refused: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    async with serving(tmp_path) as service:
        if refused:
            with pytest.raises(TextRefused, match=refused):
                await said(service, "x")
        else:
            assert await said(service, "x") == BOS + next(iter(files)).partition(".")[2]


async def test_a_template_file_that_is_none_is_refused_at_start(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text("[]")
    with pytest.raises(TextStartFailed, match="no tokenizer can be read"):
        async with serving(tmp_path):
            pass


async def test_of_several_templates_there_is_one_for_tools(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools: {{ tools | length }}"}]
    async with serving(tmp_path, template=named) as service:
        assert await said(service, "x") == "plain"
        assert await service.decode(await service.chat(TALK, tools=[{"type": "function"}])) == "tools: 1"
        assert service.about.chat_template == "tools: {{ tools | length }}"
