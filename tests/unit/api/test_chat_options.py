"""What a request may say of the chat template."""

from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from engines.text.wire import ChatOptions
from flexpiped.api.errors import ApiError
from flexpiped.api.parameters import parse_chat, taken_here
from tests.support.fake_own_server import with_server
from tests.support.http_app import CAPABILITIES, http_app, ids_of

TALK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Once"}]
TAKEN = taken_here(CAPABILITIES)


def options(**given: Any) -> ChatOptions:
    return parse_chat({"messages": TALK, **given}, taken=TAKEN).options


def test_what_is_read() -> None:
    assert options() == options(chat_template_kwargs=None, add_generation_prompt=True) == ChatOptions()
    assert options(chat_template_kwargs={"a": 1}) == ChatOptions(template_kwargs={"a": 1})
    assert options(add_generation_prompt=False) == ChatOptions(add_generation_prompt=False)
    open_end = ChatOptions(add_generation_prompt=False, continue_final_message=True)
    assert options(add_generation_prompt=False, continue_final_message=True) == open_end


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"add_generation_prompt": "no"}, "add_generation_prompt"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ],
)
def test_what_is_refused(given: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refusal:
        options(**given)
    assert (refusal.value.status, refusal.value.param) == (400, param)


def test_engines_with_a_server_of_their_own_have_them_rendered_there() -> None:
    assert "chat_template_kwargs" not in taken_here(with_server(CAPABILITIES, args=()))
    assert "chat_template_kwargs" in taken_here(replace(CAPABILITIES, grammars=False))


@pytest.mark.real_loop
async def test_the_prompt_is_rendered_so(session: aiohttp.ClientSession) -> None:
    open_end = {"add_generation_prompt": False, "continue_final_message": True}
    async with http_app() as app:
        for given, text in (
            ({"chat_template_kwargs": {"mood": "ö"}}, 'mood: "\\u00f6"\nuser: hello\nassistant: Once\nassistant: '),
            (open_end, "user: hello\nassistant: Once"),
        ):
            async with session.post(f"{app.url}/tokenize", json={"messages": TALK, **given}) as response:
                tokens = (await response.json())["tokens"]
            assert tokens == [0, *ids_of(text)]
            chat = {"messages": TALK, "max_tokens": 1, **given}
            async with session.post(f"{app.url}/v1/chat/completions", json=chat) as response:
                assert (await response.json())["usage"]["prompt_tokens"] == len(tokens)
        await app.becomes_idle()
