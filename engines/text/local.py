"""A public stand-in for ``TextService``: the same work in the calling process, for tests and tools."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from engines.text.detokenize import Detokenizer
from engines.text.errors import TextRefused
from engines.text.incremental import TextDelta, TextStream
from engines.text.pieces import pieces_of
from engines.text.protocol import PROMPT_TAIL_TOKENS
from engines.text.stops import StopMatcher
from engines.text.tokenizer import TextTokenizer, added_tokens_of, detokenizer_with, detokenizers_of
from engines.text.wire import About, ChatOptions


class PlainTokenizer:
    """A ``TextTokenizer`` from a ``tokenizers.Tokenizer``; its chat template writes ``role: content`` lines.

    Tools are a line of their own, and calls and what they answer to stand behind the content, all as JSON.
    """

    def __init__(self, tokenizer: Tokenizer, *, has_chat_template: bool = True) -> None:
        self._tokenizer = tokenizer
        self._has_chat_template = has_chat_template
        self._detokenizers = detokenizers_of(tokenizer)
        self.piece = pieces_of(tokenizer)
        self.about = About(added_tokens=added_tokens_of(tokenizer))

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        options: ChatOptions = ChatOptions(),
    ) -> tuple[int, ...]:
        if not self._has_chat_template:
            raise TextRefused("this model has no chat template; use /v1/completions")
        offered = [{"role": "tools", "content": json.dumps(list(tools))}] if tools else []
        given = [{"role": name, "content": json.dumps(value)} for name, value in options.template_kwargs.items()]
        text = "".join(f"{message['role']}: {_said(message)}\n" for message in (*given, *offered, *messages))
        if options.continue_final_message:
            text = text.removesuffix("\n")
        return self.encode(text + "assistant: " * options.add_generation_prompt, add_special_tokens=True)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def detokenizer(self, prompt_tail: tuple[int, ...]) -> Detokenizer:
        return self._detokenizers(prompt_tail)


def _said(message: Mapping[str, Any]) -> str:
    others = {name: value for name, value in message.items() if name not in ("role", "content")}
    return str(message["content"]) + (json.dumps(others) if others else "")


class LocalText:
    """A ``Text`` without a process. ``num_open`` shows streams that nobody closed."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self.num_open = 0
        self.failure: str | None = None

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        options: ChatOptions = ChatOptions(),
    ) -> tuple[int, ...]:
        return self._tokenizer.chat(messages, tools=tools, options=options)

    @property
    def about(self) -> About:
        return self._tokenizer.about

    async def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids)

    async def pieces(self, token_ids: Sequence[int]) -> list[bytes]:
        return [self._tokenizer.piece(token_id) for token_id in token_ids]

    def open(
        self,
        *,
        prompt_token_ids: tuple[int, ...],
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        marks: tuple[str, ...] = (),
    ) -> "LocalFeed":
        tail = prompt_token_ids[-PROMPT_TAIL_TOKENS:]
        detokenizer = detokenizer_with(marks, self._tokenizer, prompt_tail=tail)
        stops = StopMatcher(stop, include_stop=include_stop)
        return LocalFeed(self, TextStream(detokenizer, stops, min_tokens=min_tokens))


class LocalFeed:
    """A ``TextFeed`` of ``LocalText``."""

    def __init__(self, text: LocalText, stream: TextStream) -> None:
        self._text = text
        self._stream = stream
        self._closed = False
        text.num_open += 1

    async def feed(self, token_ids: tuple[int, ...], *, final: bool = False) -> TextDelta:
        return self._stream.feed(token_ids, final=final)

    def close(self) -> None:
        self._text.num_open -= not self._closed
        self._closed = True
